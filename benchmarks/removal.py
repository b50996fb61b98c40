"""What removing attention sublayers buys: ranking time, parameter and cache bytes, prefill and decode, before and after.

    python -m benchmarks.removal --shape 13b                        # H200: 40 × 5120, random bf16 weights, 16 of 40 removed
    python -m benchmarks.removal --shape 8b                         # Llama-3-8B: 12 of 32
    python -m benchmarks.removal --parts score memory               # no compiling: half a minute
    python -m benchmarks.removal --device cpu --shape 13b --parts score      # one layer's weights stand in for all 40
    python -m benchmarks.removal --device cpu --shape tiny          # the same code paths in seconds

Speed needs only shapes, so weights are random.  The pruned model shares its weights with the whole one, and both decode with
the same cache, so that both fit and take turns: a figure is the median of its turns, the ratio that of the medians.
The regime (prompt, batch, context, attention kernel of the day) stands beside each number: the gain is the share of the time
that attention sublayers take, which is small at a short prefill and large where a cache is read.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .common import counts, machine, not_compiled, records, table

SHAPES: dict[str, dict[str, Any]] = {
    "13b": {"vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
            "num_attention_heads": 40, "num_key_value_heads": 40, "max_position_embeddings": 4096},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192},
    "tiny": {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}  # fmt: skip
REMOVED = {"13b": 16, "8b": 12, "tiny": 2}
PARTS = ("score", "memory", "prefill", "decode")
parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--device", default="cuda")
parser.add_argument("--shape", default="13b", choices=list(SHAPES))
parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
parser.add_argument("--removed", type=int, help="sublayers to remove (default 16 of 40, 12 of 32)")
parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
parser.add_argument(
    "--methods", nargs="+", help="weight scores to time (default: all on a GPU, heads and rope on a CPU)"
)
parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prefill (batch 1)")
parser.add_argument("--batch", type=int, default=32, help="sequences of the decode step")
parser.add_argument("--context", type=int, default=2048, help="tokens in the cache of the decode step")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--no-eager", action="store_true")
parser.add_argument("--json", metavar="FILE")


def say(*words: Any) -> None:
    """Print at once: a run that a time limit ends has said what it knew."""
    print(*words, flush=True)


def build(shape: dict[str, Any], device: str, shared: bool) -> nn.Module:
    """A Llama of this shape, bf16 on a GPU; with ``shared`` every layer is its own module around the first one's weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if shape["hidden_size"] < 100 else torch.bfloat16)
    try:
        with torch.device(device):
            model = models.llama(shape, **({"num_hidden_layers": 1} if shared else {}))
    finally:
        torch.set_default_dtype(before)
    if shared:
        first = model.model.layers[0]
        for n in range(1, shape["num_hidden_layers"]):
            model.model.layers.append(twin(first))
            model.model.layers[n].self_attn.layer_idx = n
        model.config.num_hidden_layers = shape["num_hidden_layers"]
    return model.eval()


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same tensors."""
    kept = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in kept})


class Step(nn.Module):
    """One decoding step of ``model`` with a static cache that is not its own."""

    def __init__(self, model: nn.Module, cache: Any, filled: int) -> None:
        super().__init__()
        self.model, self.cache, self.filled = model, cache, filled

    def forward(self, token: Tensor) -> Tensor:
        return self.model(input_ids=token, past_key_values=self.cache, use_cache=True).logits

    def reset(self) -> None:
        """Put the write position back."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.filled)


def cache_for(model: nn.Module, batch: int, length: int, filled: int, token: Tensor) -> Any:
    """A static cache, allocated by a call of the model and then filled with random numbers."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length)
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys.normal_()
            layer.values.normal_()
        layer.cumulative_length.fill_(filled)
    return cache


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that were allocated."""
    found = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(t.nbytes for t in found if isinstance(t, Tensor))


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, shared ones once."""
    return sum(p.nbytes for p in model.parameters())


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def scoring(model: nn.Module, device: str, methods: list[str]) -> list[dict[str, Any]]:
    """Seconds for the scores of every layer, twice (the first also starts libraries), and to find the sublayers."""
    from fusionc.removal.capture import captured
    from fusionc.removal.scores import score

    ids = torch.arange(8, device=device)[None]
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    with captured(model, {"input_ids": ids}) as finder:
        traced = time.perf_counter()
        subs = finder.sublayers()
        say(f"tracing {traced - start:.2f} s, finding {len(subs)} sublayers {time.perf_counter() - traced:.2f} s")
        for method in methods:
            seconds = []
            for _ in range(2):
                synchronize(device)
                start = time.perf_counter()
                values = [score(finder.coupling(s), method) for s in subs]
                seconds.append(time.perf_counter() - start)
            rows.append({"method": method, "layers": len(values), "first_s": seconds[0], "again_s": seconds[1]})
            say(f"score {method}: {len(values)} layers, first {seconds[0]:.3f} s, again {seconds[1]:.3f} s")
    return rows


def timed(arms: dict[str, tuple[Callable[[], Any], Callable[[], None]]], rounds: int, count: int, device: str
          ) -> dict[str, float]:  # fmt: skip
    """Median milliseconds of each arm; the arms take turns. An arm is what to run and what to do before (not timed)."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, (run, reset) in arms.items():
            for k in range(count + 1):
                reset()
                synchronize(device)
                start = time.perf_counter()
                if device == "cuda":
                    a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    a.record()
                    run()
                    b.record()
                    b.synchronize()
                    ms = a.elapsed_time(b)
                else:
                    run()
                    ms = 1e3 * (time.perf_counter() - start)
                if k:
                    found[name].append(ms)
    return {name: statistics.median(values) for name, values in found.items()}


def compare(name: str, regime: str, whole: nn.Module, pruned: nn.Module, inputs: tuple[Any, ...], mode: str | None,
            args: argparse.Namespace, count: int, reset: Callable[[], None]) -> dict[str, Any]:  # fmt: skip
    """Compile both, check that pruned fusionc and pruned eager agree, time four arms."""
    arms: dict[str, Any] = {}
    outs: dict[str, Tensor] = {}
    compile_s = {}
    graphs = {}
    for label, module in (("whole", whole), ("pruned", pruned)):
        fast, known = torch.compile(module, backend="fusionc", mode=mode), records("fusionc")
        start = time.perf_counter()
        for k in range(4):  # the calls in which a CUDA graph is recorded
            reset()
            fast(*inputs)
            synchronize(args.device)
            if k == 0:
                compile_s[label] = time.perf_counter() - start
        reset()
        outs[f"{label} fusionc"] = fast(*inputs).clone()
        reset()
        outs[f"{label} eager"] = module(*inputs).clone()
        arms[f"{label} fusionc"] = (lambda f=fast: f(*inputs), reset)
        if not args.no_eager:
            arms[f"{label} eager"] = (lambda f=module: f(*inputs), reset)
        graphs[label] = counts("fusionc", known) or {}
        graphs[label]["cudagraph"] = [g.cudagraph for g in records("fusionc") if g not in known]
        say(f"{name} {label}: first call {compile_s[label]:.1f} s, {graphs[label]['graphs']} graphs, "
            f"{graphs[label]['launches']} launches, CUDA graph: {graphs[label]['cudagraph']}, "
            f"left to ATen: {graphs[label]['fallbacks']} {not_compiled(graphs[label]) or ''}")  # fmt: skip
    errors = {label: float((outs[f"{label} fusionc"].double() - outs[f"{label} eager"].double()).norm()
                           / outs[f"{label} eager"].double().norm()) for label in ("whole", "pruned")}  # fmt: skip
    ms = timed(arms, args.rounds, count, args.device)
    ratios = {
        kind: ms[f"whole {kind}"] / ms[f"pruned {kind}"] for kind in ("fusionc", "eager") if f"whole {kind}" in ms
    }
    say(f"{name} ({regime}): " + ", ".join(f"{k} {v:.3f} ms" for k, v in ms.items())
        + "; speed-up " + ", ".join(f"{k} {v:.3f}x" for k, v in ratios.items())
        + "; fusionc against eager, relative: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))  # fmt: skip
    return {"name": name, "regime": regime, "ms": ms, "speedup": ratios, "first_call_s": compile_s, "against_eager": errors,
            "graphs": graphs}  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print what was measured; return it, and write it with ``--json``."""
    args = parser.parse_args(argv)
    import fusionc
    from fusionc.errors import FallbackWarning

    warnings.simplefilter("ignore", FallbackWarning)
    shape = dict(SHAPES[args.shape], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    shape |= {"num_hidden_layers": args.layers} if args.layers else {}
    total, device = shape["num_hidden_layers"], args.device
    removed = args.removed if args.removed is not None else REMOVED[args.shape]
    result: dict[str, Any] = {"machine": machine(), "shape": args.shape, "layers": total, "removed": removed}
    start = time.perf_counter()
    whole = build(shape, device, shared=device == "cpu" and args.shape != "tiny")
    synchronize(device)
    say(
        f"{args.shape}: {total} layers x {shape['hidden_size']}, {whole.dtype}, built in {time.perf_counter() - start:.1f} s"
    )
    if "score" in args.parts:
        methods = args.methods or (["layer", "heads", "rope"] if device == "cuda" else ["heads", "rope"])
        result["score"] = scoring(whole, device, methods)
    if set(args.parts) & {"memory", "prefill", "decode"}:
        with torch.no_grad():
            holder = [whole]
            del whole
            result["speed"] = speed(fusionc, holder, shape, removed, args, result)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    return result


def speed(fusionc: Any, holder: list[nn.Module], shape: dict[str, Any], removed: int, args: argparse.Namespace,
          result: dict[str, Any]) -> list[dict[str, Any]]:  # fmt: skip
    """Remove, count, compare prefill and decode."""
    device, rows, whole = args.device, [], holder.pop()
    start = time.perf_counter()
    pruned = twin(whole)
    report = fusionc.remove_attention(pruned, removed, inputs={"input_ids": torch.arange(8, device=device)[None]},
                                      method="rope")  # fmt: skip
    synchronize(device)
    say(f"removal (tracing, ranking, surgery, check) {time.perf_counter() - start:.1f} s: {list(report.plan.layers)}")
    result["memory"] = {"parameters": [parameter_bytes(whole), parameter_bytes(pruned)], "freed": report.freed_bytes}
    generator = torch.Generator(device=device).manual_seed(1)

    def tokens(*size: int) -> Tensor:
        return torch.randint(shape["vocab_size"], size, generator=generator, device=device)

    def nothing() -> None:
        pass

    if "prefill" in args.parts:
        regime = f"batch 1, {args.prompt} tokens, logits of the last, mode default"
        rows.append(compare("prefill", regime, models.Logits(whole, last=True), models.Logits(pruned, last=True),
                            (tokens(1, args.prompt),), None, args, 3, nothing))  # fmt: skip
        release(device)
    if set(args.parts) & {"memory", "decode"}:
        token = tokens(args.batch, 1)
        cache = cache_for(whole, args.batch, args.context + 64, args.context, token)
        small = cache_for(pruned, 1, 8, 0, token[:1])
        held = [n for n, layer in enumerate(small.layers) if getattr(layer, "keys", None) is not None]
        mine = sum(cache.layers[n].keys.nbytes + cache.layers[n].values.nbytes for n in held)
        result["memory"]["cache"] = [cache_bytes(cache), mine]
        if "decode" in args.parts:
            a, b = (Step(m, cache, args.context) for m in (whole, pruned))
            regime = f"batch {args.batch}, {args.context} tokens in a static cache, mode reduce-overhead (CUDA graph)"
            rows.append(compare("decode", regime, a, b, (token,), "reduce-overhead", args, 10, a.reset))
            del a, b
        del cache, small
    release(device)
    if device == "cuda":  # counted by the allocator: what the pruned model holds once nobody holds the whole one
        del whole
        release(device)
        result["memory"]["allocated"] = torch.cuda.memory_allocated()
        say(f"the allocator holds {torch.cuda.memory_allocated() / 1e9:.2f} GB: the pruned model alone")
    memory = result["memory"]
    lines = [[kind, *(f"{n / 1e9:.2f}" for n in memory[kind]), f"{1 - memory[kind][1] / memory[kind][0]:.0%}"]
             for kind in ("parameters", "cache") if kind in memory]  # fmt: skip
    say(table(["GB", "whole", "pruned", "gone"], lines))
    return rows


def release(device: str) -> None:
    """Drop compiled code and what it holds."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
    sys.exit(0)
