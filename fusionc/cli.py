"""The ``fusionc`` command: what the compiler does, from outside.

Each subcommand is a function that returns (exit status, JSON value, text); ``--json`` prints the one, else the other is
printed.  Files that are named on the command line and are Python programs (``explain``, ``check``, ``reduce``) are run;
graph files, dumps and cache files are only read.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fusionc
from fusionc.errors import FusioncError
from fusionc.explanation import Explanation, explain, explain_with
from fusionc.record import name_kernels

__all__ = ["Explanation", "explain", "explain_with", "main"]

Result = tuple[int, Any, str]
_RUN_FILES = ("timings.tsv", "run.log")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status (2: the command could not be carried out)."""
    args = _parser().parse_args(argv)
    try:
        status, value, text = args.run(args)
    except (FusioncError, OSError, UnicodeDecodeError) as e:
        status, value, text = 2, {"error": str(e)}, f"fusionc {args.command}: {e}"
        if not args.json:
            print(text, file=sys.stderr)
            return status
    shown = json.dumps(value, indent=2, sort_keys=True, default=str) if args.json else text.rstrip("\n")
    encoding = sys.stdout.encoding or "utf-8"  # what a terminal of ASCII cannot show (µ, ·, →) becomes a question mark
    try:
        if shown:
            print(shown.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:  # the reader (head, less) has seen enough; keep Python's last flush quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(status)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON value")
    parser = argparse.ArgumentParser(prog="fusionc", description="Look into the fusionc compiler.")
    parser.add_argument("--version", action="version", version=f"fusionc {fusionc.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], Result], text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text, parents=[common])
        p.set_defaults(run=run)
        return p

    p = command("explain", _explain, "Compile a function or model, call it once, and say what was fused and why not.")
    p.add_argument(
        "target",
        metavar="MODULE:CALLABLE",
        help="a function, a module, or a function without arguments that returns (f, args) or (f, args, kwargs)",
    )
    p.add_argument(
        "--input", action="append", default=[], metavar="SHAPE[:DTYPE]", help="random tensor, as 2x16:float32"
    )
    p.add_argument("--mode", help="mode of torch.compile")
    p.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="backend option, value as JSON")
    p.add_argument("--no-grad", action="store_true", help="explain inference")

    p = command("opt", _opt, "Run passes on a graph file and print the result.")
    p.add_argument("file", metavar="FILE.graph")
    p.add_argument("--pass", dest="passes", action="append", metavar="NAME", help="default: the whole graph pipeline")
    p.add_argument("--diff", action="store_true", help="print a unified diff instead")

    p = command("lower", _lower, "Group and lower a graph file; print loops and sources of its kernels.")
    p.add_argument("file", metavar="FILE.graph")
    p.add_argument("--target", default="auto")
    p.add_argument("--stage", default="inference", choices=["inference", "forward", "backward"])

    p = command("check", _check, "Run a repro.py: does fusionc agree with eager?")
    p.add_argument("file", metavar="REPRO.py")
    p.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")

    p = command("reduce", _reduce, "Cut a failing repro.py down to what still fails.")
    p.add_argument("file", metavar="REPRO.py")
    p.add_argument("-o", "--output", metavar="FILE", help="default: REPRO.min.py beside it")
    p.add_argument("--isolate", action="store_true", help="a process for each try: for graphs that crash (slow)")

    p = command("diff", _diff, "Compare two dumps; times and logs are left out.")
    p.add_argument("a", metavar="A")
    p.add_argument("b", metavar="B")

    p = command("passes", _passes, "List the passes, or describe one.")
    p.add_argument("name", nargs="?", metavar="NAME")

    p = command("cache", _cache, "Look after the kernel cache.")
    p.add_argument("action", choices=["path", "list", "show", "verify", "prune", "clear", "export", "import"])
    p.add_argument(
        "argument", nargs="?", help="show: start of an entry's name; export, import: a tar file; prune: bytes"
    )
    p.add_argument("--dir", help="the cache folder; default: the user's")
    p.add_argument("--no-binaries", action="store_true", help="import plans and sources only")

    command("env", _env, "Print versions, devices, compiler and settings.")
    return parser


# explain


def _explain(args: argparse.Namespace) -> Result:
    from fusionc.config import Config

    options = dict(_option(text) for text in args.option)
    Config.parse(args.mode, options)  # a wrong option should be told before the model is loaded
    f, inputs, kwargs = _target(args.target, [_input(text) for text in args.input])
    import torch

    with torch.set_grad_enabled(not args.no_grad):
        found = explain_with(f, inputs, kwargs, mode=args.mode, options=options)
    return 0, found.to_json(), str(found)


def _option(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign:
        raise FusioncError(f"--option {text!r} must have the form KEY=VALUE.")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, {"True": True, "False": False, "None": None}.get(value, value)


def _input(text: str) -> Any:
    import torch

    shape, _, dtype = text.partition(":")
    kind = getattr(torch, dtype or "float32", None)
    try:
        sizes = [int(n) for n in shape.split("x") if n]
    except ValueError:
        sizes = [-1]
    if not isinstance(kind, torch.dtype) or any(n < 0 for n in sizes):
        raise FusioncError(f"--input {text!r} must have the form 2x16:float32.")
    generator = torch.Generator().manual_seed(0)
    if kind.is_floating_point or kind.is_complex:
        return torch.randn(sizes, generator=generator).to(kind)
    return torch.randint(0, 2, sizes, generator=generator).to(kind)


def _target(text: str, inputs: list[Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    """The callable that ``MODULE:CALLABLE`` names, with its arguments."""
    name, sign, path = text.partition(":")
    if not sign or not name or not path:
        raise FusioncError(f"{text!r} must have the form MODULE:CALLABLE, as in models.llama:build.")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as e:
        raise FusioncError(f"there is no module {e.name!r} here (searched the current folder and sys.path).") from e
    for part in path.split("."):
        if not hasattr(found, part):
            raise FusioncError(f"{name} has no {path!r}.")
        found = getattr(found, part)
    if not callable(found):
        raise FusioncError(f"{text} is not callable.")
    if inspect.isclass(found):
        needed = _needed(found)
        if needed:
            raise FusioncError(f"{text} needs arguments ({', '.join(needed)}); name a function that makes one and its inputs.")
        found = found()
    if inputs:
        return found, inputs, {}
    needed = _needed(found)
    if needed:
        raise FusioncError(f"{text} needs arguments ({', '.join(needed)}); give --input for each.")
    made = found()
    if isinstance(made, tuple) and len(made) in (2, 3) and callable(made[0]):
        positional = made[1] if isinstance(made[1], (tuple, list)) else (made[1],)
        return made[0], list(positional), dict(made[2]) if len(made) == 3 else {}
    return found, [], {}


def _needed(f: Any) -> list[str]:
    """Names of the parameters that ``f`` cannot be called without, as far as can be told."""
    try:
        needed = [p for p in inspect.signature(f).parameters.values() if p.default is p.empty]
    except (TypeError, ValueError):
        return []
    return [p.name for p in needed if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


# graph files


def _needs(module: str, name: str) -> Any:
    """An attribute of a module of fusionc that may be missing in this version."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise FusioncError(f"this command needs {module}.{name}, which cannot be used: {e}.") from e


def _read_graph(path: str) -> Any:
    text = Path(path).read_text(encoding="utf-8")
    parse = _needs("fusionc.graph.text", "parse")
    try:
        return parse(text)
    except FusioncError:
        raise
    except Exception as e:  # a parser may fail in many ways on a file that is not a graph
        raise FusioncError(f"{path} is not a graph that fusionc can read: {e}") from e


def _opt(args: argparse.Namespace) -> Result:
    from fusionc.config import Config

    gm = _read_graph(args.file)
    show, run, pipeline = (
        _needs("fusionc.graph.text", "show"),
        _needs("fusionc.passes", "run"),
        _needs("fusionc.passes", "pipeline"),
    )
    config = Config.parse()
    every = [*pipeline("model", config), *pipeline("graph", config)]
    chosen = pipeline("graph", config)
    if args.passes:
        known = {item.name: (position, item) for position, item in every}
        for name in args.passes:
            if name not in known:
                raise FusioncError(f"there is no pass {name!r}. Passes: {', '.join(sorted(known))}.")
        chosen = [known[name] for name in args.passes]
    before = show(gm)
    records = []
    for position, item in chosen:
        gm, more = run([(position, item)], gm, item.level, config)
        records += more
    after = show(gm)
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="")
    notes = [f"# {r.name}: fired {r.fired}" for r in records if r.fired]
    notes += [f"# {x.pass_name} refused at {x.node or '-'}: {x.reason}" for r in records for x in r.refusals]
    text = "\n".join(lines) if args.diff else after
    passes = [{"name": r.name, "fired": r.fired, "refusals": [[x.node, x.reason] for x in r.refusals]} for r in records]
    return 0, {"graph": after, "passes": passes}, "\n".join([text.rstrip("\n"), *notes])


def _lower(args: argparse.Namespace) -> Result:
    from fusionc.config import Config

    gm = _read_graph(args.file)
    compile_graph = _needs("fusionc.compiler", "compile_graph")
    inputs = [n.meta.get("val", n.meta.get("example_value")) for n in gm.graph.nodes if n.op == "placeholder"]
    # texts of kernels are kept only where a dump is wanted; compile_graph itself writes none
    config = Config.parse(None, {"target": args.target, "dump": os.devnull})
    _, record = compile_graph(gm, inputs, config, args.stage)
    name_kernels(record)
    parts = []
    for g in record.groups:
        parts.append(f"{g.name}: {g.kind}, kernel {g.kernel}: {' '.join(g.nodes)}")
    for c in record.calls:
        parts.append(f"{c.node}: library call {c.op}" + (f" because {c.reason}" if c.reason else ""))
    for k in record.kernels:
        parts.append(
            f"\n== {k.name} ({k.language}) ==\n{k.loop_text}\n-- plan --\n{k.plan_json}\n-- source --\n{k.source}"
        )
    return 0, record.to_json(), "\n".join(parts)


# repros


def _check(args: argparse.Namespace) -> Result:
    path = Path(args.file)
    if not path.is_file():
        raise FusioncError(f"there is no file {args.file}.")
    try:
        done = subprocess.run(
            [sys.executable, str(path)], capture_output=True, text=True, timeout=args.timeout, check=False
        )
    except subprocess.TimeoutExpired:
        text = f"did not finish in {args.timeout:g} s"
        return 1, {"ok": False, "status": None, "output": text}, f"FAILS: {text}"
    ok, output = done.returncode == 0, (done.stdout + done.stderr).strip()
    how = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    text = f"{'ok' if ok else f'FAILS ({how})'}\n{output}"
    return 0 if ok else 1, {"ok": ok, "status": done.returncode, "output": output}, text


def _reduce(args: argparse.Namespace) -> Result:
    from fusionc import repro

    path = Path(args.file)
    gm, specs, options = repro.load(path)
    fails = repro.fails_alone if args.isolate else repro.fails
    start = len(gm.graph.nodes)

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    gm, specs = repro.reduce(gm, specs, lambda g, s: fails(g, s, options), say)
    out = Path(args.output) if args.output else path.with_suffix(".min.py")
    text = repro.repro_source(gm, specs, options)
    out.write_text(text, encoding="utf-8")
    end = len(gm.graph.nodes)
    return (
        0,
        {"nodes_before": start, "nodes_after": end, "file": str(out)},
        f"{start} nodes -> {end} nodes: {out}\n{text}",
    )


# dumps


def _diff(args: argparse.Namespace) -> Result:
    trees = []
    for root in (args.a, args.b):
        folder = Path(root)
        if not (folder / "config.json").is_file():
            raise FusioncError(f"{root} is not a dump: it has no config.json.")
        files = (
            p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink() and not p.name.startswith(".")
        )
        trees.append({str(p.relative_to(folder)): p for p in files if p.name not in _RUN_FILES})
    a, b = trees
    only_a, only_b = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    changed: dict[str, list[str]] = {}
    for name in sorted(a.keys() & b.keys()):
        old, new = a[name].read_bytes(), b[name].read_bytes()
        if old != new:
            was, now = (t.decode("utf-8", "replace").splitlines() for t in (old, new))
            changed[name] = list(difflib.unified_diff(was, now, f"a/{name}", f"b/{name}", n=2, lineterm=""))
    same = not (only_a or only_b or changed)
    text = [f"only in {args.a}: {n}" for n in only_a] + [f"only in {args.b}: {n}" for n in only_b]
    for name, lines in changed.items():
        # the page repeats what the other files say
        text += [f"{name} differs"] if name == "report.html" else lines
    value = {"equal": same, "only_a": only_a, "only_b": only_b, "changed": changed}
    return 0 if same else 1, value, "\n".join(text) if text else "the dumps are equal (but for times)"


# passes, cache, environment


def _passes(args: argparse.Namespace) -> Result:
    steps = _needs("fusionc.passes", "PIPELINE")
    rows = []
    for s in steps:
        if s.item is not None:
            doc = inspect.getdoc(inspect.getmodule(type(s.item))) or ""
            rows.append(
                {
                    "position": s.position,
                    "name": s.item.name,
                    "level": s.level,
                    "exactness": str(s.item.exactness),
                    "summary": doc.split("\n", 1)[0],
                    "why_here": s.word,
                    "doc": doc,
                }
            )
    if args.name is None:
        text = [
            f"{r['position']:3d}  {r['level']:5s}  {r['name']:24s} {r['exactness']:24s} {r['summary']}" for r in rows
        ]
        return 0, rows, "\n".join(text)
    found = [r for r in rows if r["name"] == args.name]
    if not found:
        close = difflib.get_close_matches(args.name, [r["name"] for r in rows], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise FusioncError(f"there is no pass {args.name!r}.{hint} Passes: {', '.join(r['name'] for r in rows)}.")
    r = found[0]
    head = f"{r['name']}  ({r['level']} level, position {r['position']}, {r['exactness']})\nhere: {r['why_here']}\n"
    return 0, r, f"{head}\n{r['doc']}"


def _cache(args: argparse.Namespace) -> Result:
    from fusionc.config import Config

    config = Config.parse(None, {"cache": args.dir} if args.dir else None)
    cache = _needs("fusionc.runtime.cache", "open_cache")(config.cache)
    where = str(cache.root) if cache.root else "memory only"
    word = args.argument
    if word is None and args.action in ("show", "export", "import"):
        raise FusioncError(f"fusionc cache {args.action} needs an argument (see fusionc cache --help).")
    if args.action == "path":
        return 0, {"root": where}, where
    if args.action == "list":
        entries = cache.entries()
        size = sum(e.size for e in entries)
        rows = [{"kind": e.kind, "name": e.name, "size": e.size, "used": e.used} for e in entries]
        text = [f"{e.size:10d}  {e.kind:10s} {e.name}" for e in entries]
        value: Any = {"root": where, "entries": rows, "bytes": size}
        return 0, value, "\n".join([*text, f"{len(entries)} files, {size} bytes in {where}"])
    if args.action == "show":
        found = cache.show(word)
        return (
            0 if found else 1,
            found,
            json.dumps(found, indent=2, sort_keys=True) if found else f"no entry starts with {word!r}",
        )
    if args.action == "verify":
        problems = cache.verify()
        text = problems or [f"every file in {where} is sound"]
        return 1 if problems else 0, {"root": where, "problems": problems}, "\n".join(text)
    if args.action in ("prune", "clear"):
        if word is not None and not (args.action == "prune" and word.isdigit()):
            raise FusioncError(f"fusionc cache {args.action} does not take {word!r}.")
        removed = cache.clear() if args.action == "clear" else cache.prune(int(word) if word is not None else None)
        return 0, {"root": where, "removed": removed}, f"removed {removed} files from {where}"
    if args.action == "export":
        count = cache.export_tar(word)
        return 0, {"file": word, "count": count}, f"wrote {count} files to {word}"
    import tarfile

    try:
        count, refused = cache.import_tar(word, binaries=not args.no_binaries)
    except tarfile.TarError as e:
        raise FusioncError(f"{word} is not a cache export: {e}.") from e
    text = [f"took {count} files into {where}", *(f"refused {r}" for r in refused)]
    return 1 if refused else 0, {"count": count, "refused": refused}, "\n".join(text)


def _env(args: argparse.Namespace) -> Result:
    import platform

    import torch

    from fusionc.config import ENVIRONMENT, Config
    from fusionc.dump import _versions

    value: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform(), **_versions()}
    value["threads"] = torch.get_num_threads()
    value["cuda"] = torch.version.cuda
    value["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        value["compiler"] = _needs("fusionc.runtime.compile_cpp", "compiler_identity")()
    except Exception as e:  # no compiler is an answer, not an error
        value["compiler"] = f"none: {e}"
    value["variables"] = {v: os.environ[v] for v in sorted(ENVIRONMENT.values()) if v in os.environ}
    try:
        value["config"] = Config.parse().to_json()
    except FusioncError as e:
        value["config"] = f"invalid: {e}"
    try:
        root = _needs("fusionc.runtime.cache", "open_cache")(Config.parse().cache).root
        value["cache"] = str(root) if root else "memory only"
    except Exception as e:  # as above
        value["cache"] = f"none: {e}"
    width = max(map(len, value))
    return 0, value, "\n".join(f"{k:{width}s}  {v}" for k, v in value.items())


if __name__ == "__main__":
    raise SystemExit(main())
