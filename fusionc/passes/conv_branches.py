"""Parallel convolutions of one input whose results are added become one convolution.

Math       Σ_b conv(x, W_b, β_b) = conv(x, W, Σ β_b),  W[(i d_b − p_b + P) / g, …] += W_b[i, …];  a BatchNorm of x is a
           convolution with one tap, γ/√(σ² + ε) on the diagonal; x itself one with ones. g is the largest step that all
           taps are multiples of, so that branches of one dilation stay dilated; of different groups the coarsest is taken
Exactness  reassociates: the branches' sum is taken before the products, in float64, and rounded once
Legality   inference; weights and statistics are parameters, buffers or derived from such; BatchNorm uses its running
           statistics; nobody else reads a branch; one dtype, one stride; zeros around the image (another padding is a node
           of its own, and then another input); the merged window, padded alike on both sides, has as many places as the
           branches'; x and what else is added is not written in between; x itself takes part in float32 and wider only, and
           on a GPU only in depthwise convolutions, whose products are not rounded to TF32
Cost       one convolution in place of many, if it has no more multiplications than they; a small depthwise one may have
           twice as many, since memory is its limit. Nesting of the sum and what else it holds do not matter
Source     Ding et al., RepVGG (arXiv 2101.03697), ACNet (1908.03930), RepLKNet (2203.06717); Vasu et al., MobileOne
           (2206.04040); Ding et al., UniRepLKNet (2311.15599): their deploy forms, found here from the graph alone
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, device, dtype, same, same_sizes, shape, tensor
from . import constants, conv_bn
from .base import Match, Pass, Reassociates, Refuse

_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE = {operator.iadd, "add_"}
_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SMALL = 49  # taps up to which a depthwise convolution waits for memory


@dataclass(frozen=True)
class Branch:
    """One addend as a convolution of ``source``. ``parts``: weight, bias, or mean, variance, γ, β, or nothing (x itself)."""

    node: Node
    source: Node
    kind: str  # "conv", "norm" or "identity"
    parts: tuple[Node | None, ...]
    channels: tuple[int, int]  # output, input
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # in front
    dilation: tuple[int, ...]
    eps: float = 0.0

    @property
    def cost(self) -> int:
        """Multiplications for one place."""
        return self.channels[0] * (self.channels[1] // self.groups) * math.prod(self.kernel)


@dataclass(frozen=True)
class Merged:
    """One convolution for several branches; ``places`` are (first tap, step between taps) of each branch and axis."""

    branches: tuple[Branch, ...]
    groups: int
    kernel: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    places: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def cost(self) -> int:
        """Multiplications for one place."""
        out, into = self.branches[0].channels
        return out * (into // self.groups) * math.prod(self.kernel)


class ConvBranches(Pass):
    """Structural re-parameterisation with derived weights; a BatchNorm after the sum is folded as well."""

    name = "conv_branches"
    exactness = Reassociates(rtol=1e-5)
    level = "model"

    def find(self, facts: Facts) -> Iterator[Match]:
        """Sums of at least two functions of one value, one of them a convolution."""
        if not any(facts.gm.graph.find_nodes(op="call_function", target=each) for each in _CONVOLUTIONS):
            return
        inner: set[Node] = set()
        roots: list[Node] = []
        for node in reversed(facts.gm.graph.nodes):
            if node not in inner and _operands(node) is not None:
                inner.update(_flatten(node, facts)[0])
                roots.append(node)
        for root in reversed(roots):
            if not root._erased:
                adds, addends = _flatten(root, facts)  # again: sums before it may have become convolutions
                if _promising(addends):
                    yield Match({"root": root, "adds": adds, "addends": addends}, (root,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality. Leaves what to do in ``match``."""
        root = match.root
        if facts.stage != "inference":
            return Refuse("gradients of the weights are wanted", root)
        first: Refuse | None = None
        branches: list[Branch] = []
        for addend in match.addends:
            found = _branch(addend, root, facts)
            if isinstance(found, Branch):
                made = [constants.constant(part, facts) for part in found.parts]
                if match.addends.count(addend) > 1 and any(each is not None and each.compute is not None for each in made):
                    continue  # added to itself: its recipe would hold itself twice, and double with each such addition
                branches.append(found)
            elif found is not None and first is None:
                first = found
        if _layout(root) is None:
            return Refuse("the sum is neither contiguous nor channels-last", root)
        into = {b.source: b.channels[1] for b in branches if b.kind == "conv"}
        branches += [_identity(a, into[a]) for a in match.addends if a in into]
        clusters = [each for each in _clusters(branches, root) if len(each.branches) > 1]
        if not clusters:
            return first or Refuse("no two branches are one cheaper convolution", root)
        for each in clusters:
            last = _written(each, match, facts)
            if last is not None:
                return Refuse("a value is written between the branches", last)
        match.bound["clusters"] = clusters
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The convolutions in front of their first branch, the sum of the rest in the root's place."""
        gm, root = facts.gm, match.root
        graph, key = gm.graph, edit.value_key(gm.graph)
        used = [part for cluster in match.clusters for branch in cluster.branches for part in branch.parts]
        layout = _layout(root)
        assert layout is not None
        slots: list[Node | None] = list(match.addends)  # in their order: the first decides about the sum's layout
        made = []
        for cluster in match.clusters:
            taken = []
            for branch in cluster.branches:
                taken.append(slots.index(branch.node))
                slots[taken[-1]] = None
            made.append(_insert(cluster, facts, key, layout != torch.contiguous_format))
            slots[min(taken)] = made[-1]
        parts = [part for part in slots if part is not None]
        total = parts[0]
        with graph.inserting_before(root):
            for each in parts[1:]:
                total = edit.insert(graph, torch.add, (total, each), origin=(root,), key=key)
            if not tensor(total).is_contiguous(memory_format=layout):  # type: ignore[union-attr]
                total = edit.insert(graph, torch.clone, (total,), {"memory_format": layout}, origin=(root,), key=key)
        edit.provenance(total, match.adds)
        root.replace_all_uses_with(total)
        for node in match.adds:  # from the root down; those in place write memory of their own only
            graph.erase_node(node)
        edit.erase_dead([b.node for c in match.clusters for b in c.branches if b.kind != "identity"])
        user = next(iter(total.users), root)
        if total is made[0] and user.target is torch.nn.functional.batch_norm:
            after, fold = conv_bn.folding(user), conv_bn.ConvBatchNorm()
            if after is not None and fold.check(after, facts) is None:
                fold.replace(after, facts)
        constants.drop_unused(gm, used)


def _operands(node: Node) -> tuple[Any, Any] | None:
    """The two sides of a plain sum."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDS or len(node.args) != 2:
        return None
    return (node.args[0], node.args[1]) if not node.kwargs or node.kwargs == {"alpha": 1} else None


def _flatten(root: Node, facts: Facts) -> tuple[list[Node], list[Node]]:
    """The additions of a nested sum, root first, and what is added. Nobody else reads a value between."""
    adds: list[Node] = []
    addends: list[Node] = []
    like = tensor(root)

    def whole(part: Any) -> bool:
        if not isinstance(part, Node):
            return type(part) in (int, float) and part == 0
        found = tensor(part)
        return (
            found is not None and like is not None and found.dtype == like.dtype and same_sizes(found.shape, like.shape)
        )

    def walk(node: Node) -> None:
        sides = _operands(node)
        inside = sides is not None and (node is root or len(node.users) == 1) and all(map(whole, sides))
        if sides is None or not inside or node.target in _IN_PLACE and not _fresh(sides[0], facts):
            addends.append(node)
            return
        adds.append(node)
        for side in sides:
            if isinstance(side, Node) and sides[0] is not sides[1]:
                walk(side)
            elif isinstance(side, Node):  # twice the same sum: taken apart it would double with each such addition
                addends.append(side)

    walk(root)
    return (adds, addends) if adds else ([], [])


def _fresh(node: Any, facts: Facts) -> bool:
    """Memory that only the one reader of this node knows of."""
    if not isinstance(node, Node) or node.op in ("placeholder", "get_attr") or len(node.users) != 1:
        return False
    if node.target in _IN_PLACE:
        sides = _operands(node)
        return sides is not None and _fresh(sides[0], facts)
    return facts.roots(node) == {node}


def _layout(node: Node) -> torch.memory_format | None:
    """The memory format that a value is dense in, contiguous first; None for another."""
    found = tensor(node)
    named = {4: torch.channels_last, 5: torch.channels_last_3d}
    formats = [torch.contiguous_format, *([named[found.dim()]] if found is not None and found.dim() in named else ())]
    return next((f for f in formats if found is not None and found.is_contiguous(memory_format=f)), None)


def _promising(addends: Sequence[Node]) -> bool:
    inputs = [a.args[0] if a.args and (a.target in _CONVOLUTIONS or a.target is torch.nn.functional.batch_norm)
              else a.kwargs.get("input", a) for a in addends]  # fmt: skip
    return any(a.target in _CONVOLUTIONS and inputs.count(i) > 1 for a, i in zip(addends, inputs))


def _branch(node: Node, root: Node, facts: Facts) -> Branch | Refuse | None:
    """The addend as a convolution, or why not; None if it is something else altogether."""
    norm = node.target is torch.nn.functional.batch_norm
    if node.op != "call_function" or not norm and node.target not in _CONVOLUTIONS:
        return None
    if len(node.users) != 1:
        return Refuse("a branch has another reader", node)
    given = conv_bn.norm_arguments(node) if norm else \
        conv_bn.arguments(node, ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
                          (None, None, None, 1, 0, 1, 1))  # fmt: skip
    names = ("running_mean", "running_var", "weight", "bias") if norm else ("weight", "bias")
    source, parts = given["input"], tuple(given[name] for name in names)
    x, like = shape(source), shape(node)
    if norm and (given["training"] is not False or None in parts[:2] or not isinstance(given["eps"], (int, float))):
        return Refuse("BatchNorm uses the statistics of the batch", node)
    if any(part is not None and constants.constant(part, facts) is None for part in parts):
        return Refuse("a weight or statistic is no parameter or buffer that stays as it is", node)
    if dtype(source) not in _FLOATING or dtype(node) != dtype(source) or not norm and dtype(parts[0]) != dtype(node):
        return Refuse("a branch computes in more than one dtype", node)
    axes = len(like or ()) - 2
    if x is None or like is None or len(x) != len(like) or axes < 1 or not norm and _CONVOLUTIONS[node.target] != axes:
        return Refuse("a branch has no batch dimension", node)
    if norm:
        if not isinstance(x[1], int):
            return Refuse("a branch has symbolic sizes", node)
        one = (1,) * axes
        return Branch(node, source, "norm", parts, (x[1], x[1]), x[1], one, one, (0,) * axes, one, float(given["eps"]))
    sizes, groups = shape(parts[0]), given["groups"]
    stride, dilation = _tuple(given["stride"], axes), _tuple(given["dilation"], axes)
    numbers = [*(sizes or (None,)), groups, *stride, *dilation]
    if not all(isinstance(n, int) for n in numbers) or sizes is None:
        return Refuse("a branch has symbolic sizes", node)
    padding = tuple(d * (k - 1) // 2 for k, d in zip(sizes[2:], dilation)) if given["padding"] == "same" else \
        _tuple(0 if given["padding"] == "valid" else given["padding"], axes)  # fmt: skip
    if not all(isinstance(n, int) for n in padding):
        return Refuse("a branch has symbolic sizes", node)
    return Branch(
        node, source, "conv", parts, (sizes[0], groups * sizes[1]), groups, sizes[2:], stride, padding, dilation
    )


def _identity(node: Node, channels: int) -> Branch:
    """``channels`` are those that a convolution of it says: its own size may be symbolic still."""
    axes = len(shape(node) or ()) - 2
    one = (1,) * axes
    return Branch(node, node, "identity", (), (channels, channels), channels, one, one, (0,) * axes, one)


def _tuple(given: Any, axes: int) -> tuple[Any, ...]:
    found = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    return found * axes if len(found) == 1 else found


def _clusters(branches: Sequence[Branch], root: Node) -> list[Merged]:
    """The dearest branch takes in whatever it can at no loss, then the next."""
    found: list[Merged] = []
    for branch in sorted(branches, key=lambda b: -b.cost):
        for index, cluster in enumerate(found):
            together = _together((*cluster.branches, branch), root)
            if together is None:
                continue
            depthwise = together.groups == together.branches[0].channels[0] and math.prod(together.kernel) <= _SMALL
            if together.cost <= (2 if depthwise else 1) * sum(b.cost for b in together.branches):
                found[index] = together
                break
        else:
            alone = _together((branch,), root)
            if alone is not None and branch.kind == "conv":
                found.append(alone)
    return found


def _together(branches: tuple[Branch, ...], root: Node) -> Merged | None:
    """The branches as one convolution, if there is one."""
    first = branches[0]
    if any(b.source is not first.source or b.stride != first.stride or b.channels != first.channels for b in branches):
        return None
    groups = math.gcd(*(b.groups for b in branches))
    if any(b.kind == "identity" for b in branches):
        kind, on_gpu = dtype(root), device(root) != torch.device("cpu")
        if kind not in (torch.float32, torch.float64) or on_gpu and groups != first.channels[0]:
            return None
    kernel, padding, dilation = [], [], []
    for axis, stride in enumerate(first.stride):
        steps = [b.dilation[axis] if b.kernel[axis] > 1 else 0 for b in branches]
        low = max(b.padding[axis] for b in branches)
        high = max((b.kernel[axis] - 1) * b.dilation[axis] - b.padding[axis] for b in branches)
        step = math.gcd(*steps, *(low - b.padding[axis] for b in branches)) or 1
        kernel.append((low + high) // step + 1)
        padding.append(low)
        dilation.append(step)
        size, out = (shape(first.source) or ())[axis + 2], (shape(root) or ())[axis + 2]
        if isinstance(size, int):
            fits = (size + 2 * low - (low + high) - 1) // stride + 1 == out
        else:  # as many places as each branch has, whatever the size
            fits = same(size, out) and stride == 1 and low == high or \
                all((b.kernel[axis] - 1) * b.dilation[axis] - 2 * b.padding[axis] == high - low for b in branches)  # fmt: skip
        if not fits:
            return None
    places = tuple(
        tuple(((padding[a] - b.padding[a]) // dilation[a], b.dilation[a] // dilation[a] if b.kernel[a] > 1 else 1)
              for a in range(len(kernel)))
        for b in branches
    )  # fmt: skip
    return Merged(branches, groups, tuple(kernel), tuple(padding), tuple(dilation), places)


def _written(cluster: Merged, match: Match, facts: Facts) -> Node | None:
    """Who writes the input or an addend between the first branch or addition and the root, which reads them all now."""
    first = min([*(b.node for b in cluster.branches if b.kind != "identity"), *match.adds])
    held = {root for node in (cluster.branches[0].source, *match.addends) for root in facts.roots(node)}
    for root in held:
        for writer in facts.writers.get(root, ()):
            if not writer._erased and writer not in match.adds and first < writer < match.root:
                return writer
    return None


def _insert(cluster: Merged, facts: Facts, key: str, last: bool) -> Node:
    """The convolution in front of its first branch, its weight (``last``: channels-last) and bias derived."""
    branches = cluster.branches
    conv = next(b for b in branches if b.kind == "conv")
    like = tensor(conv.parts[0])
    assert like is not None
    out, into = conv.channels
    parts = [part for b in branches for part in b.parts if part is not None]
    moving = [part for b in branches if b.kind == "norm" for part in b.parts[:2] if part is not None]
    terms = [[b.kind, [part is not None for part in b.parts], b.groups, list(b.kernel), [list(p) for p in place], b.eps.hex()]
             for b, place in zip(branches, cluster.places)]  # fmt: skip
    recipe = ["merge_branches", out, into, cluster.groups, list(cluster.kernel), terms, last]
    given = _plan(out, into, cluster.groups, cluster.kernel, terms, last)
    sizes = (out, into // cluster.groups, *cluster.kernel)
    origin = [b.node for b in branches]
    share = f"merge_branches {recipe[1:]!r} "
    strides = torch.empty(sizes, device="meta").contiguous(memory_format=_format(last, len(sizes))).stride()
    weight = constants.add(facts, parts, _merge(given, False), edit.fake_empty(like, sizes, strides), share + "w",
                           [*recipe, False], origin, moving)  # fmt: skip
    bias = None
    if any(b.kind == "norm" or b.kind == "conv" and b.parts[1] is not None for b in branches):
        bias = constants.add(facts, parts, _merge(given, True), edit.fake_empty(like, [out]), share + "b",
                             [*recipe, True], origin, moving)  # fmt: skip
    first = min(b.node for b in branches if b.kind != "identity")
    graph = facts.gm.graph
    with graph.inserting_before(first):
        args = (conv.source, weight, bias, conv.stride, cluster.padding, cluster.dilation, cluster.groups)
        return edit.insert(graph, conv.node.target, args, origin=origin, key=key)


def _format(last: bool, dim: int) -> torch.memory_format:
    return torch.contiguous_format if not last else torch.channels_last if dim == 4 else torch.channels_last_3d


@dataclass(frozen=True)
class _Plan:
    out: int
    into: int
    groups: int
    kernel: tuple[int, ...]
    terms: tuple[tuple[Any, ...], ...]  # kind, parts there are, groups, kernel, places, eps
    last: bool


def _plan(out: int, into: int, groups: int, kernel: Sequence[int], terms: Sequence[Any], last: bool) -> _Plan:
    listed = tuple((kind, tuple(there), own, tuple(size), tuple((a, b) for a, b in places), float.fromhex(eps))
                   for kind, there, own, size, places, eps in terms)  # fmt: skip
    return _Plan(out, into, groups, tuple(kernel), listed, last)


def _merge(plan: _Plan, want_bias: bool) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """Merged weight [O, I / groups, *kernel] or bias [O] from the parts of all branches in order."""

    def compute(sources: list[torch.Tensor]) -> torch.Tensor:
        kind = sources[0].dtype
        wide = torch.float64
        given = iter(sources)
        size = (plan.out,) if want_bias else (plan.out, plan.into // plan.groups, *plan.kernel)
        total = torch.zeros(size, dtype=wide, device=sources[0].device)
        for name, there, own, kernel, places, eps in plan.terms:
            parts = [next(given).to(wide) if flag else None for flag in there]
            weight, bias = _of_branch(name, parts, eps)
            if want_bias:
                total += 0 if bias is None else bias
                continue
            if weight is None:
                weight = torch.ones(plan.out, dtype=wide, device=total.device)
            steps = (Ellipsis, *(slice(a, a + (k - 1) * d + 1, d) for (a, d), k in zip(places, kernel)))
            fold = own // plan.groups  # groups of the branch within one of the result: blocks on its diagonal
            rows, columns = plan.out // own, plan.into // own
            blocks = total.view(plan.groups, fold, rows, fold, columns, *plan.kernel)[steps]
            diagonal = blocks.diagonal(dim1=1, dim2=3)  # [groups, rows, columns, *kernel, fold]
            diagonal += weight.reshape(plan.groups, fold, rows, columns, *kernel).movedim(1, -1)
        return total.to(kind).contiguous(memory_format=_format(plan.last and not want_bias, len(size)))

    return compute


def _of_branch(
    name: str, parts: list[torch.Tensor | None], eps: float
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight (None: ones on the diagonal) and bias of a branch."""
    if name != "norm":
        return (parts[0], parts[1]) if name == "conv" else (None, None)
    mean, var, gamma, beta = parts
    assert mean is not None and var is not None
    scale = torch.rsqrt(var + eps) if gamma is None else torch.rsqrt(var + eps) * gamma
    return scale, -mean * scale if beta is None else beta - mean * scale


def rebuild(out: Any, into: Any, groups: Any, kernel: Any, terms: Any, last: Any, want_bias: Any,
            count: int) -> Callable[[list[torch.Tensor]], torch.Tensor]:  # fmt: skip
    """The computation of a recipe for ``count`` sources. Raises ValueError or TypeError for what is none."""
    plan = _plan(out, into, groups, kernel, terms, last)
    lengths = {"conv": 2, "norm": 4, "identity": 0}
    numbers = [out, into, groups, *kernel, *(n for t in plan.terms for n in (t[2], *t[3], *(s for _, s in t[4])))]
    if type(last) is not bool or type(want_bias) is not bool or any(type(n) is not int or n < 1 for n in numbers):
        raise ValueError("not merged convolutions")
    for name, there, own, size, places, _ in plan.terms:
        inside = all(type(a) is int and a >= 0 and a + (k - 1) * d < n for (a, d), k, n in zip(places, size, kernel))
        given = all(type(flag) is bool for flag in there) and all(there[: {"conv": 1, "norm": 2}.get(name, 0)])
        if lengths.get(name) != len(there) or not given or not inside or not len(size) == len(places) == len(kernel) or \
                own % groups or out % own or into % own:  # fmt: skip
            raise ValueError("not merged convolutions")
    if sum(sum(t[1]) for t in plan.terms) != count or not count:
        raise ValueError("not merged convolutions")
    return _merge(plan, want_bias)
