"""The cheapest form of a kernel within an error bound: candidates by energy, ordered by cost, checked by their real error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionc.errors import OptionError

from . import fit
from .build import Geometry
from .forms import METHODS, Branch, Branches, Form, LowRank, Recursive, centred

Cost = Callable[[Form], float]


@dataclass(frozen=True)
class Request:
    """What the user asked for: methods that may be used, and the largest relative error of any channel's kernel."""

    methods: tuple[str, ...]
    error: float

    def to_json(self) -> dict[str, object]:
        """As it was written in ``options``."""
        return {"method": list(self.methods), "error": self.error}


@dataclass(frozen=True)
class Choice:
    """A form, its error (the worst channel's, and the root mean square over channels) and its cost against the exact one's."""

    form: Form
    error: float
    mean: float
    share: float


def request(where: str, given: object) -> Request:
    """Check {"method": a name, a list of names or "auto", "error": a number}. Raises OptionError."""
    if not isinstance(given, dict) or not set(given) <= {"method", "error"} or "error" not in given:
        raise OptionError(f'{where} takes {{"method": ..., "error": ...}} or a Plan, found {str(given)[:80]!r}.')
    method, error = given.get("method", "auto"), given["error"]
    names = METHODS if method == "auto" else (method,) if isinstance(method, str) else method
    if not isinstance(names, (list, tuple)) or not names or any(n not in METHODS for n in names):
        raise OptionError(f"{where}: method is one of {', '.join(METHODS)}, several of them, or 'auto'; "
                          f"found {str(method)[:80]!r}.")  # fmt: skip
    if isinstance(error, bool) or not isinstance(error, (int, float)) or not 0 < error < 1:
        raise OptionError(f"{where}: error is a relative error between 0 and 1, found {str(error)[:40]!r}.")
    return Request(tuple(dict.fromkeys(names)), float(error))


def choose(weight: Tensor, g: Geometry, asked: Request, cost: Cost, exact: float, limit: float) -> Choice | str:
    """The cheapest form of ``weight`` [C, 1, kh, kw] within the bound that costs less than ``limit``, or why there is none.

    ``cost`` gives a form's seconds, ``exact`` those of the convolution.
    """
    kernel = fit.wide(weight)
    if not bool(torch.isfinite(kernel).all()):
        return "the weights are not finite"
    best: Choice | None = None
    words = []
    for method in asked.methods:
        found = _one(method, kernel, weight, g, asked.error, cost, exact, limit if best is None else best.share * exact)
        if isinstance(found, Choice):
            best = found
        else:
            words.append(found)
    return best if best is not None else "; ".join(words)


def _one(method: str, kernel: Tensor, weight: Tensor, g: Geometry, bound: float, cost: Cost, exact: float,
         limit: float) -> Choice | str:  # fmt: skip
    """The first form, by cost, whose error is within the bound; else words on the best that is cheap enough."""
    why = _unfit(method, g)
    if why:
        return f"{method}: {why}"
    energy = kernel.square()
    energy = energy / energy.sum((1, 2), keepdim=True).clamp_min(1e-300)
    near: tuple[float, Form] | None = None  # the best that is cheap enough
    dear: Form | None = None  # one within the bound that is not
    for form, estimate in CANDIDATES[method](kernel, energy, g, bound, cost, limit):
        cheap = cost(form) < limit
        if estimate > bound or not cheap:
            if cheap and (near is None or estimate < near[0]):
                near = estimate, form
            elif not cheap and estimate <= bound and dear is None:
                dear = form
            continue
        found = fit.errors(form, fit.filters(form, weight), weight)
        worst = float(found.max()) if found.numel() else 0.0
        if worst <= bound:  # NaN is not
            return Choice(form, worst, float(found.square().mean().sqrt()), cost(form) / exact)
        if near is None or worst < near[0]:
            near = worst, form
    out = f"error bound {bound:g} not reachable with {method} at less than the convolution's cost"
    if near is not None:
        bare = isinstance(near[1], LowRank) and not near[1].dense
        at = f"at rank {near[1].rank} of {min(g.kernel)}" if bare else f"by {near[1]}"  # type: ignore[union-attr]
        out += f": best {near[0]:.2g} {at}"
    return out + (f" ({dear} would reach it at {cost(dear) / exact:.2g} times the cost)" if dear is not None else "")


def _unfit(method: str, g: Geometry) -> str:
    odd = all(k % 2 for k in g.kernel)
    if method in ("inception", "dilated_sparse") and not odd:
        return "the kernel has no middle"
    same = all(2 * p == k - 1 for p, k in zip(g.padding, g.kernel))
    if method == "recursive" and not (odd and same and g.stride == (1, 1) == g.dilation):
        return "needs an odd kernel with stride 1, dilation 1 and padding that keeps the image's size"
    return ""


Found = Iterator[tuple[Form, float]]  # forms with (a lower bound of) their error, the cheapest first


def _low_rank(kernel: Tensor, energy: Tensor, g: Geometry, bound: float, cost: Cost, limit: float) -> Found:
    s = torch.linalg.svdvals(kernel).square()
    left = 1 - s.cumsum(1) / s.sum(1, keepdim=True).clamp_min(1e-300)
    left[s.sum(1) == 0] = 0
    worst = left.clamp_min(0).max(0).values.sqrt()
    plain = [(LowRank(r + 1), float(e)) for r, e in enumerate(worst)]
    enough = next((f for f, e in plain if e <= bound), plain[-1][0])
    if all(k % 2 for k in g.kernel):  # a square helps if fewer pairs do beside it; its error is not known before it is fitted
        plain += [(LowRank(r, n), 0.0) for n in (3, 5, 7) if n < min(g.kernel) for r in range(1, min(enough.rank, 5))
                  if cost(LowRank(r, n)) < min(limit, cost(enough))]  # fmt: skip
    yield from sorted(plain, key=lambda found: (cost(found[0]), str(found[0])))


def _rest(energy: Tensor, branches: tuple[Branch, ...]) -> float:
    """Error of the worst channel if the branches take all taps that they cover."""
    left = energy.clone()
    for b in branches:
        left[:, b.at[0] : b.at[0] + b.reach[0] : b.dilation[0], b.at[1] : b.at[1] + b.reach[1] : b.dilation[1]] = 0
    return float(left.sum((1, 2)).max().sqrt())


def _inception(kernel: Tensor, energy: Tensor, g: Geometry, bound: float, cost: Cost, limit: float) -> Found:
    kh, kw = g.kernel
    squares = [()] + [(centred(g.kernel, (n, n)),) for n in range(1, min(kh, kw) - 1, 2)]
    rows = [()] + [(centred(g.kernel, (n, kw)),) for n in (1, 3, 5) if n < kh]
    columns = [()] + [(centred(g.kernel, (kh, n)),) for n in (1, 3, 5) if n < kw]
    forms = [Branches("inception", g.kernel, a + b + c) for a, b, c in itertools.product(squares, rows, columns) if a + b + c]
    return _sorted(forms, energy, cost)


def _sorted(forms: list[Branches], energy: Tensor, cost: Cost) -> Found:
    return ((f, _rest(energy, f.branches)) for f in sorted(forms, key=lambda f: (cost(f), str(f))))


def _dilated(kernel: Tensor, energy: Tensor, g: Geometry, bound: float, cost: Cost, limit: float) -> Found:
    """For each dense square, dilated ones are added, each time the one that takes most energy for its taps."""
    side = min(g.kernel)
    more = [centred(g.kernel, (n, n), (d, d)) for d in range(2, side) for n in range(3, side, 2) if (n - 1) * d < side]
    forms: dict[Branches, None] = {}
    for dense in range(0, side - 1, 2):
        branches: tuple[Branch, ...] = (centred(g.kernel, (dense + 1, dense + 1)),)
        left = energy.mean(0)
        left = _without(left, branches[0])
        for _ in range(6):
            form = Branches("dilated_sparse", g.kernel, branches)
            if cost(form) >= limit:
                break
            forms[form] = None
            if not more or float(left.sum()) <= bound * bound / len(energy):
                break
            best = max(more, key=lambda b: float(_at(left, b).sum()) / (b.taps + 8))
            branches, left = (*branches, best), _without(left, best)
    return _sorted(list(forms), energy, cost)


def _at(left: Tensor, b: Branch) -> Tensor:
    return left[b.at[0] : b.at[0] + b.reach[0] : b.dilation[0], b.at[1] : b.at[1] + b.reach[1] : b.dilation[1]]


def _without(left: Tensor, b: Branch) -> Tensor:
    left = left.clone()
    _at(left, b).zero_()
    return left


def _shiftwise(kernel: Tensor, energy: Tensor, g: Geometry, bound: float, cost: Cost, limit: float) -> Found:
    """Blocks of 3×3 on a grid through the middle, those with most energy first: as many as two bands have, no more."""
    axes = []
    for k in g.kernel:
        first = (k // 2 - 1) % 3  # the middle block is centred
        starts = [0] * bool(first) + list(range(first, k, 3))
        axes.append([(a, min([*starts, k][i + 1], k) - a) for i, a in enumerate(starts)])
    blocks = [Branch((h, w), (1, 1), (i, j)) for i, h in axes[0] for j, w in axes[1]]
    sums = torch.stack([energy[:, b.at[0] : b.at[0] + b.size[0], b.at[1] : b.at[1] + b.size[1]].sum((1, 2)) for b in blocks], 1)
    order = sums.mean(0).argsort(descending=True, stable=True).tolist()
    left = (1 - sums[:, order].cumsum(1)).clamp_min(0)
    left[energy.sum((1, 2)) == 0] = 0
    worst = left.max(0).values.sqrt()
    for n in range(1, min(len(order), len(axes[0]) + len(axes[1])) + 1):
        form = Branches("shiftwise", g.kernel, tuple(sorted((blocks[i] for i in order[:n]), key=lambda b: b.at)))
        yield form, float(worst[n - 1])
        if cost(form) >= limit:
            return


def _recursive(kernel: Tensor, energy: Tensor, g: Geometry, bound: float, cost: Cost, limit: float) -> Found:
    side = max(g.kernel)
    forms = []
    for dense in (0, 1, 3, 5, 7, 9):
        for factors in ((2,), (4,), (2, 4)):
            reach = [min(side, 13) if len(factors) == 2 and f == 2 else side for f in factors]
            levels = tuple((max(3, (-(-n // f)) // 2 * 2 + 1), f) for n, f in zip(reach, factors))
            if dense < side and levels[-1][1] < side:
                forms.append(Recursive(dense, levels))
    return ((f, fit.recursive_error(f, kernel)) for f in sorted(forms, key=lambda f: (cost(f), str(f))) if cost(f) < limit)


CANDIDATES: dict[str, Callable[[Tensor, Tensor, Geometry, float, Cost, float], Found]] = {
    "low_rank": _low_rank,
    "inception": _inception,
    "dilated_sparse": _dilated,
    "shiftwise": _shiftwise,
    "recursive": _recursive,
}

__all__ = ["CANDIDATES", "Choice", "Request", "choose", "request"]
