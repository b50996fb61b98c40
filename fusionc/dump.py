"""The dump tree: everything that a compilation decided, as files to read, run and ``diff -r``.

All contents depend on the program alone, so that two dumps differ exactly where the compiler behaved differently;
times, cache hits and messages go to ``timings.tsv`` and ``run.log`` only.  Writing a dump must never break the user's
program: any failure gives one warning and the compilation goes on.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fusionc import html
from fusionc.codegen.names import path_component
from fusionc.config import Config
from fusionc.errors import warn_once
from fusionc.record import GraphRecord, KernelRecord

MARKER = ".fusionc-dump"
_FILES = ("SUMMARY.txt", "report.html", "config.json", "timings.tsv", "run.log")
_GRAPH_FOLDER = re.compile(r"(g\d+_[A-Za-z0-9_.-]+|\.g\d+\.tmp)")
_T = TypeVar("_T")


# public


def write_graph(graph: GraphRecord, config: Config) -> Path | None:
    """Write one graph's folder and refresh SUMMARY.txt, report.html and timings.tsv. Its folder, or None (no dump)."""
    return _guarded(config, lambda dump: dump.add(graph))


def log(config: Config, message: str) -> None:
    """Append one line to ``run.log`` of the dump, if there is one."""
    _guarded(config, lambda dump: dump.log(message))


def refresh(config: Config) -> None:
    """Write ``timings.tsv`` again, after measured times arrived in the records."""
    _guarded(config, lambda dump: dump.write_timings())


def clean(text: str) -> str:
    """``text`` without what differs between machines and runs: absolute paths, memory addresses."""
    cwd = os.getcwd().rstrip("/")

    def short(m: re.Match[str]) -> str:
        path = m.group()
        if cwd and path.startswith(cwd + "/"):
            path = path[len(cwd) + 1 :]
            # a virtual environment below the working folder is not the user's code
            return path.rpartition("/site-packages/")[2]
        if "/site-packages/" in path:
            return path.rpartition("/site-packages/")[2]
        return path.rpartition("/")[2]

    temp = re.escape(tempfile.gettempdir().rstrip("/"))
    text = re.sub(rf"(?<![\w.]){temp}(?:/[\w.@+-]+)+", short, text) if temp else text
    text = re.sub(r"(?<![\w.:/])(?:/[\w.@+-]+)+/[\w.@+-]+\.(?:py|graph|cpp|so|cu|h)\b", short, text)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def summary(graphs: list[GraphRecord], measured: bool = False) -> str:
    """One screen about some graphs: kernels, library calls, fallbacks with reasons, passes that fired.

    ``measured`` adds what differs between runs: measured times and cache hits.
    """
    n_kernels = sum(len(g.kernels) for g in graphs)
    head = (
        f"fusionc: {_count(len(graphs), 'graph')}, {_count(sum(len(g.groups) for g in graphs), 'group')}, "
        f"{_count(n_kernels, 'kernel')}, {_count(sum(not c.reason for g in graphs for c in g.calls), 'library call')}, "
        f"{_count(sum(g.left_to_aten() for g in graphs), 'fallback')}"
    )
    parts = [head]
    for i, g in enumerate(graphs):
        parts.append("\n".join(_summary_of(i, g, measured)))
    return "\n\n".join(parts) + "\n"


# text


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _summary_of(index: int, g: GraphRecord, measured: bool) -> list[str]:
    def us(value: float | None) -> str:
        return "-" if value is None else html.number(value)

    where = f", {g.device}" if g.device else ""
    name = re.sub(r"^g\d+_", "", g.name)
    lines = [f"g{index} {name} ({g.stage}{where})"]
    if g.kernels:
        head = ["  kernel", "uses", "nodes", "read", "written", "ops", "predicted us"]
        rows = [
            [
                f"  {_kernel_folder(i, k)}",
                str(k.uses),
                str(len(k.nodes)),
                html.number(k.bytes_read) + "B",
                html.number(k.bytes_written) + "B",
                html.number(k.flops),
                us(k.predicted_us),
            ]
            for i, k in enumerate(g.kernels)
        ]
        if measured:
            head += ["measured us", "cached"]
            for row, k in zip(rows, g.kernels, strict=True):
                row += [us(k.measured_us), "yes" if k.from_cache else "no"]
        shown = 24
        lines += _columns([head, *rows[:shown]])
        if len(rows) > shown:
            lines.append(f"  … and {len(rows) - shown} more kernels")
        moved = sum((k.bytes_read + k.bytes_written) * k.uses for k in g.kernels)
        ops = sum(k.flops * k.uses for k in g.kernels)
        launches = sum(k.uses for k in g.kernels)
        lines.append(f"  {_count(launches, 'launch').replace('launchs', 'launches')}, "
                     f"{html.number(moved)}B moved, {html.number(ops)} operations")  # fmt: skip
    ops_called = Counter(c.op for c in g.calls if not c.reason)
    if ops_called:
        called = sorted(ops_called.items(), key=lambda item: (-item[1], item[0]))
        text = ", ".join(f"{op} ×{n}" for op, n in called[:12])
        lines.append(f"  library calls: {text}" + (f", … {len(called) - 12} more" if len(called) > 12 else ""))
    reasons = Counter(f"{c.op}: {c.reason}" for c in g.calls if c.reason)
    reasons.update(g.fallbacks)
    if reasons:
        lines.append("  fallbacks:")
        lines += [f"    {n} × {clean(r)}" for r, n in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))]
    if g.cudagraph:
        lines.append(f"  CUDA graph: {clean(g.cudagraph)}")
    fired = [f"{p.name} ×{p.fired}" for p in g.passes if p.fired]
    if fired:
        lines.append(f"  passes that fired: {', '.join(fired)}")
    refused = Counter(r.pass_name for p in g.passes for r in p.refusals)
    if refused:
        text = ", ".join(f"{name} ×{n}" for name, n in sorted(refused.items()))
        lines.append(f"  refusals (see refusals.txt): {text}")
    lines += [f"  {p.name}: {note}" for p in g.passes for note in p.notes]
    return lines


def _columns(rows: list[list[str]]) -> list[str]:
    """Rows as aligned text: the first column to the left, the others to the right."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    out = []
    for r in rows:
        cells = [r[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True)]
        out.append("  ".join(cells).rstrip())
    return out


def _tsv(head: list[str], rows: list[list[Any]]) -> str:
    def cell(value: Any) -> str:
        return "" if value is None else re.sub(r"[\t\r\n]+", " ", str(value))

    return "\n".join("\t".join(cell(c) for c in row) for row in [head, *rows]) + "\n"


def _kernel_folder(index: int, kernel: KernelRecord) -> str:
    name = re.sub(r"^k\d+_", "", kernel.name)
    taken: set[str] = set()  # the number already makes it unique
    return f"k{index:02d}_{path_component(name, taken)}"


def _groups_text(g: GraphRecord) -> str:
    out = []
    for group in g.groups:
        out.append(
            f"{group.name}: {group.kind}, kernel {group.kernel}\n  in   {' '.join(group.inputs)}\n"
            f"  does {' '.join(group.nodes)}\n  out  {' '.join(group.outputs)}\n"
        )
    for call in g.calls:
        out.append(f"{call.node}: library call {call.op}" + (f" because {call.reason}" if call.reason else "") + "\n")
    return "".join(out)


def _refusals_text(g: GraphRecord) -> str:
    out = []
    for p in g.passes:
        if p.refusals:
            out.append(f"{p.position:02d} {p.name}\n")
            out += [f"  {r.node or '-'}: {r.reason}\n" for r in p.refusals]
    return "".join(out)


def graph_files(g: GraphRecord) -> dict[str, str]:
    """All files of one graph's folder: path relative to it -> text."""
    files: dict[str, str] = {"00_input.graph": g.input_text}
    last = g.input_text
    taken = {"00_input"}
    for p in g.passes:
        if p.fired and p.after is not None:
            files[f"{path_component(f'{p.position:02d}_{p.name}', taken)}.graph"] = p.after
            last = p.after
    if g.final_text and g.final_text != last:
        files["final.graph"] = g.final_text
    rows = [[p.position, p.level, p.name, p.fired, len(p.refusals)] for p in g.passes]
    files["passes.tsv"] = _tsv(["position", "level", "pass", "fired", "refused"], rows)
    files["refusals.txt"] = _refusals_text(g)
    files["groups.txt"] = _groups_text(g)
    for i, k in enumerate(g.kernels):
        at = _kernel_folder(i, k)
        files[f"{at}/kernel.loop"] = k.loop_text
        files[f"{at}/plan.json"] = k.plan_json
        if k.standalone or k.language == "triton":
            files[f"{at}/kernel.py"] = k.standalone or k.source
        if k.language == "cpp":
            files[f"{at}/kernel.cpp"] = k.source
        if k.tuning:
            files[f"{at}/tuning.tsv"] = _tsv(["predicted_us", "plan"], [[p, plan] for plan, p, _ in k.tuning])
    files["program.py"] = g.program
    files["repro.py"] = g.repro
    return {path: _ended(clean(text)) for path, text in files.items()}


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


# files


@dataclass
class _Dump:
    """One dump folder, written by this process alone (it holds the lock on the marker)."""

    root: Path
    config: Config
    lock_file: int
    started: float = field(default_factory=time.monotonic)
    graphs: list[GraphRecord] = field(default_factory=list)
    sections: list[tuple[str, str, str]] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def add(self, g: GraphRecord) -> Path:
        index = len(self.graphs)
        name = re.sub(r"^g\d+_", "", g.name)
        folder = path_component(f"g{index}_{name}", self.taken)
        while (self.root / folder).exists() or (self.root / folder).is_symlink():  # somebody else's: leave it
            folder = path_component(f"g{index}_{name}", self.taken)
        # under another name until complete, so that a reader never sees half a graph
        building = self.root / f".g{index}.tmp"
        shutil.rmtree(building, ignore_errors=True)
        for path, text in graph_files(g).items():
            target = building / path
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8", errors="backslashreplace")
        building.rename(self.root / folder)
        self.graphs.append(g)
        heading = clean(f"g{index} {name} ({g.stage})")
        self.sections.append((f"g{index}", heading, clean(html.graph_section(g, folder))))
        text = clean(summary(self.graphs))
        self._replace("SUMMARY.txt", text)
        self._replace("report.html", html.page("fusionc report", text, self.sections))
        self.write_timings()
        self.log(f"wrote {folder}: {len(g.kernels)} kernels, {sum(g.timings.values()):.3f} s of compilation")
        return self.root / folder

    def write_timings(self) -> None:
        rows: list[list[Any]] = []
        for i, g in enumerate(self.graphs):
            rows += [[f"g{i}", "stage_s", what, f"{s:.6f}"] for what, s in g.timings.items()]
            rows += [[f"g{i}", "pass_s", p.name, f"{p.seconds:.6f}"] for p in g.passes]
            for j, k in enumerate(g.kernels):
                name = _kernel_folder(j, k)
                if k.measured_us is not None:
                    rows.append([f"g{i}", "kernel_us", name, f"{k.measured_us:.3f}"])
                rows.append([f"g{i}", "from_cache", name, int(k.from_cache)])
                rows += [[f"g{i}", "tuned_us", f"{name} {plan}", us] for plan, _, us in k.tuning if us is not None]
        self._replace("timings.tsv", _tsv(["graph", "kind", "what", "value"], rows))

    def log(self, message: str) -> None:
        line = f"{time.monotonic() - self.started:9.3f} s  {' '.join(message.split())}\n"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(self.root / "run.log", flags, 0o600)
        try:
            os.write(fd, line.encode("utf-8", "backslashreplace"))
        finally:
            os.close(fd)

    def _replace(self, name: str, text: str) -> None:
        temporary = self.root / f".{name}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.chmod(0o600)
        temporary.replace(self.root / name)


_lock = threading.RLock()
_open: dict[tuple[str, int], _Dump] = {}


def _guarded(config: Config, do: Callable[[_Dump], _T]) -> _T | None:
    if config.dump is None:
        return None
    try:
        with _lock:
            return do(_session(config))
    except Exception as e:  # noqa: BLE001 - a dump is a convenience; the compilation must not fail for it
        text = f"fusionc could not write the dump to {config.dump}: {type(e).__name__}: {e}. Compilation goes on."
        warn_once(f"dump {config.dump}", text)
        return None


def _session(config: Config) -> _Dump:
    assert config.dump is not None
    # a forked child gets its own folder: the parent still holds the lock
    key = (os.path.abspath(config.dump), os.getpid())
    if key not in _open:
        if not _open:
            atexit.register(_at_exit)
        _open[key] = _start(config, Path(key[0]))
    return _open[key]


def _start(config: Config, root: Path) -> _Dump:
    """Take ``root``, or ``root/p2``, ``root/p3`` … while other live processes (ranks, workers) hold the earlier ones."""
    for number in range(1, 10_000):
        folder = root if number == 1 else root / f"p{number}"
        _private(folder)
        fd = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        if _try_lock(fd):
            break
        os.close(fd)
    else:
        raise OSError("too many processes write to this dump")
    _remove_old(folder)
    dump = _Dump(folder, config, fd)
    dump._replace("config.json", json.dumps({"config": config.to_json(), "versions": _versions()}, indent=2) + "\n")
    dump.log("dump started")
    return dump


def _private(folder: Path) -> None:
    """Make ``folder`` ours alone. A folder that held other files before keeps its mode; another user's is refused."""
    new = not folder.exists()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{folder} is not a folder")
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    if new or (folder / MARKER).exists() or not any(folder.iterdir()):
        folder.chmod(0o700)


def _try_lock(fd: int) -> bool:
    try:
        import fcntl
    except ImportError:  # no flock on this system: one writer is assumed
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return True
    return True


def _remove_old(folder: Path) -> None:
    """Remove what an earlier process dumped here, and nothing else: a stale graph would spoil a diff."""
    if not (folder / "config.json").is_file():  # never finished a start here, so what looks like a graph is not ours
        return
    for entry in list(folder.iterdir()):
        if entry.is_symlink():
            continue
        if entry.is_dir() and _GRAPH_FOLDER.fullmatch(entry.name) and (entry / "passes.tsv").exists():
            shutil.rmtree(entry)
        elif entry.is_file() and entry.name in _FILES:
            entry.unlink()


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("fusionc", "torch", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _at_exit() -> None:
    # kernels are measured after their graph was dumped; the last word on times is written when the process ends
    for (_, pid), dump in list(_open.items()):
        if pid == os.getpid():
            try:
                dump.write_timings()
            except Exception:  # noqa: BLE001 - the folder may be gone (a test's temporary folder): nothing to tell
                continue
