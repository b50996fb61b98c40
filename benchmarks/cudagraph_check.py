"""CUDA graphs: right results in every situation we thought of, and what a call costs with and without them.

    python -m benchmarks.cudagraph_check                    # checks, then times; one CUDA device
    python -m benchmarks.cudagraph_check --only nothing --ways ours,trees,inductor      # these times only

Times compare eager, the plain Program, the Program with our runner, the same Program under torch's CUDA-graph trees
(``torch._inductor.cudagraph_trees``, used as a library) and Inductor in mode "reduce-overhead".  "host" is the time that a
call keeps the CPU when nothing waits, "wall" that of calls one after the other, "program" the host time of the callable
below Dynamo and AOTAutograd alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fusionc.backend import fusionc
from fusionc.runtime import cudagraph

CHECKS: list[Callable[[], str | None]] = []
_saved: dict[str, Any] = {}  # of the last compiled graph: "call", "runner", "args"
_cache = tempfile.TemporaryDirectory(prefix="cudagraph-check-")
_trees = False


def check(f: Callable[[], str | None]) -> Callable[[], str | None]:
    CHECKS.append(f)
    return f


def fuse(f: Any, graphs: Any = True, dynamic: bool | None = False) -> Any:
    """`f` compiled by fusionc with this setting of `cudagraphs`; kernels and Programs are cached for this run only."""
    return torch.compile(f, backend=fusionc, dynamic=dynamic, options={"cudagraphs": graphs, "cache": _cache.name})


def watch_wrap() -> None:
    """Keep what `cudagraph.wrap` sees, and put torch's trees in the place of our runner if asked."""
    real = cudagraph.wrap

    def wrap(call: Any, program: Any, record: Any, config: Any, device: Any, target: str, *more: Any) -> Any:
        made = _under_trees(call, record) if _trees else real(call, program, record, config, device, target, *more)
        _saved.update(call=call, made=made, runner=getattr(made, "cudagraph", None), args=None, record=record)

        def first(args: list[Any]) -> Any:
            if _saved["args"] is None:
                _saved["args"] = list(args)
            return made(args)

        return first

    cudagraph.wrap = wrap


def _under_trees(call: Any, record: Any) -> Any:
    from torch._inductor.cudagraph_trees import cudagraphify_impl

    state: dict[str, Any] = {"calls": 0, "ids": None, "fixed": None, "run": None}

    def boxed(args: list[Any]) -> Any:
        return list(call(args))

    boxed._boxed_call = True  # type: ignore[attr-defined]

    def run(args: list[Any]) -> Any:
        if state["run"] is not None:
            return state["run"](args)
        state["calls"] += 1
        ids = [id(a) for a in args]
        if state["calls"] == 3:
            fixed = [k for k, (a, b) in enumerate(zip(ids, state["ids"])) if a == b]
            record.cudagraph = f"trees, {len(fixed)} static"
            state["run"] = cudagraphify_impl(
                boxed, list(args), fixed, device_index=0, is_backward=False, is_inference=True,
                stack_traces=[None] * state["results"],
            )  # fmt: skip
            return state["run"](args)
        state["ids"] = ids
        results = call(args)
        state["results"] = len(results)
        return results

    return run


def same(got: Any, want: Any, what: str) -> None:
    """Bit for bit: with and without a graph the same kernels run."""
    if not torch.equal(got, want):
        raise AssertionError(f"{what}: largest difference {(got.float() - want.float()).abs().max().item():.3g}")


def replays(expect: int = 1) -> str:
    runner = _saved["runner"]
    if runner is None or runner.counts["replays"] < expect:
        raise AssertionError(f"no replay: {_saved['record'].cudagraph} {runner and runner.counts}")
    return f"{runner.counts}"


def llama(layers: int = 4, seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
                         num_key_value_heads=3, vocab_size=49152, max_position_embeddings=512)  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


def decode(step: Any, model: Any, cache: Any, count: int) -> list[torch.Tensor]:
    with torch.no_grad():
        cache.reset()
        prompt = torch.arange(8, device="cuda")[None]
        logits = [model(prompt, past_key_values=cache, logits_to_keep=1).logits]
        for _ in range(count):
            token = logits[-1][:, -1].argmax(-1, keepdim=True)
            logits.append(step(token, past_key_values=cache, logits_to_keep=1).logits)
    return logits


# -- checks -----------------------------------------------------------------------------------------------------------


@check
def decode_loop() -> str:
    """All logits of a decode loop are kept and compared afterwards; a second cache; weights scaled in place."""
    from transformers import StaticCache

    model = llama()
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(3)]
    plain = fuse(model, False)
    want = decode(plain, model, caches[0], 20)
    torch._dynamo.reset()
    step = fuse(model)
    for number, cache in enumerate((caches[1], caches[2], caches[1])):
        for k, (a, b) in enumerate(zip(decode(step, model, cache, 20), want, strict=True)):
            same(a, b, f"cache {number}, token {k}")
    said = f"{replays(40)}; {_saved['record'].cudagraph}"
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    changed = decode(step, model, caches[1], 20)
    torch._dynamo.reset()
    for a, b in zip(changed, decode(fuse(model, False), model, caches[0], 20), strict=True):
        same(a, b, "weights scaled")
    return said


@check
def weights_replaced() -> str:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).cuda().eval()
    other = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).cuda().eval()
    step = fuse(model)
    with torch.no_grad():
        for turn in range(5):
            for _ in range(6):
                x = torch.randn(8, 64, device="cuda")
                torch.testing.assert_close(step(x), model(x), rtol=1e-4, atol=1e-5)
            if turn == 0:
                model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))
            elif turn == 1:
                model.load_state_dict(other.state_dict(), assign=True)
            elif turn == 2:
                model[2].weight.data = torch.randn_like(model[2].weight)
            elif turn == 3:
                model[2].bias.add_(1)
    return replays(10)


@check
def several_shapes_and_inference_mode() -> str:
    f = fuse(lambda x, w: (torch.softmax(x @ w, -1), x.t(), (x * 2)[0]), dynamic=False)
    w = torch.randn(32, 48, device="cuda")
    with torch.inference_mode():
        w2 = w.clone()
        for k in range(12):
            for n in (1, 5, 16):
                x = torch.randn(n, 32, device="cuda")
                a, b, c = f(x, w if k % 2 else w2)
                torch.testing.assert_close(a, torch.softmax(x @ w, -1), rtol=1e-4, atol=1e-5)
                same(b, x.t(), "view")
                same(c, (x * 2)[0], "select")
                if b.data_ptr() != x.data_ptr():
                    raise AssertionError("a view of an input was copied")
    return replays(2)


@check
def random_numbers() -> str:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5, True) + torch.rand_like(x) * 0.1 + x.sin()

    outs = []
    for graphs in (False, True):
        torch._dynamo.reset()
        g = fuse(f, graphs)
        torch.manual_seed(3)
        with torch.no_grad():
            outs.append([g(torch.ones(1000, device="cuda")) for _ in range(8)])
            torch.manual_seed(4)
            outs[-1].append(g(torch.ones(1000, device="cuda")))
            outs[-1].append(torch.rand(8, device="cuda"))
    for k, (a, b) in enumerate(zip(*outs, strict=True)):
        same(a, b, f"call {k}")
    return replays(5)


@check
def written_buffers() -> str:
    models = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    step = fuse(models[0])
    with torch.no_grad():
        for _ in range(8):
            x = torch.randn(2, 3, 16, 16, device="cuda")
            torch.testing.assert_close(step(x), models[1](x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(models[0][1].running_var, models[1][1].running_var)
    if int(models[0][1].num_batches_tracked) != 8:
        raise AssertionError("batches were not counted")
    return f"{_saved['record'].cudagraph}"


@check
def recording_that_fails() -> str:
    def f(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        x = x + 1
        x[m] = torch.zeros(1, device="cuda").expand(4)[:4]  # waits for the GPU inside of the operator
        return x.sin()

    g = fuse(f)
    m = torch.zeros(64, dtype=torch.bool, device="cuda")
    m[:4] = True
    x = torch.randn(64, device="cuda")
    with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(5):
            same(g(x, m), f(x, m), "plain after failure")
    said = _saved["record"].cudagraph
    torch.rand(8, device="cuda")  # the generator works again
    big = [torch.empty(1 << 20, device="cuda") for _ in range(4)]
    del big
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    random_numbers()  # and recording does
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        h = fuse(lambda x: torch.nonzero(x) + 1)
        for _ in range(4):
            h(x)
    return f"{said}; {_saved['record'].cudagraph}; warned {len(seen)}"


@check
def threads_and_streams() -> str:
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(8)]).cuda().eval()
    step = fuse(model)
    small = fuse(lambda x: (x.sin() + 1).softmax(-1))
    with torch.no_grad():
        for _ in range(4):
            step(torch.randn(4, 128, device="cuda"))
            small(torch.randn(4, 128, device="cuda"))
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            kept = []
            for _ in range(60):
                x = torch.randn(4, 128, device="cuda", generator=generator)
                kept.append((x, step(x), small(x)))
            torch.cuda.current_stream().synchronize()
            for x, y, z in kept:
                if not torch.allclose(y, model(x), 1e-4, 1e-5) or not torch.allclose(z, (x.sin() + 1).softmax(-1), 1e-4):
                    wrong.append(str(seed))
                    break

    torch.cuda.synchronize()
    pool = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in pool:
        t.start()
    for t in pool:
        t.join()
    if wrong:
        raise AssertionError(f"wrong in threads {wrong}")
    return replays(100)


@check
def recording_of_the_user() -> str:
    g = fuse(lambda x: (x.sin() + 1).cumsum(-1))
    x = torch.randn(64, device="cuda")
    with torch.no_grad():
        for _ in range(6):
            g(x)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = g(x)
        x.copy_(torch.randn(64, device="cuda"))
        graph.replay()
        torch.testing.assert_close(y, (x.sin() + 1).cumsum(-1), rtol=1e-4, atol=1e-4)
    return replays(2)


@check
def automatic() -> str:
    said = []
    with torch.no_grad():
        small = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(12)]).cuda().eval()
        g = fuse(small, "auto")
        for _ in range(40):
            x = torch.randn(4, 64, device="cuda")
            torch.testing.assert_close(g(x), small(x), rtol=1e-4, atol=1e-4)
            torch.cuda.synchronize()
        said.append(_saved["record"].cudagraph)
        large = nn.Sequential(nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, 4096)).cuda().eval()
        g = fuse(large, "auto")
        for _ in range(20):
            g(torch.randn(8192, 4096, device="cuda"))
            torch.cuda.synchronize()
        said.append(_saved["record"].cudagraph)
    return " | ".join(said)


# -- times ------------------------------------------------------------------------------------------------------------


def host_and_wall(f: Callable[[], Any], batch: int = 4, rounds: int = 25) -> tuple[float, float]:
    host, wall = [], []
    for _ in range(rounds + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(batch):
            f()
        middle = time.perf_counter()
        torch.cuda.synchronize()
        host.append((middle - start) / batch)
        wall.append((time.perf_counter() - start) / batch)
    return 1e6 * statistics.median(host[3:]), 1e6 * statistics.median(wall[3:])


def times(chosen: list[str], layers: int) -> None:
    global _trees
    from transformers import StaticCache

    model = llama(layers)
    cache = StaticCache(config=model.config, max_cache_len=512)
    chain = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.LayerNorm(256)) for _ in range(8)]).cuda()
    chain = chain.to(torch.bfloat16).eval()
    token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    x = torch.randn(16, 256, device="cuda", dtype=torch.bfloat16)
    cases: list[tuple[str, Any, Callable[[Any], Any]]] = [
        ("chain of 8", chain, lambda s: s(x.clone())),
        (f"decode {layers} layers", model, lambda s: s(token.clone(), past_key_values=cache, logits_to_keep=1).logits),
    ]
    ways: list[tuple[str, Any]] = [("eager", None), ("program", False), ("ours", True), ("auto", "auto"), ("trees", True)]
    ways = [way for way in [*ways, ("inductor", "reduce-overhead")] if way[0] in chosen]
    print(f"{'':20}{'':10}{'host µs':>9}{'wall µs':>9}{'program µs':>12}")
    for title, module, call in cases:
        for name, setting in ways:
            try:
                if module is model:  # the cache has room for the calls of one way
                    decode(model, model, cache, 1)
                torch._dynamo.reset()
                _trees = name == "trees"
                _saved.clear()
                step = module
                if name == "inductor":
                    step = torch.compile(module, mode=setting, dynamic=False)
                elif name != "eager":
                    step = fuse(module, setting)
                below = float("nan")
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    for _ in range(12):
                        call(step)
                        torch.cuda.synchronize()
                    host, wall = host_and_wall(lambda step=step, call=call: call(step))
                    if _saved.get("args"):
                        made, given = _saved["made"], _saved["args"]
                        below = host_and_wall(lambda made=made, given=given: made(list(given)))[0]
                said = _saved["record"].cudagraph if _saved else ""
                print(f"{title:20}{name:10}{host:9.0f}{wall:9.0f}{below:12.0f}  {said[:170]}", flush=True)
            except Exception as e:
                print("".join(traceback.format_exc(limit=-3)))
                print(f"{title:20}{name:10} failed: {type(e).__name__}: {str(e)[:200]}", flush=True)
    _trees = False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ways", default="eager,program,ours,auto,trees,inductor", help="what to time, or nothing: ''")
    parser.add_argument("--only", default=[""], nargs="+", help="checks whose name contains one of these words")
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check")
        return 0
    watch_wrap()
    failed = 0
    for f in CHECKS:
        if not any(word in f.__name__ for word in args.only):
            continue
        torch._dynamo.reset()
        start = time.perf_counter()
        try:
            said = f()
            print(f"ok    {f.__name__} ({time.perf_counter() - start:.1f} s): {said}", flush=True)
        except Exception as e:
            failed += 1
            print("".join(traceback.format_exc(limit=-3)))
            print(f"FAIL  {f.__name__}: {type(e).__name__}: {str(e)[:300]}", flush=True)
    if args.ways:
        times(args.ways.split(","), args.layers)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
