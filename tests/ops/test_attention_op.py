"""fusionc::attention: score expressions (text, values, bounds, gradients) and the kernels in Triton's interpreter."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionc import ops
from fusionc.ops import attention as reference
from fusionc.ops.score import K, Q, S, Term, Unsupported, const, evaluate, live, load, make, parse, scaled
from fusionc.runtime import attention as device

ops.load("attention")

ALIBI = "(where (le k q) (add (mul s 0.25) (mul xf0 (sub (float k) (float q)))) -inf)"
KERPLE = "(where (le k q) (sub (mul s 0.25) (mul xf0 (log (add 1.0 (mul xf1 (float (sub q k))))))) -inf)"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- expressions ------------------------------------------------------------------------------------------------------


def test_text_reads_back() -> None:
    for text in (ALIBI, KERPLE, "s", "(where (and xb0 (lt (sub q k) 9)) s -1e+30)", "(mul (tanh s) (sigmoid (neg s)))"):
        assert str(parse(text)) == text
    for text in ("", "(add s)", "(add s s s)", "(drop s)", "s s", "(add s", "import", "xf0x", "(" * 300):
        with pytest.raises(ValueError):
            parse(text)


def test_one_form_for_many_spellings() -> None:
    mask = make("gt", make("sub", K, Q), const(0))
    chosen = make("where", mask, const(-math.inf), make("mul", S, const(0.5)))
    added = make("add", make("div", S, const(2.0)), make("mul", make("float", mask), const(-math.inf)))
    assert chosen == make("add", make("mul", S, const(0.5)), make("where", mask, const(-math.inf), const(0.0)))
    assert "nan" in str(added)  # 0 · -inf is what that spelling gives
    inverted = make("mul", make("sub", const(1.0), make("float", load(0, "b"))), const(-1e4))
    assert str(inverted) == "(where xb0 -0.0 -10000.0)"
    assert make("eq", make("float", load(0, "b")), const(0)) == make("not", load(0, "b"))
    assert make("ge", Q, const(0)) == const(True)
    with pytest.raises(Unsupported):
        make("mod", S, const(2.0))
    with pytest.raises(Unsupported):
        make("fdiv", make("sub", K, Q), const(2))  # rounds down in torch and towards zero in kernels


BOUNDS = [
    ("(where (le k q) s -inf)", (None, 0), "s"),
    ("(where (gt (sub k q) 3) -1000000000.0 s)", (None, 3), "s"),
    ("(where (and (le k q) (lt (sub q k) 9)) s -inf)", (-8, 0), "s"),
    ("(where (lt (abs (sub q (add k 2))) 4) s -inf)", (-5, 1), "s"),
    ("(where (or (gt k q) xb0) -inf s)", (None, 0), "(where xb0 -inf s)"),
    ("(where (or (le k q) xb0) s -inf)", (None, None), "(where (or (le k q) xb0) s -inf)"),
    ("(where (or (le k q) (eq k (add q 5))) s -inf)", (None, 5), "(where (or (le k q) (eq k (add q 5))) s -inf)"),
    ("(add s (where (le k q) 0.0 -3e+38))", (None, 0), "s"),
    ("(add s (where (le k q) 0.0 -65504.0))", (None, 0), "s"),
    ("(add s (where (le k q) 0.0 -10000.0))", (None, None), "(add s (where (le k q) 0.0 -10000.0))"),
    ("(mul (where (le k q) s -1000000.0) 0.5)", (None, 0), "(mul s 0.5)"),
    ("(tanh (where (le k q) s -inf))", (None, None), "(tanh (where (le k q) s -inf))"),
    ("(where (le k q) s -5.0)", (None, None), "(where (le k q) s -5.0)"),
    ("(where xb0 (where (le k q) s -inf) -100000.0)", (None, 0), "(where xb0 s -100000.0)"),
    ("(where (le (mul 2 k) q) s -inf)", (None, None), "(where (le (mul 2 k) q) s -inf)"),
]


@pytest.mark.parametrize(("text", "bounds", "inside"), BOUNDS)
def test_bounds(text: str, bounds: Any, inside: str) -> None:
    found = live(parse(text))
    assert ((found.lower, found.upper), str(found.inside)) == (bounds, inside)


_conditions = st.recursive(
    st.builds(lambda op, a, b, c: make(op, make("sub", a, b), const(c)), st.sampled_from(("lt", "le", "gt", "ge", "eq", "ne")),
              st.sampled_from((Q, K)), st.sampled_from((Q, K)), st.integers(-4, 4)),
    lambda x: st.one_of(st.builds(lambda a: make("not", a), x), st.builds(lambda op, a, b: make(op, a, b),
                                                                          st.sampled_from(("and", "or")), x, x)),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(_conditions, min_size=1, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3))
def test_bounds_hold(conditions: list[Term], flips: list[bool]) -> None:
    term = S
    for c, flip in zip(conditions, flips):
        term = make("where", c, const(-math.inf), term) if flip else make("where", c, term, const(-math.inf))
    found = live(term)
    n = 9
    q, k = torch.arange(n)[:, None], torch.arange(n)
    leaves = {S: random(n, n), Q: q, K: k}
    full = evaluate(term, leaves).expand(n, n)
    inside = evaluate(found.inside, leaves).expand(n, n)
    within = torch.ones(n, n, dtype=torch.bool)
    if found.lower is not None:
        within &= k - q >= found.lower
    if found.upper is not None:
        within &= k - q <= found.upper
    assert bool((full[~within] <= found.fill).all())
    torch.testing.assert_close(inside[within], full[within], rtol=0, atol=0)


def test_scaled() -> None:
    leaves = {S: random(5, 5).double(), Q: torch.arange(5)[:, None], K: torch.arange(5), load(0, "f"): torch.tensor(0.3)}
    for text in (ALIBI, "(neg (sub s 3.0))", "(tanh s)", "(add s (where (le k q) 0.0 -5.0))"):
        term = parse(text)
        torch.testing.assert_close(evaluate(scaled(term, 1.5), leaves), 1.5 * evaluate(term, leaves))
    assert scaled(const(-3.3e38), 1.5).value == -3.4e38


# -- kernels ----------------------------------------------------------------------------------------------------------

BIG = "(add (mul s 0.25) (where (le k (sub q 20)) 0.0 -3.3895313892515355e+38))"
CASES: dict[str, tuple[str, list[Tensor], dict[str, int]]] = {
    "plain": ("(mul s 0.25)", [], {}),
    "alibi": (ALIBI, [random(1, 2, 1, 1)], {}),
    "window": ("(where (and (le k q) (lt (sub q k) 9)) (mul s 0.25) -inf)", [], {"rows": 50, "columns": 50}),
    "finite": ("(where (and (le k q) (lt (sub q k) 9)) (mul s 0.25) -1000000000.0)", [], {"rows": 48, "columns": 48}),
    "rows without keys": ("(where (and (le k (sub q 20)) xb0) (mul s 0.25) -1000000000.0)",
                          [random(1, 1, 1, 50) > 0], {"rows": 50, "columns": 50}),
    "rows of the lowest number": (BIG, [], {"rows": 50, "columns": 50}),
    "rows of a low number": ("(add (mul s 0.25) (where (le k (sub q 20)) 0.0 -65504.0))", [], {"rows": 50, "columns": 50}),
    "bias": ("(add (mul s 0.25) xf0)", [random(1, 2, 37, 37)], {}),
    "bias of all, grouped": ("(add (mul s 0.25) xf0)", [random(2, 4, 20, 50)],
                             {"batch": 2, "heads": 4, "shared": 2, "rows": 20, "columns": 50}),
    "bias of one": ("(where (le k q) (add (mul s 0.25) xf0) -inf)", [random(1, 1, 40, 40)],
                    {"batch": 2, "rows": 40, "columns": 40}),
    "per key": ("(add (mul s 0.25) xf0)", [random(2, 1, 1, 50)], {"batch": 2, "rows": 20, "columns": 50}),
    "per query": ("(mul s xf0)", [random(1, 2, 20, 1)], {"rows": 20, "columns": 50}),
    "softcap": ("(where (le k q) (mul 5.0 (tanh (mul s 0.05))) -inf)", [], {"width": 24, "depth": 40}),
    "kerple": (KERPLE, [random(1, 2, 1, 1).abs(), random(1, 2, 1, 1, seed=1).abs()], {}),
    "offset": ("(where (le k (add q 30)) (mul s 0.25) -inf)", [], {"rows": 20, "columns": 50, "heads": 2, "shared": 1}),
}  # fmt: skip


def agree(made: Tensor, expected: Tensor, tolerance: float) -> None:
    assert made.shape == expected.shape
    assert float((made.double() - expected).norm() / (expected.norm() + 1e-9)) < tolerance


def inputs(dtype: torch.dtype, batch: int = 1, heads: int = 2, shared: int = 2, rows: int = 37, columns: int = 37,
           width: int = 16, depth: int = 16) -> list[Tensor]:  # fmt: skip
    return [random(batch, heads, rows, width, seed=1, dtype=dtype), random(batch, shared, columns, width, seed=2, dtype=dtype),
            random(batch, shared, columns, depth, seed=3, dtype=dtype)]  # fmt: skip


def wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str) -> None:
    score, operands, sizes = CASES[name]
    tolerance = 1e-3 if "65504" in score else 1e-5  # float32 keeps two decimals of a score beside that number
    q, k, v = inputs(torch.float32, **sizes)
    exact = [wide(x) for x in (q, k, v)]
    wider = [wide(x) for x in operands]
    out, lse = device.attention(q, k, v, operands, score)
    expected, sums = reference._reference(*exact, wider, score)
    agree(out, expected, tolerance)
    grad = random(*out.shape, seed=5)
    made = device.attention_backward(grad, q, k, v, out, lse, operands, score)
    truth = reference._reference_backward(grad.double(), *exact, expected, sums, wider, score)
    for a, b in zip(made, truth):
        agree(a, b.double(), tolerance)
    for i, x in enumerate(operands):
        if x.is_floating_point():
            a = device.attention_operand_backward(grad, q, k, v, lse, made[3], operands, score, i)
            b = reference._reference_operand(grad.double(), *exact, sums, truth[3], wider, score, i)
            agree(a, b, 1e-4)


def test_strides_and_half() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(torch.float16))
    bias = random(1, 2, 1, 74, dtype=torch.float16)[..., ::2]
    score = "(where (le k q) (add (mul s 0.25) xf0) -inf)"
    out, lse = device.attention(q, k, v, [bias], score)
    expected, sums = reference._reference(*map(wide, (q, k, v)), [wide(bias)], score)
    agree(out, expected, 1e-3)
    grad = random(1, 1, 1, 16, seed=5, dtype=torch.float16).expand(out.shape)
    made = device.attention_backward(grad, q, k, v, out, lse, [bias], score)
    truth = reference._reference_backward(grad.double(), *map(wide, (q, k, v)), expected, sums, [wide(bias)], score)
    for a, b in zip(made, truth):
        agree(a, b.double(), 2e-3)


def test_rows_without_finite_scores_are_nan() -> None:
    q, k, v = inputs(torch.float32, rows=40, columns=40)
    out, _ = device.attention(q, k, v, [], "(where (le k (sub q 20)) s -inf)")
    assert bool(out[:, :, :20].isnan().all()) and not bool(out[:, :, 20:].isnan().any())


def test_no_keys() -> None:
    q, k, v = inputs(torch.float32)
    out, _ = device.attention(q, k[:, :, :0], v[:, :, :0], [], "s")
    torch.testing.assert_close(out, torch.softmax(q @ k[:, :, :0].mT, -1) @ v[:, :, :0])


def test_operator() -> None:
    q, k, v = (x.double().requires_grad_() for x in inputs(torch.float64, rows=5, columns=5, width=4, depth=4))
    slope = random(1, 2, 1, 1).double().requires_grad_()
    op = torch.ops.fusionc.attention
    assert torch.autograd.gradcheck(lambda *x: op(*x[:3], [x[3]], ALIBI)[0], (q, k, v, slope), atol=1e-4)
    torch.library.opcheck(op.default, (q, k, v, [slope.detach()], ALIBI))


# -- binaries ---------------------------------------------------------------------------------------------------------


@pytest.mark.cross
@pytest.mark.parametrize(("size", "name"), list(itertools.product((64, 128), ("forward", "backward_q", "backward_kv"))))
def test_built_for_hopper(size: int, name: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from fusionc.codegen.templates import attention as template
    from fusionc.runtime.launch import _usage, load_module

    fn = getattr(load_module(template.source(ALIBI, ("h",))), name)
    tables = {"forward": device._FORWARD, "backward_q": device._BACKWARD_Q, "backward_kv": device._BACKWARD_KV}
    tile = tables[name][size][0]
    fixed = device.constants(size, size, 1, 2048, 2048, tile)
    names = [n for n in fn.arg_names if n not in fixed]
    kinds = [("*fp32" if n in ("LSE", "DELTA") else "*bf16") if n.isupper() and n not in ("H", "QN", "KN") else "i32"
             for n in names]  # fmt: skip
    source = device.ast_source(fn, kinds, [True] * len(kinds), fixed)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                           options={"num_warps": tile.warps, "num_stages": tile.stages})  # fmt: skip
    _, spills = _usage(built)
    assert spills <= 128 and "wgmma.mma_async" in built.asm["ptx"]
    parameters = re.findall(r"\.param \.(u64 \.ptr|\w+)", built.asm["ptx"].split(".entry")[1].split(")")[0])
    assert [p.endswith("ptr") for p in parameters[: len(kinds)]] == [k.startswith("*") for k in kinds]


def test_the_launcher_needs_no_driver_of_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton builds its driver's module with the C compiler, and up to 3.6 a launcher for each signature."""
    triton = pytest.importorskip("triton")
    from types import SimpleNamespace

    built = SimpleNamespace(asm={}, n_regs=32, n_spills=0, metadata=SimpleNamespace(shared=0))
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(device.cuda_driver, "target", lambda: "the GPU")
    monkeypatch.setattr(triton, "compile", lambda source, **how: asked.append(how["target"]) or built)
    monkeypatch.setattr(device.launch, "load_binary", asked.append)
    monkeypatch.setattr(device.launch, "_cuda_launcher", lambda *_: "launcher")
    monkeypatch.setattr(device, "ast_source", lambda *_: None)
    p: Any = object.__new__(device._Prepared)
    p.name, p.device, p.launchers, p.kinds, p.divisible, p.ones = "forward", torch.device("cuda:0"), {}, [], [], {}
    p.module, p.shape, p.which = SimpleNamespace(forward=None), (64, 64, 1, 128, 128), ""
    p.queries, p.keys, p.batch, p.heads, p.shared = 128, 128, 1, 1, 1
    tile = device._FORWARD[64][0]
    assert p.launcher(tile) == "launcher" == p.launcher(tile)
    assert asked == ["the GPU", built]
