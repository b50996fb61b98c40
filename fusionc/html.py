"""``report.html``: the dump to look at.

One page without scripts, fonts or links to anything outside itself, so that it opens offline, can be mailed, and
cannot run what a module's name says.  Like the rest of the dump it depends on the program alone: measured times stay
in ``timings.tsv``, and two reports of one program are equal byte for byte.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from html import escape

from fusionc.record import GraphRecord

MAX_BOXES = 160
MAX_DIFF_LINES = 400
MAX_SOURCES = 200
_BOX_W, _BOX_H, _GAP_X, _GAP_Y = 168, 26, 36, 26

_STYLE = """
:root{--bg:#fbfbfa;--ink:#1d2226;--soft:#5d666e;--line:#dcdfe2;--card:#fff;--code:#f3f4f5;--red:#b3261e;--green:#1b6e3c;
--accent:#2a5db0}
@media(prefers-color-scheme:dark){:root{--bg:#16191c;--ink:#e4e7ea;--soft:#9aa4ad;--line:#333a40;--card:#1e2226;
--code:#24292e;--red:#f2938c;--green:#7fd39f;--accent:#86b0f5}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:28px 24px 60px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:24px;margin:0 0 4px}h2{font-size:20px;margin:44px 0 6px;padding-top:14px;border-top:2px solid var(--line)}
h3{font-size:15px;margin:24px 0 8px}p{margin:4px 0}.soft{color:var(--soft)}.bad{color:var(--red)}.good{color:var(--green)}
.cards{display:flex;flex-wrap:wrap;gap:10px;margin:14px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 14px;min-width:104px}
.card b{display:block;font-size:19px;font-variant-numeric:tabular-nums}.card span{color:var(--soft);font-size:12.5px}
table{border-collapse:collapse;width:100%;background:var(--card);font-size:13.5px}
th,td{border:1px solid var(--line);padding:4px 9px;text-align:left;vertical-align:top}
th{font-weight:600;background:var(--code)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
code,pre{font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace}
pre{background:var(--code);border:1px solid var(--line);border-radius:6px;padding:10px;margin:6px 0 12px;overflow:auto;
max-height:520px}
details{margin:4px 0}summary{cursor:pointer}
.scroll{overflow:auto;border:1px solid var(--line);border-radius:8px;background:var(--card);max-height:760px}
svg text{fill:var(--ink);font:11.5px ui-monospace,Menlo,"DejaVu Sans Mono",monospace}
svg .box{stroke:var(--line)}svg .out{stroke:var(--ink);stroke-width:2}
svg .edge{fill:none;stroke:var(--soft);stroke-opacity:.45}svg .onbox{fill:#1d2226}
svg .axis{stroke:var(--soft);stroke-width:1}svg .roof{fill:none;stroke:var(--accent);stroke-width:2}
svg .plain{fill:var(--card)}svg .call{fill:#c9d3df}svg .fall{fill:#f0b4ae;stroke:#b3261e}
.bar{display:inline-block;height:9px;background:var(--accent);border-radius:2px}
.add{color:var(--green)}.del{color:var(--red)}.at{color:var(--accent)}
.key{display:inline-block;width:12px;height:12px;border:1px solid var(--line);border-radius:3px;margin:0 5px -1px 12px}
.line{white-space:nowrap}
nav a{margin-right:14px}a{color:var(--accent)}
"""


def page(title: str, summary: str, graphs: list[tuple[str, str, str]]) -> str:
    """The whole page. ``graphs`` holds (anchor, heading, ``graph_section`` text) each."""
    links = "".join(f'<a href="#{escape(a)}">{escape(h)}</a>' for a, h, _ in graphs)
    body = "".join(f'<section id="{escape(a)}"><h2>{escape(h)}</h2>{text}</section>' for a, h, text in graphs)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        # nothing may be fetched or run, whatever a name or a message holds
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>"
        f'<p class="soft">What was compiled, and why so. Measured times are in timings.tsv.</p><nav>{links}</nav>'
        f"<details><summary>Summary as text</summary><pre>{escape(summary)}</pre></details>\n{body}</body></html>\n"
    )


def graph_section(graph: GraphRecord, folder: str) -> str:
    """One graph: figures, drawing, kernels with roofline, passes with diffs, refusals, fallbacks, sources."""
    parts = [
        _cards(graph),
        "<h3>Graph</h3>",
        _drawing(graph),
        "<h3>Kernels</h3>",
        _kernel_table(graph),
        _roofline(graph),
        "<h3>Library calls and fallbacks</h3>",
        _calls(graph),
        "<h3>Passes</h3>",
        _passes(graph),
        "<h3>Sources</h3>",
        _sources(graph, folder),
    ]
    return "\n".join(parts)


# figures


def number(value: float) -> str:
    """A count of bytes, operations or microseconds with three digits and a unit prefix: 1234567 -> "1.23 M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _cards(graph: GraphRecord) -> str:
    launches = sum(k.uses for k in graph.kernels)
    moved = sum((k.bytes_read + k.bytes_written) * k.uses for k in graph.kernels)
    flops = sum(k.flops * k.uses for k in graph.kernels)
    predicted = [k.predicted_us * k.uses for k in graph.kernels if k.predicted_us is not None]
    cards = [
        (str(len(graph.groups)), "groups"),
        (str(len(graph.kernels)), "distinct kernels"),
        (str(launches), "launches"),
        (str(sum(not c.reason for c in graph.calls)), "library calls"),
        (str(graph.left_to_aten()), "fallbacks"),
        (number(moved) + "B", "moved by kernels"),
        (number(flops), "operations in kernels"),
    ]
    if predicted:
        cards.append((f"{number(sum(predicted))} µs", "predicted, kernels"))
    cells = "".join(f'<div class="card"><b>{escape(v)}</b><span>{escape(t)}</span></div>' for v, t in cards)
    where = f" for {escape(graph.device)}" if graph.device else ""
    return f'<p class="soft">{escape(graph.stage)} graph{where}</p><div class="cards">{cells}</div>'


def _table(head: list[str], rows: list[list[str]], numeric: set[int]) -> str:
    """A table of cells that are HTML already; columns in ``numeric`` are right-aligned."""
    mark = [' class="n"' if i in numeric else "" for i in range(len(head))]
    top = "".join(f"<th{m}>{h}</th>" for h, m in zip(head, mark, strict=True))
    body = "".join("<tr>" + "".join(f"<td{m}>{c}</td>" for c, m in zip(r, mark, strict=True)) + "</tr>" for r in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _kernel_table(graph: GraphRecord) -> str:
    if not graph.kernels:
        return '<p class="soft">No kernels were generated: every node is a library call or a view.</p>'
    # one unit for all: predicted time where every kernel has one, else bytes moved
    timed = all(k.predicted_us is not None for k in graph.kernels)
    cost = [
        ((k.predicted_us or 0.0) if timed else float(k.bytes_read + k.bytes_written)) * k.uses for k in graph.kernels
    ]
    total = sum(cost) or 1.0
    colours = _colours(graph)
    kinds: dict[str, str] = {}
    for g in graph.groups:
        kinds.setdefault(g.kernel, g.kind)
    rows = []
    for i, (k, c) in enumerate(zip(graph.kernels, cost, strict=True)):
        share = 100 * c / total
        where = "<br>".join(escape(o) for o in k.origins[:3]) + ("<br>…" if len(k.origins) > 3 else "")
        key = f'<span class="key" style="margin-left:0;background:{colours.get(k.name, "none")}"></span>'
        rows.append(
            [
                str(i),
                f"{key}<code>{escape(k.name)}</code>",
                f'<span class="line">{escape(kinds.get(k.name, ""))} <span class="soft">{escape(k.language)}</span></span>',
                str(k.uses),
                str(len(k.nodes)),
                number(k.bytes_read) + "B",
                number(k.bytes_written) + "B",
                number(k.flops),
                "–" if k.predicted_us is None else number(k.predicted_us),
                f'<span class="bar" style="width:{max(1, round(share * 0.9))}px"></span> {share:.0f} %',
                f"<code>{where}</code>",
            ]
        )
    head = [
        "#",
        "kernel",
        "kind",
        "uses",
        "nodes",
        "read",
        "written",
        "operations",
        "predicted µs",
        "share of time" if timed else "share of bytes",
        "from",
    ]
    return _table(head, rows, {0, 3, 4, 5, 6, 7, 8})


# the drawing


def _colours(graph: GraphRecord) -> dict[str, str]:
    """A pastel for each kernel, so that groups that share one kernel share its colour."""
    # golden-ratio steps keep neighbours apart however many there are; hues 45-315 leave red to the fallbacks
    return {k.name: f"hsl({45 + (i * 0.618034 + 0.61) % 1 * 270:.0f} 65% 80%)" for i, k in enumerate(graph.kernels)}


def _drawing(graph: GraphRecord) -> str:
    # saved activations make edges to the output node many: what is returned gets a thick border instead
    returned = {a for a, b in graph.edges if b == "output"}
    nodes = sorted({n for edge in graph.edges for n in edge} - {"output"} | {n for g in graph.groups for n in g.nodes})
    if not nodes:
        return '<p class="soft">The graph is empty.</p>'
    group_of = {n: g for g in graph.groups for n in g.nodes}
    calls = {c.node: c for c in graph.calls}
    note = ""
    label: dict[str, list[str]] = {n: [n] for n in nodes}
    if len(nodes) > MAX_BOXES:
        label = _collapsed(nodes, graph)
        note = f"{len(nodes)} nodes: each group is one box with the number of its nodes, views are left out. "
        if len({b for n in nodes for b in label[n]}) > MAX_BOXES:
            made = {b for _, b in graph.edges} | set(group_of) | set(calls)
            label = {n: [b for b in label[n] if b in made or b not in nodes] for n in nodes}
            note = note.replace("views", "views and inputs")
    boxes = {b: n for n in reversed(nodes) for b in label[n] if b == n or n in group_of}
    thick = {b for n in returned for b in label.get(n, [])}
    edges = sorted({(a, b) for x, y in graph.edges if y in label and (y in group_of or label[y] == [y])
                    for a in label[x] for b in label[y] if a != b})  # fmt: skip
    levels = _levels(sorted(boxes), edges)
    order = [b for level in levels for b in level]
    if len(order) > MAX_BOXES:
        keep = set(order[:MAX_BOXES])
        levels = [[b for b in level if b in keep] for level in levels]
        levels = [level for level in levels if level]
        edges = [(a, b) for a, b in edges if a in keep and b in keep]
        note += f"Only the first {MAX_BOXES} of {len(order)} boxes are drawn; the .graph files hold all. "
    at = {
        b: (x * (_BOX_W + _GAP_X) + _GAP_X, y * (_BOX_H + _GAP_Y) + _GAP_X)
        for y, level in enumerate(levels)
        for x, b in enumerate(level)
    }
    colours = _colours(graph)
    lines = []
    for a, b in edges:
        (x0, y0), (x1, y1) = at[a], at[b]
        x0, x1, y0 = x0 + _BOX_W // 2, x1 + _BOX_W // 2, y0 + _BOX_H
        bend = max(14, (y1 - y0) // 2)
        # an edge that skips levels bows sideways, or it would vanish behind the boxes between
        bow = (_BOX_W * 4) // 5 if y1 - y0 > _BOX_H + 2 * _GAP_Y - 1 and abs(x1 - x0) < _BOX_W else 0
        lines.append(f'<path class="edge" d="M{x0} {y0}C{x0 + bow} {y0 + bend} {x1 + bow} {y1 - bend} {x1} {y1}"/>')
    for b in (b for level in levels for b in level):
        node, (x, y) = boxes[b], at[b]
        group, call = group_of.get(node), calls.get(node)
        kind, fill, on = "plain", "", ""
        if group is not None:
            kind, fill, on = "", f' style="fill:{colours.get(group.kernel, "#ddd")}"', ' class="onbox"'
        elif call is not None:
            kind, on = ("fall" if call.reason else "call"), ' class="onbox"'
        kind += " out" if b in thick else ""
        tip = b + (f" — {group.name}, kernel {group.kernel}" if group else "")
        tip += f" — {call.op}{': ' + call.reason if call.reason else ''}" if call and not group else ""
        text = b
        if group is not None and b != node:  # what a group computes says more than its number
            count = f" ({len(group.nodes)})"
            text = (group.kernel if len(group.kernel + count) <= 22 else group.kernel[: 21 - len(count)] + "…") + count
        text = text if len(text) <= 22 else text[:21] + "…"
        lines.append(
            f'<g><title>{escape(tip)}</title><rect class="box {kind}"{fill} x="{x}" y="{y}" width="{_BOX_W}" '
            f'height="{_BOX_H}" rx="5"/><text{on} x="{x + _BOX_W // 2}" y="{y + 17}" text-anchor="middle">'
            f"{escape(text)}</text></g>"
        )
    width = max(len(level) for level in levels) * (_BOX_W + _GAP_X) + _GAP_X
    height = len(levels) * (_BOX_H + _GAP_Y) + _GAP_X
    legend = (
        '<p class="soft"><span class="key" style="margin-left:0;background:hsl(210 65% 80%)"></span>one colour for each '
        'kernel <span class="key" style="background:#c9d3df"></span>library call '
        '<span class="key" style="background:#f0b4ae"></span>fallback '
        '<span class="key"></span>input or view <span class="key" style="border:2px solid"></span>returned</p>'
    )
    svg = f'<svg width="{width}" height="{height}" role="img" aria-label="graph">{"".join(lines)}</svg>'
    return f'<p class="soft">{escape(note)}</p>{legend}<div class="scroll">{svg}</div>'


def _collapsed(nodes: list[str], graph: GraphRecord) -> dict[str, list[str]]:
    """The boxes that stand for each node: its group's, its own, or, for views between these, those of its producers."""
    import networkx as nx

    group_of = {n: f"{g.name} ({len(g.nodes)})" for g in graph.groups for n in g.nodes}
    own = set(group_of) | {c.node for c in graph.calls}
    g: nx.DiGraph[str] = nx.DiGraph()
    g.add_nodes_from(nodes)
    g.add_edges_from((a, b) for a, b in graph.edges if b != "output")
    order = list(nx.topological_sort(g)) if nx.is_directed_acyclic_graph(g) else []
    label = {n: [group_of.get(n, n)] for n in nodes}
    for n in order:
        if n not in own and g.in_degree(n):
            label[n] = list(dict.fromkeys(b for p in sorted(g.predecessors(n)) for b in label[p]))
    return label


def _levels(boxes: list[str], edges: list[tuple[str, str]]) -> list[list[str]]:
    """Boxes by topological generation, inputs moved down to their first reader, each level ordered by its producers."""
    import networkx as nx

    g: nx.DiGraph[str] = nx.DiGraph()
    g.add_nodes_from(boxes)
    g.add_edges_from(edges)
    if not nx.is_directed_acyclic_graph(g):  # only a broken record has a cycle; it is still worth showing
        return [boxes[i : i + 6] for i in range(0, len(boxes), 6)]
    level = {b: i for i, generation in enumerate(nx.topological_generations(g)) for b in generation}
    for b in boxes:
        if g.in_degree(b) == 0 and g.out_degree(b):
            level[b] = min(level[s] for s in g.successors(b)) - 1
    rows: list[list[str]] = [[] for _ in range(max(level.values()) + 1)]
    for b in boxes:
        rows[level[b]].append(b)
    place = {b: i for row in rows for i, b in enumerate(row)}
    for sweep in range(4):
        downward = sweep % 2 == 0
        for row in rows if downward else rows[::-1]:
            around = g.predecessors if downward else g.successors
            centre = {b: _mean([place[n] for n in around(b)], place[b]) for b in row}
            row.sort(key=lambda b: (centre[b], b))
            place.update((b, i) for i, b in enumerate(row))
    return [row for row in rows if row]


def _mean(values: list[int], default: float) -> float:
    return sum(values) / len(values) if values else default


# the roofline


def _roofline(graph: GraphRecord) -> str:
    """Every kernel as a numbered dot: operations per byte against predicted operations per second, both logarithmic."""
    dots = []
    for i, k in enumerate(graph.kernels):
        moved = k.bytes_read + k.bytes_written
        if k.predicted_us and moved and k.predicted_us > 0:
            flops = max(k.flops, moved / 64)  # a pure copy has no operations and would fall off the logarithmic axis
            dots.append((i, k.name, flops / moved, flops / k.predicted_us / 1e3, moved / k.predicted_us / 1e3))
    if not dots:
        return '<p class="soft">No roofline: no kernel has a predicted time.</p>'
    known = graph.peak_gbs is not None
    peak = graph.peak_gbs if graph.peak_gbs is not None else max(d[4] for d in dots)
    x_lo = math.floor(math.log10(min(0.1, *(d[2] for d in dots))))
    x_hi = math.ceil(math.log10(max(10.0, *(d[2] for d in dots), (graph.peak_gflops or 0) / peak * 2)))
    top = max(graph.peak_gflops or 0, *(d[3] for d in dots), peak)
    y_lo = math.floor(math.log10(min(d[3] for d in dots)))
    y_hi = max(math.ceil(math.log10(top)), y_lo + 1)
    w, h, left, low = 620, 300, 62, 42

    def px(v: float) -> float:
        return round(left + (math.log10(v) - x_lo) / (x_hi - x_lo) * (w - left - 12), 1)

    def py(v: float) -> float:
        return round(h - low - (math.log10(v) - y_lo) / (y_hi - y_lo) * (h - low - 12), 1)

    out = []
    for e in range(x_lo, x_hi + 1):
        out.append(f'<path class="edge" d="M{px(10.0**e)} 12V{h - low}"/>')
        out.append(f'<text x="{px(10.0**e)}" y="{h - low + 16}" text-anchor="middle">{number(10.0**e)}</text>')
    for e in range(y_lo, y_hi + 1):
        out.append(f'<path class="edge" d="M{left} {py(10.0**e)}H{w - 12}"/>')
        out.append(f'<text x="{left - 6}" y="{py(10.0**e) + 4}" text-anchor="end">{number(10.0**e)}</text>')
    # the memory roof y = peak * x, cut at the frame and, where known, at the compute roof
    ceiling = min(graph.peak_gflops or 10.0**y_hi, 10.0**y_hi)
    x0, x1 = max(10.0**x_lo, 10.0**y_lo / peak), min(10.0**x_hi, ceiling / peak)
    if x0 < x1:
        flat = f"H{w - 12}" if graph.peak_gflops else ""
        out.append(f'<path class="roof" d="M{px(x0)} {py(x0 * peak)}L{px(x1)} {py(x1 * peak)}{flat}"/>')
    colours = _colours(graph)
    for i, name, x, y, gbs in dots:
        tip = f"{i} {name}: {number(gbs)} GB/s, {number(y)} GFLOP/s predicted"
        out.append(
            f'<g><title>{escape(tip)}</title><circle class="box" style="fill:{colours[name]}" cx="{px(x)}" '
            f'cy="{py(y)}" r="8"/><text class="onbox" x="{px(x)}" y="{py(y) + 4}" text-anchor="middle">{i}</text></g>'
        )
    out.append(f'<text x="{(left + w) // 2}" y="{h - 6}" text-anchor="middle">operations per byte</text>')
    out.append(
        f'<text x="14" y="{(h - low) // 2}" text-anchor="middle" transform="rotate(-90 14 {(h - low) // 2})">'
        "GFLOP/s, predicted</text>"
    )
    roof = f"{peak:.3g} GB/s" + ("" if known else " (the best kernel: the device's bandwidth is not known)")
    return (
        f'<p class="soft">Roofline: dots are kernels by number; the slope is {escape(roof)}.</p>'
        f'<svg width="{w}" height="{h}" role="img" aria-label="roofline">{"".join(out)}</svg>'
    )


# texts


def _calls(graph: GraphRecord) -> str:
    counts = Counter((c.op, c.reason) for c in graph.calls)
    rows = [
        [f"<code>{escape(op)}</code>", str(n), f'<span class="bad">{escape(reason)}</span>' if reason else "expected"]
        for (op, reason), n in sorted(counts.items(), key=lambda item: (not item[0][1], -item[1], item[0]))
    ]
    rows += [["", "", f'<span class="bad">{escape(f)}</span>'] for f in graph.fallbacks]
    if not rows:
        return '<p class="good">None: everything became kernels.</p>'
    return _table(["operator", "calls", "why it is not in a kernel"], rows, {1})


def diff_lines(before: str, after: str) -> list[str]:
    """A unified diff of two graph texts, at most ``MAX_DIFF_LINES`` lines and a closing note."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", n=2, lineterm=""))
    if len(lines) > MAX_DIFF_LINES:
        rest = len(lines) - MAX_DIFF_LINES
        lines = [*lines[:MAX_DIFF_LINES], f"… {rest} more lines: compare the .graph files"]
    return lines


def _diff(before: str, after: str) -> str:
    out = []
    for line in diff_lines(before, after):
        kind = {"+": "add", "-": "del", "@": "at"}.get(line[:1], "")
        out.append(f'<span class="{kind}">{escape(line)}</span>' if kind else escape(line))
    return f"<pre>{chr(10).join(out)}</pre>"


def _passes(graph: GraphRecord) -> str:
    out = []
    for p in graph.passes:
        if not p.fired and not p.refusals:
            continue
        fired = f'<b class="good">fired {p.fired}×</b>' if p.fired else '<span class="soft">did not fire</span>'
        refused = f", {len(p.refusals)} refused" if p.refusals else ""
        inner = ""
        if p.refusals:
            reasons = Counter(r.reason for r in p.refusals)
            first = {r.reason: r.node for r in reversed(p.refusals)}
            rows = [
                [escape(reason), str(n), f"<code>{escape(first[reason])}</code>"]
                for reason, n in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
            ]
            inner += _table(["refused because", "times", "first at"], rows, {1})
        if p.fired and p.before is not None and p.after is not None:
            inner += _diff(p.before, p.after)
        head = f"<summary><code>{p.position:02d} {escape(p.name)}</code> {escape(p.level)} level: {fired}{refused}</summary>"
        out.append(f"<details>{head}{inner}</details>")
    quiet = sum(not p.fired and not p.refusals for p in graph.passes)
    if quiet:
        out.append(f'<p class="soft">{quiet} more passes found nothing to match.</p>')
    return "".join(out) or '<p class="soft">No pass ran.</p>'


def _sources(graph: GraphRecord, folder: str) -> str:
    def fold(title: str, text: str) -> str:
        return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>" if text else ""

    out = [fold("graph as it came in", graph.input_text), fold("graph after all passes", graph.final_text)]
    for i, k in enumerate(graph.kernels[:MAX_SOURCES]):
        inner = "".join(
            f'<p class="soft">{title}</p><pre>{escape(text)}</pre>'
            for title, text in (("loops", k.loop_text), ("plan", k.plan_json), (f"source, {k.language}", k.source))
            if text
        )
        out.append(f"<details><summary>kernel {i}: <code>{escape(k.name)}</code></summary>{inner}</details>")
    if len(graph.kernels) > MAX_SOURCES:
        out.append(
            f'<p class="soft">The other {len(graph.kernels) - MAX_SOURCES} kernels are in {escape(folder)}/.</p>'
        )
    out.append(fold("program", graph.program))
    return "".join(out)
