"""Depthwise convolutions on a GPU: a large-kernel block against five peers, and a grid of sizes against the library.

    python -m benchmarks.conv --json conv.json                       # block (inference, training) and grid
    python -m benchmarks.conv --only block --sizes 31 --limit 60
    python -m benchmarks.conv --only grid --sizes 7 13 --budget 120
    python -m benchmarks.conv --device cpu --tiny                    # the same code paths without a GPU

The block is RepLKNet's before merging (depthwise K×K and 5×5, each with batch norm, summed, GELU; 32×256×56×56, bfloat16)
for contiguous and channels-last images. Its peers are eager in both layouts, Inductor, Inductor with
``layout_optimization=False`` and Inductor's max-autotune: no two of them are alike, for eager's contiguous kernel and
cuDNN's channels-last one differ by nine times, and Inductor chooses between them by rules of its own. What a row is
compared with is the best peer of its size in either layout. ``conv`` rows are the convolution alone, forward and both gradients.

The grid is one convolution with bias and GELU, batch 32, over {7 … 51} × {64, 128, 256, 512 channels at 112, 56, 28, 14
pixels} in both layouts, against eager and Inductor in both (``--peers eager`` leaves Inductor's 72 compilations out).

Every time is the better one of a call and of its replay from a CUDA graph, for all alike (calls over 30 ms are not replayed).

Each pair of case and compiler has its own process and time limit: Inductor may tune for minutes, cuDNN runs 0.1 s a
call. Processes compile side by side (``--jobs``) while only one at a time uses the GPU. Results are compared with
float64 (float32 for filters over 7×7) on inputs that nothing was tuned on; above twice eager's error is wrong, and the
command exits with 1 if anything was wrong or failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from .common import (
    Case,
    cache_environment,
    cell,
    check,
    compiled,
    first_line,
    geomean,
    machine,
    reference,
    step,
    table,
    write_json,
)
from .gpu import MARK, captured, locked

PEERS = ("eager", "inductor", "inductor-nolayout", "inductor:max-autotune")
OURS = "fusionc"
SIZES = (7, 13, 31)
GRID_SIZES = (7, 9, 11, 13, 17, 21, 27, 31, 51)
GRID_MAPS = ((64, 112), (128, 56), (256, 28), (512, 14))
LAYOUTS = ("nchw", "nhwc")


# ------------------------------------------------------------------------------------------------------- child process


def build(kind: str, size: int, layout: str, device: str, tiny: bool) -> Case:
    """block, block-train or conv-train (see the top) of one filter size and layout."""
    import torch
    from torch import nn

    from .common import randn
    from .gpu_workloads import Where, _lively_norms
    from .models import LargeKernelBlock

    batch, channels, pixels = (1, 4, 14) if tiny else (32, 256, 56)
    with Where(device, "tiny" if tiny else "full").building():
        if kind == "conv-train":
            module: nn.Module = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)
        else:
            module = _lively_norms(LargeKernelBlock(channels, size))
    train = kind.endswith("train")
    fmt = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    module = module.to(device=device, dtype=torch.bfloat16).train(train)

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        size = (batch, channels, pixels, pixels)
        made = [randn(*size, seed=seed + i, device=device, dtype=torch.bfloat16) for i in range(1 + train)]
        made = [t.contiguous(memory_format=fmt) for t in made]
        made[0].requires_grad_(train)
        return tuple(made)

    case = Case(module, inputs, train=train, cotangent=train)
    if device == "cuda" and size > 7 and not tiny:  # ATen's float64 kernels for such filters take tens of seconds
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        case.reference_dtype = torch.float32
    return case


def with_backend(fn: Callable[..., Any], spec: str) -> Callable[..., Any]:
    """``common.compiled`` and "inductor-nolayout"."""
    if spec == "inductor-nolayout":
        import torch

        return torch.compile(fn, backend="inductor", options={"layout_optimization": False})
    return compiled(fn, spec)


def milliseconds(run: Callable[[], Any], device: str, repeat: int) -> float:
    """Median of a call; slow ones are called a few times only."""
    import torch

    from .gpu import bench

    if device != "cuda":
        return bench(run, None, device, 1)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    once = start.elapsed_time(end)
    return once if once > 30 else bench(run, None, device, max(repeat, 1) if once < 1 else 10 * int(once + 1))


def best_milliseconds(run: Callable[[], Any], device: str, repeat: int) -> float:
    """Median of a call or, if that is less, of its replay from a CUDA graph: all compilers get both."""
    plain = milliseconds(run, device, repeat)
    if device != "cuda" or plain > 30:
        return plain
    try:
        return min(plain, milliseconds(captured(run), device, repeat))
    except Exception:  # it cannot be recorded
        return plain


def say(**values: Any) -> None:
    """One result line."""
    print(MARK + json.dumps(values), flush=True)


def child_case(kind: str, size: int, layout: str, spec: str, args: argparse.Namespace) -> None:
    """Checks and times one case under one compiler."""
    import torch

    cuda = args.device == "cuda"
    with locked(args.lock, shared=False):
        case = build(kind, size, layout, args.device, args.tiny)
        fn = with_backend(case.fn, spec)
        first, probe = case.inputs(100), case.inputs(7)
        start = time.perf_counter()
    if spec == OURS:
        from fusionc.runtime import tune

        tune.configure(level="off")
    if spec != "eager":  # compiling goes on side by side, but who times kernels is alone
        with locked(args.lock, shared=":" not in spec):
            step(case, fn, first)
    if spec == OURS:
        with locked(args.lock, shared=False):
            tune.configure(level="default")
            step(case, fn, first)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    with locked(args.lock, shared=False):
        out = step(case, fn, probe)
        eager = step(case, case.fn, probe)
        found = check(out, eager, reference(case, probe))
        del out, eager
        say(check=vars(found), compile_s=seconds)
        ms = best_milliseconds(lambda: step(case, fn, first), args.device, args.repeat_ms)
    say(check=vars(found), compile_s=seconds, ms=ms)


def grid_points(sizes: list[int], tiny: bool) -> list[tuple[int, int, int, str]]:
    """(filter, channels, pixels, layout)."""
    maps = ((4, 9),) if tiny else GRID_MAPS
    return [(k, c, p, layout) for k in sizes for c, p in maps for layout in LAYOUTS]


def _grid_inputs(point: tuple[int, int, int, str], device: str, tiny: bool, seed: int) -> list[Any]:
    import torch

    from .common import randn

    k, c, p, layout = point
    x = randn(2 if tiny else 32, c, p, p, seed=seed, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
    weight = randn(c, 1, k, k, seed=seed + 1, device=device, dtype=torch.bfloat16, scale=1 / k)
    return [x, weight, randn(c, seed=seed + 2, device=device, dtype=torch.bfloat16)]


def _grid_module(point: tuple[int, int, int, str], weight: Any, bias: Any) -> Any:
    from torch import nn

    k, c, _, _ = point
    conv = nn.Conv2d(c, c, k, padding=k // 2, groups=c).to(device=weight.device, dtype=weight.dtype)
    conv.weight.data.copy_(weight)
    conv.bias.data.copy_(bias)  # type: ignore[union-attr]
    return nn.Sequential(conv, nn.GELU()).eval()


def child_grid(args: argparse.Namespace) -> None:
    """Every Nth point of the grid under ours and the peers, beginning with the Ith (``--shard I N``)."""
    import torch

    start, cuda = time.monotonic(), args.device == "cuda"
    for point in grid_points(args.sizes or list(GRID_SIZES), args.tiny)[args.shard[0] :: args.shard[1]]:
        if time.monotonic() - start > args.budget:
            say(point=point, error="no time left")
            continue
        try:
            with torch.no_grad():
                with locked(args.lock, shared=True):  # nothing runs on the GPU while somebody times
                    x, weight, bias = _grid_inputs(point, args.device, args.tiny, 11)
                    module = _grid_module(point, weight, bias)
                fns = {"eager": module, OURS: compiled(module, OURS if cuda else "aot_eager")}
                if "inductor" in args.peers:
                    fns["inductor"] = compiled(module, "inductor")
                if cuda:
                    _compile_candidates(point, x, weight, bias)
                with locked(args.lock, shared=False):
                    if cuda:  # the tuner measures here, alone
                        _ours(point, x, weight, bias)
                choice = _choice()
                with locked(args.lock, shared=True):
                    fns[OURS](x)
                    if "inductor" in fns:
                        try:
                            fns["inductor"](x)
                        except Exception as error:  # a peer's failure loses the peer
                            del fns["inductor"]
                            print(f"Inductor, {point}: {first_line(error)}", file=sys.stderr)
                few = x[:2].contiguous(
                    memory_format=torch.channels_last if point[3] == "nhwc" else torch.contiguous_format
                )
                with locked(args.lock, shared=False):
                    sizes = {"padding": point[0] // 2, "groups": point[1]}
                    exact = torch.nn.functional.conv2d(few.double(), weight.double(), bias.double(), **sizes)
                    found = check([fns[OURS](x)[:2]], [module(x)[:2]], [torch.nn.functional.gelu(exact)])
                    times = {name: best_milliseconds(partial(f, x), args.device, args.repeat_ms) for name, f in fns.items()}
                say(point=point, ms=times, check=vars(found), choice=choice)
        except Exception as error:
            say(point=point, error=first_line(error))
        torch._dynamo.reset()


def _ours(point: tuple[int, int, int, str], x: Any, weight: Any, bias: Any) -> Any:
    """The operator that a compiled module calls, with the same arguments."""
    import torch

    from fusionc.ops import load

    load("depthwise_conv")
    taps = weight.squeeze(1).permute(1, 2, 0).float().contiguous()
    half = [point[0] // 2] * 2
    return torch.ops.fusionc.depthwise_conv(x, taps, bias, [1, 1], half, [1, 1], "gelu")


def _compile_candidates(point: tuple[int, int, int, str], x: Any, weight: Any, bias: Any) -> None:
    """What the tuner will compare, compiled without running anything."""
    import torch

    from fusionc.runtime import depthwise_conv as runtime

    k, c, p, layout = point
    half, last = (k // 2, k // 2), layout == "nhwc"
    shape = runtime.Shape(c, (p, p), (k, k), (1, 1), half, (1, 1), x.dtype, last, True, "gelu")
    for how in runtime.candidates(shape, x.shape[0]):
        runtime.prepare(how, shape, x.shape[0], torch.float32, bias.dtype, x.device)


def _choice() -> str:
    """What the tuner of the last convolution chose."""
    from fusionc.runtime.tune import history

    last = history()[-1] if history() else None
    return last.names[last.winner] if last is not None else ""


# ------------------------------------------------------------------------------------------------------ parent process


def spawn(arguments: list[str], caches: str, limit: float) -> list[dict[str, Any]]:
    """Result lines of a child; the last one tells of a crash or of the time limit."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.conv", *arguments], stdout=subprocess.PIPE, stderr=errors,
                                   text=True, start_new_session=True, env=os.environ | cache_environment(caches))  # fmt: skip
        stopped = ""
        try:
            out, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, _ = process.communicate()
            stopped = f"stopped after {limit:.0f} s"
        lines = [json.loads(line[len(MARK) :]) for line in out.splitlines() if line.startswith(MARK)]
        if process.returncode and not stopped:
            errors.seek(0)
            said = errors.read().strip().splitlines()
            stopped = (said[-1] if said else f"exit status {process.returncode}")[:160]
        return [*lines, {"error": stopped}] if stopped else lines


def run_block(args: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """Rows of the block and of the convolution's training step."""
    jobs = [(kind, size, layout, spec) for kind in args.kinds for size in args.sizes or SIZES for spec in args.peers
            for layout in LAYOUTS]  # fmt: skip

    def one(job: tuple[str, int, str, str]) -> dict[str, Any]:
        kind, size, layout, spec = job
        left = args.budget - (time.monotonic() - args.start)
        row = {"kind": kind, "size": size, "layout": layout, "backend": spec}
        if left < 10:
            return row | {"error": "no time left"}
        lines = spawn(["--child", kind, str(size), layout, spec, *args.rest], os.path.join(folder, spec.replace(":", "-")),
                      min(args.limit, left))  # fmt: skip
        for line in lines:
            row |= line
        print(f"[{time.monotonic() - args.start:4.0f} s] {kind} {size} {layout} {spec}: {cell(row.get('ms'))} ms "
              f"{row.get('error', '')}", flush=True)  # fmt: skip
        return row

    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(one, jobs))


def run_grid(args: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """Rows of the grid, from as many processes as compile side by side."""
    sizes = ["--sizes", *map(str, args.sizes or GRID_SIZES)]
    left = max(5.0, args.budget - (time.monotonic() - args.start))

    def one(i: int) -> list[dict[str, Any]]:
        arguments = ["--child-grid", *sizes, "--shard", str(i), str(args.jobs), "--budget", str(left), "--peers", *args.peers,
                     *args.rest]  # fmt: skip
        return spawn(arguments, os.path.join(folder, f"grid{i}"), left + 30)

    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [row for part in pool.map(one, range(args.jobs)) for row in part]
    order = grid_points(args.sizes or list(GRID_SIZES), args.tiny)
    return sorted(rows, key=lambda r: order.index(tuple(r["point"])) if "point" in r else len(order))


def block_table(rows: list[dict[str, Any]], peers: list[str]) -> str:
    """One line a kind, size and layout; the last column is the best peer in either layout over ours."""
    found = {(r["kind"], r["size"], r["layout"], r["backend"]): r for r in rows}
    lines = []
    for kind, size, layout in dict.fromkeys((r["kind"], r["size"], r["layout"]) for r in rows):
        of = [found.get((kind, size, layout, peer), {}) for peer in peers]
        others = [found.get((kind, size, each, peer), {}).get("ms") for each in LAYOUTS for peer in peers if peer != OURS]
        best, mine = min((m for m in others if m), default=None), found.get((kind, size, layout, OURS), {})
        lines.append([kind, f"{size}×{size}", layout, *(r.get("ms") or r.get("error", "–")[:24] for r in of),
                      mine.get("check", {}).get("ratio"), best / mine["ms"] if best and mine.get("ms") else None])  # fmt: skip
    return table(["case", "filter", "layout", *peers, "err×", "best peer / ours"], lines)


def grid_table(rows: list[dict[str, Any]]) -> str:
    """One line a point: every peer in both layouts, ours in both, and the best peer in either layout over ours."""
    found = {tuple(r["point"]): r for r in rows if "point" in r}
    lines = []
    for k, c, p in dict.fromkeys(point[:3] for point in found):
        both = [found.get((k, c, p, layout), {}) for layout in LAYOUTS]
        ms = [r.get("ms", {}) for r in both]
        best = min((t for m in ms for name, t in m.items() if name != OURS), default=None)
        mine = [m.get(OURS) for m in ms]
        lines.append([f"{k}×{k}", f"{c}@{p}", *(m.get(peer) for peer in ("eager", "inductor") for m in ms), *mine,
                      max((r.get("check", {}).get("ratio", 0.0) for r in both), default=None),
                      *(best / m if best and m else None for m in mine),
                      *(r.get("choice", r.get("error", ""))[:40] for r in both)])  # fmt: skip
    return table(["filter", "map", "eager nchw", "nhwc", "Inductor nchw", "nhwc", "ours nchw", "nhwc", "err×",
                  "best / nchw", "/ nhwc", "nchw by", "nhwc by"], lines)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.conv", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=("block", "grid"), help="one of the two parts")
    parser.add_argument("--sizes", type=int, nargs="+", help="filters; default: 7 13 31 for the block, nine for the grid")
    parser.add_argument("--kinds", nargs="+", default=["block", "conv-train", "block-train"], help="rows of the block")
    parser.add_argument("--peers", nargs="+", default=[OURS, *PEERS], help="compilers of the block")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each process of a case and compiler")
    parser.add_argument("--budget", type=float, default=1800, help="seconds in all")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile side by side")
    parser.add_argument("--repeat-ms", type=int, default=50, help="how long each is timed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to exercise this file")
    parser.add_argument("--json", help="where to write the results")
    for hidden, options in (("--child", {"nargs": 4}), ("--child-grid", {"action": "store_true"}), ("--lock", {}),
                            ("--shard", {"type": int, "nargs": 2})):  # fmt: skip
        parser.add_argument(hidden, help=argparse.SUPPRESS, **options)  # type: ignore[arg-type]
    args = parser.parse_args(argv)
    if args.child:
        kind, size, layout, spec = args.child
        child_case(kind, int(size), layout, spec, args)
        return 0
    if args.child_grid:
        child_grid(args)
        return 0
    args.start = time.monotonic()
    result: dict[str, Any] = {"machine": machine()}
    print(json.dumps(result["machine"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-conv-") as folder:
        args.rest = ["--lock", os.path.join(folder, "lock"), "--device", args.device, "--repeat-ms", str(args.repeat_ms),
                     *(["--tiny"] if args.tiny else [])]  # fmt: skip
        if args.only != "grid":
            result["block"] = run_block(args, folder)
            print(block_table(result["block"], args.peers), flush=True)
            write_json(args.json, result)
        if args.only != "block":
            result["grid"] = run_grid(args, folder)
            print(grid_table(result["grid"]), flush=True)
    rows = [*result.get("block", []), *result.get("grid", [])]
    mine = [r for r in rows if r.get("backend", OURS) == OURS]
    wrong = [r for r in rows if not r.get("check", {"ok": False})["ok"] and (r in mine or "error" not in r)]
    gains = [min(t for name, t in r["ms"].items() if name != OURS) / r["ms"][OURS] for r in result.get("grid", []) if r.get("ms")]
    slower = [gain for gain in gains if gain < 1 / 1.03]
    result |= {"wrong": len(wrong), "slower": len(slower), "grid_geomean": geomean(gains)}
    print(f"{len(rows)} rows, {len(wrong)} wrong or failed; grid: {cell(result['grid_geomean'])}× the best peer of the "
          f"same layout, {len(slower)} of {len(gains)} points slower")  # fmt: skip
    write_json(args.json, result)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
