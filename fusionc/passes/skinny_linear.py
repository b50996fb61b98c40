"""A linear layer of a few rows takes in the norm before it and the activation, gate or residual sum after it.

Math       add(r, mm(rmsnorm(x), Wᵀ)),  silu(mm(x, W₁ᵀ)) · mm(x, W₂ᵀ),  gelu(addmm(b, x, W)),  …
           →   fusionc::skinny_linear(x, W, …)
Exactness  reassociates: products are summed in another order; every other rounding stays where it is
Legality   inference on a GPU; bfloat16 or float16; x [M, K] with M known and small; W a parameter, not written by the
           graph; what lies inside has no other reader; nothing is written between
Memory     sibling weights that horizontal_matmul laid side by side are read where they are, and the copy is dropped, also
           with many rows: a kernel of ours that reads them apart, or a product of the library each
Cost       one launch instead of two to four, which is most of the time of a small layer; a norm only for one row, where
           computing it again in every program is cheap; more than 16 rows only with small weights, or where the width
           is odd: padding GPT-2's head for the library takes a copy of 77 MB, and one of the result
Source     GPT-fast and TensorRT-LLM decode with fused matrix–vector kernels; measured in NOTES.md
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, device, dtype, is_static_shape, shape, stride, tensor
from ..ops import skinny_linear as op  # noqa: F401  registers the operator
from .base import Match, Pass, Reassociates, Refuse

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim,
          aten.squeeze.dims, aten.squeeze.default, aten.alias.default, aten.detach.default}
_TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default}
_COPIES = {aten._to_copy.default}
_DTYPES = (torch.bfloat16, torch.float16)
FEW = 16  # rows up to which reading the weight is all that counts
SMALL = 1 << 22  # elements of a weight that more rows may have
ALIGN = 8  # columns whose multiple the library wants: without, it is slow, or needs a padded copy of the weight


@dataclass(frozen=True)
class Norm:
    """RMSNorm found in front: of ``x`` with ``weight`` [K]; ``result`` is the node that holds it."""

    x: Node
    weight: Node
    eps: float
    rounds: bool
    result: Node


@dataclass
class Fused:
    """What one operator will do: ``last`` is the node that it replaces."""

    mm: Node
    x: Node  # [M, K]
    weight: Node  # [N, K], or [K, N] if turned
    bias: Node | None
    last: Node
    turned: bool = False
    siblings: bool = False
    norm: Norm | None = None
    activation: str = ""
    gated: bool = False
    residual: Node | None = None


def served(where: torch.device | None, devices: Collection[str]) -> bool:
    """The kernels run on this device: one of ``devices``, and an NVIDIA GPU from sm_80 on if it is a GPU."""
    if where is None or where.type not in devices:
        return False
    if where.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability(where) >= (8, 0)


class SkinnyLinear(Pass):
    """mm and addmm of up to ``rows`` rows, with their surroundings."""

    name = "skinny_linear"
    atomic = True
    exactness = Reassociates(rtol=1e-5)

    def __init__(self, rows: int = op.ROWS, devices: Collection[str] = ("cuda",)) -> None:
        self.rows, self.devices = rows, tuple(devices)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Every mm and addmm on one of the devices."""
        for node in list(facts.gm.graph.nodes):
            if node.op == "call_function" and node.target in (aten.mm.default, aten.addmm.default):
                if served(device(node), self.devices):
                    yield Match({"mm": node, "fused": []}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality. Leaves what to do in ``match.fused``."""
        mm: Node = match.mm
        base = self._product(mm, facts)
        if isinstance(base, Refuse):
            return base
        base.norm = self._norm(base, facts)
        rows, inner = shape(base.x)  # type: ignore[misc]
        if rows <= (FEW if base.siblings and inner * shape(mm)[1] > SMALL else self.rows):  # type: ignore[index]
            _epilogue(base)  # else the library may be faster, and what follows is a kernel of its own
        if any(mm < writer < base.last for writers in facts.writers.values() for writer in writers):
            if not base.siblings:
                return Refuse("memory is written between the product and what follows it", mm)
            # else large weights would be copied for a product that nobody reads apart
            base = replace(base, last=mm, activation="", gated=False, residual=None)
        match.fused.append(base)
        return None

    def _product(self, mm: Node, facts: Facts) -> Fused | Refuse:
        """The bare product, or why it stays with the library."""
        x, right = mm.args[-2:]
        sizes = shape(x)
        if facts.stage != "inference":
            return Refuse("training keeps what lies between", mm)
        if mm.kwargs or not isinstance(x, Node) or not isinstance(right, Node) or sizes is None:
            return Refuse("addmm scales its bias or product", mm)
        most = op.SIBLING_ROWS if edit.derived(facts.gm, _stored(right)) is not None else self.rows
        if not is_static_shape(x) or not 1 <= sizes[0] <= most:
            return Refuse(f"it has more than {self.rows} rows", mm)
        if dtype(mm) not in _DTYPES:
            return Refuse("it is neither bfloat16 nor float16", mm)
        turned = right.op == "placeholder"
        weight = _stored(right)
        if not isinstance(weight, Node) or weight.op != "placeholder" or len(shape(weight) or ()) != 2:
            return Refuse("its weight is computed in the graph", mm)
        derived = weight.name.startswith("derived_") and weight not in facts.static
        if not derived and not facts.constant(weight):
            return Refuse("its weight is not a parameter", mm)
        width, inner = shape(mm)[1], sizes[1]  # type: ignore[index]
        if shape(weight) != ((inner, width) if turned else (width, inner)) or stride(weight) != (shape(weight)[1], 1):  # type: ignore[index]
            return Refuse("its weight is not stored densely", mm)
        if not _aligned(x) or turned and width % 16:
            return Refuse("its rows are not multiples of 16 bytes", mm)
        bias = None
        if mm.target is aten.addmm.default:
            bias = mm.args[0]
            if not isinstance(bias, Node) or shape(bias) != (width,) or stride(bias) != (1,) or dtype(bias) is not dtype(mm):
                return Refuse("its bias is not one vector of its width", mm)
        found = Fused(mm, x, weight, bias, mm, turned)
        found.siblings = len(_parts(found, facts)) > 1
        if not found.siblings:  # they are worth it at any size: no copy of the weights
            if sizes[0] > self.rows:
                return Refuse(f"it has more than {self.rows} rows", mm)
            if sizes[0] > FEW and width * inner > SMALL and (turned or width % ALIGN == 0):
                return Refuse(f"its weight is large and it has more than {FEW} rows", mm)
        return found

    def _norm(self, base: Fused, facts: Facts) -> Norm | None:
        """The norm in front, if every reader of it is a product that can take it in."""
        if shape(base.x)[0] > 1 or base.turned:  # type: ignore[index]
            return None  # the kernel of several rows has no room for it
        norm = _rms_norm(_peel(base.x), dtype(base.mm))
        if norm is None or shape(norm.x)[-1] != shape(base.x)[1]:  # type: ignore[index]
            return None
        stack = [norm.result]
        while stack:
            for user in stack.pop().users:
                if _is(user, *_VIEWS):
                    stack.append(user)
                    continue
                product = _is(user, aten.mm.default, aten.addmm.default)
                if not product or user is not base.mm and not isinstance(self._product(user, facts), Fused):
                    return None
        return norm

    def replace(self, match: Match, facts: Facts) -> None:
        """One call where the last node of it was."""
        (fused,) = match.fused
        graph, last = facts.gm.graph, fused.last
        rows, width = shape(fused.mm)  # type: ignore[misc]
        like, sizes = tensor(last), shape(last)
        assert like is not None and sizes is not None
        width //= 2 if fused.gated else 1
        values = edit.FakeViews(like, (rows, width))
        view = values.view(sizes, like.stride())
        norm = fused.norm
        origin = [fused.mm, last] if last is not fused.mm else [last]
        flat = norm.x if norm is not None else fused.x
        inner = shape(fused.x)[1]  # type: ignore[index]
        with graph.inserting_before(last):
            x = _flat(graph, flat, (rows, inner), origin)
            residual = None if fused.residual is None else _flat(graph, fused.residual, (rows, width), origin)
            chained = _follows(x, residual)
            parts = _parts(fused, facts)
            more: list[Any] = [parts[1:] or None, fused.gated or not fused.activation, fused.turned]
            while more and more[-1] is (None, True, False)[len(more) - 1]:  # the schema's defaults
                more.pop()
            new = edit.insert(
                graph, torch.ops.fusionc.skinny_linear.default,
                (x, parts[0], norm.weight if norm else None, norm.eps if norm else 0.0, bool(norm and norm.rounds),
                 fused.bias, fused.activation, residual, chained, *more),
                origin=origin, val=values.whole)
            if sizes != (rows, width):
                new = edit.insert(graph, aten.view.default, (new, list(sizes)), origin=origin, val=view)
        last.replace_all_uses_with(new)
        edit.erase_dead([last])
        edit.drop_derived(facts.gm, fused.weight)


def _stored(right: Node) -> Any:
    """The weight as it is stored, without a transposition."""
    return right.args[0] if right.op == "call_function" and right.target in _TRANSPOSES else right


def reads_apart(mm: Node) -> bool:
    """Merged with others of one input, this product has its weight read where it is: nothing is copied.

    (16 tokens of a SwiGLU block, H200: gate and up 57 µs as one kernel, 73 as two and one for the activation.)  Or the copy
    is worth it: for one row, a weight that is cast, which each call would read and write otherwise.
    """
    x, right = mm.args[-2:]
    assert isinstance(x, Node) and isinstance(right, Node)
    if dtype(mm) not in _DTYPES or not is_static_shape(x) or not served(device(mm), ("cuda",)):
        return False
    (rows, inner), (_, width) = shape(x), shape(right)  # type: ignore[misc]
    if rows > FEW or not _aligned(x) or width % _block(rows):
        return False
    weight = _stored(right)
    if rows == 1 and _is(weight, *_COPIES):
        return True
    if not isinstance(weight, Node) or weight.op != "placeholder" or weight is right:
        return False  # computed, or stored the other way
    return shape(weight) == (width, inner) and stride(weight) == (inner, 1)


def _aligned(x: Node) -> bool:
    """The rows of x [M, K] begin at multiples of 16 bytes, and end there."""
    (rows, inner), steps = shape(x), stride(x) or (0, 0)  # type: ignore[misc]
    return inner % 8 == 0 and steps[1] == 1 and (rows == 1 or steps[0] % 8 == 0)  # type: ignore[no-any-return]


def _block(rows: int) -> int:
    """Rows of which a sibling weight has a multiple, so that no program's block of them lies in two."""
    return 8 if rows == 1 else op.BLOCK


def _parts(fused: Fused, facts: Facts) -> list[Node]:
    """The weights [Nᵢ, K] that a derived weight lays side by side, if the operator can read them apart; else itself."""
    weight, width = fused.weight, shape(fused.x)[1]  # type: ignore[index]
    entry = edit.derived(facts.gm, weight)
    if entry is None or not isinstance(entry.recipe, list) or entry.recipe[:1] != ["concatenate"]:
        return [weight]
    _, _, transposed, chains = entry.recipe
    inputs = edit.placeholders(facts.gm)
    found = [inputs[position] for position in entry.sources]
    if not transposed or fused.turned or len(found) > (2 if fused.gated else 3) or any(len(chain) != 1 for chain in chains):
        return [weight]
    if any(name not in ("aten::t", "aten::transpose.int", "aten::permute") for ((name, _, _),) in chains):
        return [weight]
    heights = [(shape(node) or (None,))[0] for node in found]
    block = _block(shape(fused.x)[0])  # type: ignore[index]
    if any(not isinstance(height, int) or height % block for height in heights):
        return [weight]
    if fused.gated and heights[0] != heights[1]:
        return [weight]
    if any(shape(node) != (height, width) or stride(node) != (width, 1) for node, height in zip(found, heights)):
        return [weight]
    return found


def _flat(graph: Any, node: Node, sizes: tuple[int, int], origin: list[Node]) -> Node:
    """The node seen as [M, K]."""
    if shape(node) == sizes:
        return node
    return edit.insert(graph, aten.view.default, (node, list(sizes)), origin=origin)


def _follows(*starts: Node | None) -> bool:
    """Another call of ours stands in front: its kernel waited for all before the Program, so weights are complete."""
    stack, seen = [s for s in starts if s is not None], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fusionc" and \
                node.target._opname in CHAINS:
            return True
        stack.extend(node.all_input_nodes)
    return False


CHAINS = {"skinny_linear", "decode_attention", "decode_attention_update"}  # operators that always launch a kernel


# -- what stands in front ---------------------------------------------------------------------------------------------


def _peel(node: Any) -> Any:
    """Through views that keep the order of elements."""
    while isinstance(node, Node) and node.op == "call_function" and node.target in _VIEWS:
        node = node.args[0]
    return node


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def _cast(node: Any, to: torch.dtype | None) -> Node | None:
    """What ``node`` is a cast of, if it is a cast to ``to`` and nothing else."""
    if _is(node, *_COPIES) and set(node.kwargs) <= {"dtype"} and dtype(node) is to and isinstance(node.args[0], Node):
        return node.args[0]
    return None


def _rms_norm(node: Any, to: torch.dtype | None) -> Norm | None:
    """RMSNorm over the last axis with a weight, rounded to ``to`` before or after the weight."""
    if not isinstance(node, Node) or dtype(node) is not to:
        return None
    rounds = _is(node, aten.mul.Tensor)
    product = node if rounds else _cast(node, to)
    if not _is(product, aten.mul.Tensor):
        return None
    for weight, other in (product.args[:2], product.args[1::-1]):  # type: ignore[union-attr]
        h = _cast(other, to) if rounds else other
        sizes, width = shape(weight), (shape(node) or (None,))[-1]
        if not isinstance(h, Node) or not isinstance(weight, Node) or sizes != (width,) or stride(weight) != (1,):
            continue
        if rounds and dtype(weight) is not to or dtype(weight) not in (to, torch.float32):
            continue
        found = _normalised(h, to)
        if found is not None:
            return Norm(found[0], weight, found[1], rounds, node)
    return None


def _normalised(h: Node, to: torch.dtype | None) -> tuple[Node, float] | None:
    """(x, eps) if h = x₃₂ · rsqrt(mean(x₃₂²) + eps) with x₃₂ a cast of a contiguous x of dtype ``to``."""
    if not _is(h, aten.mul.Tensor):
        return None
    for wide, scale in (h.args[:2], h.args[1::-1]):
        x = _cast(wide, torch.float32)
        if x is None or dtype(x) is not to or not _is(scale, aten.rsqrt.default) or not _contiguous(x):
            continue
        total = scale.args[0]
        if not _is(total, aten.add.Tensor) or not isinstance(total.args[1], float) or total.kwargs:
            continue
        mean, eps = total.args[:2]
        last = len(shape(x) or ()) - 1
        if not _is(mean, aten.mean.dim) or mean.kwargs or len(mean.args) != 3 or mean.args[2] is not True:
            continue
        if list(mean.args[1]) not in ([-1], [last]):
            continue
        square = mean.args[0]
        if _is(square, aten.pow.Tensor_Scalar) and square.args == (wide, 2) or \
                _is(square, aten.mul.Tensor) and square.args == (wide, wide):
            return x, eps
    return None


def _contiguous(node: Any) -> bool:
    found = tensor(node)
    return found is not None and is_static_shape(node) and found.is_contiguous()


# -- what follows -----------------------------------------------------------------------------------------------------


def _epilogue(base: Fused) -> None:
    """Extend ``base`` by a gate, or by an activation and a residual sum."""
    gated = _gate(base.mm)
    if gated is not None:
        base.last, base.activation = gated
        base.gated = True
        return
    end = _tail(base.mm)
    active = _activation(end) if base.norm is None else None
    if active is not None:
        base.last, base.activation = active
        end = _tail(base.last)
    user = _only_user(end)
    if not _is(user, aten.add.Tensor) or user.kwargs:  # type: ignore[union-attr]
        return
    a, b = user.args[:2]  # type: ignore[union-attr]
    residual = b if a is end else a
    if residual is end or not isinstance(residual, Node) or dtype(residual) is not dtype(end):
        return
    if shape(residual) == shape(end) == shape(user) and _contiguous(residual) and _contiguous(user):
        base.last, base.residual = user, residual  # type: ignore[assignment]


_ACTIVATIONS = {aten.silu.default: "silu", aten.relu.default: "relu", aten.gelu.default: "gelu"}


def _word(node: Node) -> str:
    """What the operator calls this activation, or ""."""
    word = _ACTIVATIONS.get(node.target, "") if node.op == "call_function" else ""  # type: ignore[call-overload]
    return "gelu_tanh" if word == "gelu" and node.kwargs.get("approximate") == "tanh" else word


def _activation(end: Node) -> tuple[Node, str] | None:
    """(node, activation) of what alone reads ``end``; also gelu with tanh spelled out, as Hugging Face's GPT-2 has it."""
    user = _only_user(end)
    if user is not None:
        word = _word(user)
        return (user, word) if word and _contiguous(user) and shape(user) == shape(end) else None
    cube = _only([u for u in end.users if _is(u, aten.pow.Tensor_Scalar) and u.args == (end, 3)])
    sum_ = _times(_only_user(cube), cube, 0.044715)
    inner = _only_user(sum_) if sum_ is not None else None
    if not _is(inner, aten.add.Tensor) or set(inner.args) != {end, sum_} or inner.kwargs:  # type: ignore[union-attr]
        return None
    scaled = _times(_only_user(inner), inner, 0.7978845608028654)  # type: ignore[arg-type]
    tanh = _only_user(scaled) if scaled is not None else None
    one = _only_user(tanh) if _is(tanh, aten.tanh.default) else None  # type: ignore[arg-type]
    if not _is(one, aten.add.Tensor) or one.args != (tanh, 1) or one.kwargs:  # type: ignore[union-attr]
        return None
    product = _only_user(one)  # type: ignore[arg-type]
    half = _only([u for u in end.users if _times(u, end, 0.5) is not None])
    if half is None or _only_user(half) is not product or set(end.users) != {cube, inner, half}:
        return None
    if not _is(product, aten.mul.Tensor) or set(product.args) != {half, one}:  # type: ignore[union-attr]
        return None
    inside = (cube, sum_, inner, scaled, tanh, one, half, product)
    if any(dtype(n) is not dtype(end) or shape(n) != shape(end) or not _contiguous(n) for n in inside):
        return None
    return product, "gelu_tanh"  # type: ignore[return-value]


def _only(nodes: list[Node]) -> Node | None:
    return nodes[0] if len(nodes) == 1 else None


def _times(node: Node | None, of: Node | None, factor: float) -> Node | None:
    """``node`` if it is ``of`` times this number."""
    if of is None or not _is(node, aten.mul.Tensor) or node.args[0] is not of:  # type: ignore[union-attr]
        return None
    found = node.args[1]  # type: ignore[union-attr]
    return node if isinstance(found, (int, float)) and abs(found - factor) <= 1e-12 else None


def _only_user(node: Node | None) -> Node | None:
    if node is None:
        return None
    return next(iter(node.users)) if len(node.users) == 1 else None


def _tail(node: Node) -> Node:
    """The last of the order-keeping views that are each other's only readers."""
    while True:
        user = _only_user(node)
        if user is None or not _is(user, *_VIEWS) or not _contiguous(user):
            return node
        node = user


def _halves(mm: Node) -> tuple[Node, Node] | None:
    """The two halves of the product's columns, if it is read in no other way."""
    end = mm if len(mm.users) == 2 else _tail(mm)
    width = shape(mm)[1]  # type: ignore[index]
    if width % 2:
        return None
    users = list(end.users)
    last = len(shape(end) or ()) - 1
    if len(users) == 1 and _is(users[0], aten.split.Tensor) and users[0].args[1] == width // 2:
        if (users[0].args[2] if len(users[0].args) > 2 else 0) not in (-1, last):
            return None
        parts: dict[Any, Node] = {u.args[1]: u for u in users[0].users if u.target is operator.getitem}
        return (parts[0], parts[1]) if len(parts) == 2 == len(users[0].users) else None
    if len(users) != 2 or not all(_is(u, aten.slice.Tensor) and len(u.args) == 4 for u in users):
        return None
    cuts = {u.args[2]: u for u in users if u.args[1] in (-1, last)}
    if set(cuts) != {0, width // 2}:
        return None
    gate, up = cuts[0], cuts[width // 2]
    if shape(gate) != shape(up) or shape(gate)[-1] != width // 2:  # type: ignore[index]
        return None
    return gate, up


def _gate(mm: Node) -> tuple[Node, str] | None:
    """(node, activation) if the product is read as activation(left half) · right half."""
    halves = _halves(mm)
    if halves is None:
        return None
    gate, up = _views(halves[0]), _views(halves[1])
    act = _only_user(gate)
    word = _word(act) if act is not None else ""
    if not word:
        return None
    end = _tail(act)  # type: ignore[arg-type]
    product = _only_user(end)
    if not _is(product, aten.mul.Tensor) or set(product.args[:2]) != {end, up} or _only_user(up) is not product:  # type: ignore[union-attr]
        return None
    if not _contiguous(product) or shape(product) != shape(end) or shape(product) != shape(up):
        return None
    return product, word  # type: ignore[return-value]


def _views(node: Node) -> Node:
    """Like ``_tail``, for a part whose rows are apart."""
    while True:
        user = _only_user(node)
        if user is None or not _is(user, *_VIEWS) or (shape(user) or (0,))[-1] != (shape(node) or (1,))[-1]:
            return node
        node = user
