"""Values as functions of indices: every rule against the tensors that torch computes, sizes known and symbolic."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionc.graph.facts import Facts, nodes_of
from fusionc.graph.formula import Affine, AtLeastZero, Both, Cases, Either, Unproven
from fusionc.graph.positions import Positions


def captured(fn: Callable[..., Tensor], *inputs: Any, dynamic: bool = False) -> tuple[Positions, Any]:
    """The evaluator of the graph that Dynamo makes of ``fn`` and its result node."""
    found: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=keep, dynamic=dynamic, fullgraph=True)(*inputs)
    (gm,) = found
    (result,) = nodes_of(gm.graph.output_node().args)
    return Positions(Facts(gm, "model")), result


def computed(cases: Cases, like: Tensor, sizes: dict[Any, int]) -> Tensor:
    """The tensor that the cases describe, element by element; exactly one case must hold for each."""

    def number(e: Affine, index: tuple[int, ...]) -> Any:
        constant = e.constant.subs(sizes) if hasattr(e.constant, "subs") else e.constant
        return constant + sum(factor * index[axis] for axis, factor in e.factors)

    def holds(formula: Any, index: tuple[int, ...]) -> bool:
        if isinstance(formula, AtLeastZero):
            return bool(number(formula.of, index) >= 0)
        if isinstance(formula, (Both, Either)):
            return (all if isinstance(formula, Both) else any)(holds(part, index) for part in formula.parts)
        return formula

    made = torch.empty_like(like)
    for index in itertools.product(*map(range, like.shape)):
        (value,) = [number(e, index) for e, when in cases.items() if holds(when, index)]
        made[index] = float(value) if like.is_floating_point() else int(value)
    return made


def same(fn: Callable[..., Tensor], *inputs: Any, kinds: tuple[bool, ...] = (False, True)) -> None:
    """The evaluated cases are the computed tensor, with fixed and with symbolic sizes."""
    expected = fn(*inputs)
    for dynamic in kinds:
        positions, node = captured(fn, *inputs, dynamic=dynamic)
        sizes = {}
        for placeholder in positions.facts.inputs:
            found = placeholder.meta["example_value"]
            for size in (*getattr(found, "shape", ()), found):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    sizes[size.node.expr] = size.node.hint
        torch.testing.assert_close(computed(positions(node), expected, sizes), expected, rtol=0, atol=0)


def rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0])


def columns(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def where(x: Tensor, condition: Tensor) -> Tensor:
    return torch.where(condition, torch.tensor(0.0), torch.finfo(torch.float32).min)


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "arange": lambda x: torch.arange(3, x.shape[1] + 5, 2),
    "arange end": lambda x: torch.arange(end=x.shape[1], dtype=torch.int32),
    "compare": lambda x: columns(x)[None, :] <= rows(x)[:, None] + 1,
    "less": lambda x: columns(x)[None, :] < rows(x)[:, None],
    "greater": lambda x: columns(x).unsqueeze(0) > rows(x).unsqueeze(-1) - 2,
    "equal": lambda x: columns(x).view(1, -1) == rows(x).reshape(-1, 1),
    "unequal": lambda x: columns(x).view(1, -1) != rows(x).reshape(-1, 1) + 1,
    "and": lambda x: (columns(x) > rows(x)[:, None] - 3) & (columns(x) <= rows(x)[:, None]),
    "or": lambda x: (columns(x) > rows(x)[:, None]) | (columns(x) == 0),
    "not": lambda x: ~(columns(x) > rows(x)[:, None]),
    "logical": lambda x: torch.logical_and(torch.logical_not(columns(x) > rows(x)[:, None]), columns(x) != 1),
    "window": lambda x: (rows(x)[:, None] - columns(x)).abs() <= 2,
    "negative": lambda x: -columns(x) + 3 * rows(x)[:, None] - 1,
    "rsub": lambda x: (5 - columns(x)) * 2,
    "tril": lambda x: torch.ones(x.shape[0], x.shape[1], dtype=torch.bool).tril(),
    "tril diagonal": lambda x: torch.ones(x.shape[0], x.shape[1]).tril(diagonal=-1),
    "triu": lambda x: torch.triu(torch.full((x.shape[0], x.shape[1]), float("-inf")), diagonal=1),
    "additive": lambda x: where(x, columns(x) <= rows(x)[:, None]),
    "masked fill": lambda x: torch.zeros(x.shape[0], x.shape[1]).masked_fill(columns(x) > rows(x)[:, None], -1e9),
    "one minus": lambda x: (1.0 - (columns(x) <= rows(x)[:, None]).to(torch.float32)) * -65504.0,
    "bfloat": lambda x: (columns(x) > rows(x)[:, None]).to(torch.bfloat16) * -65536.0,
    "back to bool": lambda x: where(x, columns(x) <= rows(x)[:, None]).to(torch.bool),
    "is masked": lambda x: where(x, columns(x) <= rows(x)[:, None]) == 0,
    "full like": lambda x: torch.full_like(columns(x), 7) + columns(x).new_full((1,), 2),
    "new ones": lambda x: columns(x).new_ones((), dtype=torch.bool) & (columns(x) >= 0),
    "zeros": lambda x: torch.zeros(x.shape[0], x.shape[1]),
    "expand": lambda x: (columns(x) <= rows(x)[:, None])[None, None].expand(2, -1, -1, -1),
    "repeat": lambda x: (columns(x)[None, :] <= rows(x)[:, None])[:, None].repeat(2, 1, 3, 1),
    "permute": lambda x: (columns(x)[None, None, :] <= rows(x)[None, :, None]).permute(2, 0, 1),
    "transpose": lambda x: (columns(x)[None, :] <= rows(x)[:, None]).transpose(-1, 0),
    "squeeze": lambda x: (columns(x)[None, None, :] <= rows(x)[None, :, None]).squeeze(0),
    "slices": lambda x: (columns(x)[None, :] + 10 * rows(x)[:, None])[1:, :-1][..., 1::2],
    "negative slice": lambda x: (columns(x)[None, :] + 10 * rows(x)[:, None])[-2:, -1],
    "positions gathered": lambda x: (columns(x) * 3)[rows(x)[:2, None]],
    "pair gathered": lambda x: (columns(x)[None, :] + rows(x)[:, None])[rows(x)[:, None, None], rows(x)[:2]],
    "difference": lambda x: torch.diff(rows(x)[None, :] * 2, prepend=rows(x)[None, :1] - 5, dim=-1),
    "packed": lambda x: (torch.diff(rows(x)[None, :], prepend=rows(x)[None, :1] - 1, dim=-1) != 1).cumsum(-1),
    "cumsum": lambda x: torch.ones(x.shape[0], x.shape[1], dtype=torch.int64).cumsum(0),
    "casts": lambda x: (columns(x) < 2).long().int().bool().float().double(),
    "reshaped constant": lambda x: torch.ones(x.shape[0], 4).reshape(2, -1),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    fixed = name in ("negative slice", "positions gathered", "pair gathered")  # in range: known of fixed sizes only
    same(RULES[name], torch.zeros(6, 7), kinds=(False,) if fixed else (False, True))


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "data": (lambda x: x > 0, "it depends on data"),
    "data inside": (lambda x: (columns(x) > 1) & (x > 0), "it depends on data"),
    "operator": (lambda x: columns(x) % 2, "mod is not understood"),
    "in place": (lambda x: rows(x).add_(1) + 0, "it is written in place"),
    "written later": (lambda x: torch.zeros(3).masked_fill_(torch.arange(3) > 1, 2.0) + 0, "it is written in place"),
    "fraction": (lambda x: columns(x) > 0.5, "positions in torch.float32"),
    "rounding": (lambda x: columns(x).float(), "positions in torch.float32"),
    "half": (lambda x: torch.zeros(2, dtype=torch.float16) - 0.1, "a constant is rounded"),
    "nan": (lambda x: torch.full((3,), float("inf")) * 0.0, "not a number"),
    "small integers": (lambda x: torch.arange(3, dtype=torch.int8), "positions in torch.int8"),
    "steep": (lambda x: torch.arange(0, 8, 2, dtype=torch.int32), "an integer that is too large or none"),
    "wrap": (lambda x: columns(x) * 2**40, "an integer that is too large or none"),
    "repeated": (lambda x: columns(x).repeat(2), "positions are repeated"),
    "square": (lambda x: columns(x) * columns(x), "a product of positions"),
    "bits": (lambda x: columns(x) & 1, "bits of integers"),
    "reshaped": (lambda x: (columns(x) + rows(x)[:, None]).reshape(-1), "positions are reshaped"),
    "read as": (lambda x: torch.ones(4).view(torch.int32), "bits are read as another type"),
    "out of range": (lambda x: columns(x)[(rows(x) - 1)[:, None]], "an index that may be out of range"),
    "boolean index": (lambda x: columns(x)[columns(x) > 1], ""),
    "list index": (lambda x: columns(x)[[0, 2]], ""),
    "step": (lambda x: torch.arange(0, 1, 0.25), "a fractional or symbolic step"),
    "random": (lambda x: torch.rand(3) > 2, "rand is not understood"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name: str) -> None:
    fn, reason = REFUSED[name]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        positions, node = captured(fn, torch.zeros(6, 7))
    with pytest.raises(Unproven) as caught:
        positions(node)
    assert reason in caught.value.reason and caught.value.node is not None, caught.value.reason


def test_ranges_decide() -> None:
    """Conditions that hold for all indices, or for none, are no conditions."""
    positions, node = captured(lambda x: (columns(x) >= 0) & (columns(x) > rows(x)[:, None] - 6), torch.zeros(6, 7))
    assert positions(node) == {Affine((), 1): True}
    positions, node = captured(lambda x: columns(x) <= x.shape[1] - 1, torch.zeros(6, 7), dynamic=True)
    assert positions(node) == {Affine((), 1): True}
    positions, node = captured(lambda x: columns(x) < 0, torch.zeros(6, 7), dynamic=True)
    assert positions(node) == {Affine(): True}
    positions, node = captured(lambda x: columns(x) <= 2, torch.zeros(6, 3), dynamic=True)
    assert len(positions(node)) == 2  # true at the sizes seen, but not at all


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("le lt ge gt eq ne tril triu window".split()), st.integers(-3, 3),
                          st.sampled_from("and or and-not".split())), min_size=1, max_size=4),
       st.integers(2, 5), st.integers(2, 5), st.booleans())  # fmt: skip
def test_random_masks(steps: list[tuple[str, int, str]], n: int, m: int, additive: bool) -> None:
    def mask(x: Tensor) -> Tensor:
        i, j = rows(x)[:, None], columns(x)[None, :]
        total = torch.ones(x.shape[0], x.shape[1], dtype=torch.bool)
        for kind, shift, join in steps:
            if kind in ("tril", "triu"):
                part = getattr(torch.ones(x.shape[0], x.shape[1], dtype=torch.bool), kind)(shift)
            elif kind == "window":
                part = (i - j).abs() <= shift
            else:
                part = getattr(j, kind)(i + shift)
            total = total & part if join == "and" else total | part if join == "or" else total & ~part
        return torch.where(total, 0.0, float("-inf")) if additive else total

    same(mask, torch.zeros(n, m))
