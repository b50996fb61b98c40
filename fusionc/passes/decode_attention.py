"""Attention of one query over a key/value cache: one kernel, with the rotation and the cache update where they fit.

Math       sdpa(rope(q), repeat(index_copy_(K, rope(k))), repeat(index_copy_(V, v)), mask)
           →   fusionc::decode_attention_update(q, k, v, cos, sin, K, V, index, mask)
Exactness  reassociates: the softmax is summed in ranges; the rotation is rounded as before
Legality   inference on a GPU; one query; 16-bit; heads of 16…256 elements, a power of two; no dropout, not causal; only
           the first result is used. For the update: both caches are inputs that only these index_copy_ write and only
           this attention reads, at one index of one element
Cost       one launch instead of six to ten and no repeated K and V; ranges that the mask hides are not read
Source     Flash-Decoding; the graph that Hugging Face gives with a static cache
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, device, dtype, is_static_shape, shape, stride, tensor
from ..ops import decode_attention as op  # noqa: F401  registers the operators
from .base import Match, Pass, Reassociates, Refuse
from .skinny_linear import _follows, _is, served

aten = torch.ops.aten
_SDPA = {
    getattr(aten, name).default
    for name in ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention",
                 "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention_for_cpu")
}
_WIDTHS = (16, 32, 64, 128, 256)


@dataclass
class Rotation:
    """x · cos + rotate_half(x) · sin."""

    x: Node
    cos: Node
    sin: Node


@dataclass
class Update:
    """The writes into the caches that belong to one attention."""

    key: Node  # the index_copy_ nodes
    value: Node
    index: Node
    rotated: tuple[Rotation, Rotation] | None  # of q and k


@dataclass
class Found:
    """One attention to replace."""

    result: Node
    q: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float
    update: Update | None


class DecodeAttention(Pass):
    """SDPA with one query."""

    name = "decode_attention"
    atomic = True
    exactness = Reassociates(rtol=1e-5)

    def __init__(self, devices: Collection[str] = ("cuda",)) -> None:
        self.devices = tuple(devices)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Every SDPA node on one of the devices."""
        for node in list(facts.gm.graph.nodes):
            if node.op == "call_function" and node.target in _SDPA and isinstance(node.args[0], Node):
                if served(device(node.args[0]), self.devices):
                    yield Match({"node": node, "found": []}, (node,))

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality. Leaves what to do in ``match.found``."""
        node: Node = match.node
        given = _arguments(node)
        q, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_bias", given.get("attn_mask"))
        if facts.stage != "inference":
            return Refuse("training needs its backward", node)
        if not all(is_static_shape(x) for x in (q, key, value)) or shape(q)[2] != 1:  # type: ignore[index]
            return Refuse("it has more than one query, or sizes are not known", node)
        if dtype(q) not in (torch.bfloat16, torch.float16) or shape(q)[3] not in _WIDTHS:  # type: ignore[index]
            return Refuse("dtype or head size that the kernel does not take", node)
        if shape(key) != shape(value) or shape(q)[3] != shape(key)[3]:  # type: ignore[index]
            return Refuse("keys and values differ in size", node)
        if given.get("dropout_p") or given.get("is_causal") or given.get("return_debug_mask"):
            return Refuse("dropout or a causal flag", node)
        users = list(node.users)
        if len(users) != 1 or users[0].target is not operator.getitem or users[0].args[1] != 0:
            return Refuse("more than its first result is used", node)
        if mask is not None and (len(shape(mask) or ()) != 4 or dtype(mask) not in (torch.bool, torch.float32, dtype(q))):
            return Refuse("a mask of another form", node)
        if mask is not None and not _covers(mask, q, key):
            return Refuse("a mask of another form", node)
        heads, width = shape(q)[1], shape(q)[3]  # type: ignore[index]
        key, value = _unrepeated(key, heads), _unrepeated(value, heads)
        groups = shape(key)[1]  # type: ignore[index]
        if shape(value) != shape(key) or heads % groups or heads // groups > 16:
            return Refuse("query heads are no small multiple of key heads", node)
        if any((stride(x) or (0,))[-1] != 1 for x in (q, key, value)):
            return Refuse("heads are not contiguous", node)
        scale = given.get("scale")
        found = Found(users[0], q, key, value, mask, width**-0.5 if scale is None else scale, None)
        found.update = _update(found, facts)
        size = tensor(users[0])
        if size is None or not size.transpose(1, 2).is_contiguous() and not size.is_contiguous():
            return Refuse("the result has another layout", node)
        match.found.append(found)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """One call where the attention was; the writes into the caches move there."""
        (found,) = match.found
        graph, node, update = facts.gm.graph, match.node, found.update
        like = tensor(found.q)
        assert like is not None
        batch, heads, _, width = shape(found.q)  # type: ignore[misc]
        values = edit.FakeViews(like, (batch, 1, heads, width))
        view = values.view((batch, heads, 1, width), (heads * width, width, heads * width, 1))
        origin = [node]
        with graph.inserting_before(node):
            if update is None:
                chained = _follows(found.q)
                new = edit.insert(graph, torch.ops.fusionc.decode_attention.default,
                                  (found.q, found.key, found.value, found.mask, found.scale, chained),
                                  origin=origin, val=values.whole)
            else:
                origin = [node, update.key, update.value]
                q, k, cos, sin = found.q, update.key.args[3], None, None
                if update.rotated is not None:
                    q, k = update.rotated[0].x, update.rotated[1].x
                    cos, sin = update.rotated[0].cos, update.rotated[0].sin
                new = edit.insert(
                    graph, torch.ops.fusionc.decode_attention_update.default,
                    (q, k, update.value.args[3], cos, sin, update.key.args[0], update.value.args[0],
                     _scalar(update.index), found.mask, found.scale, _follows(q)),
                    origin=origin, val=values.whole)
            new = edit.insert(graph, aten.transpose.int, (new, 1, 2), origin=origin, val=view)
        found.result.replace_all_uses_with(new)
        sources = list(node.all_input_nodes)
        graph.erase_node(found.result)
        graph.erase_node(node)
        edit.erase_dead(sources)
        if update is not None:
            for write in (update.key, update.value):
                inputs = list(write.all_input_nodes)
                graph.erase_node(write)
                edit.erase_dead(inputs)


def _arguments(node: Node) -> dict[str, Any]:
    """Arguments by the names of the schema."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args)), **node.kwargs}


def _covers(mask: Node, q: Node, key: Node) -> bool:
    """[B or 1, H or 1, 1, S]: the kernel reads a number for each key, so a mask spread over the keys is not one."""
    sizes, queries, keys = shape(mask), shape(q), shape(key)
    assert sizes is not None and queries is not None and keys is not None
    return sizes[0] in (1, queries[0]) and sizes[1] in (1, queries[1]) and tuple(sizes[2:]) == (1, keys[2])


def _unrepeated(node: Node, heads: int) -> Node:
    """[B, HKV, S, D] whose heads were repeated to give this node (expand and reshape), else the node itself."""
    sizes = shape(node)
    inner: Any = node
    while _is(inner, aten._unsafe_view.default, aten.view.default, aten.reshape.default, aten.clone.default):
        inner = inner.args[0]
    if not _is(inner, aten.expand.default) or not _is(inner.args[0], aten.unsqueeze.default):
        return node
    base, dim = inner.args[0].args
    kept, wide = shape(base), shape(inner)
    if kept is None or wide is None or sizes is None or len(kept) != 4 or dim != 2:
        return node
    if wide != (kept[0], kept[1], heads // kept[1], kept[2], kept[3]) or sizes != (kept[0], heads, kept[2], kept[3]):
        return node
    return base


def _update(found: Found, facts: Facts) -> Update | None:
    """The two writes in front, if they are this attention's alone."""
    key, value = found.key, found.value
    if not (_is(key, aten.index_copy_.default) and _is(value, aten.index_copy_.default)) or key is value:
        return None
    if key.args[1] != 2 or value.args[1] != 2 or key.args[2] is not value.args[2]:
        return None
    index = key.args[2]
    if not isinstance(index, Node) or shape(index) not in ((1,), ()) or dtype(index) is not torch.int64:
        return None
    for write in (key, value):
        cache, new = write.args[0], write.args[3]
        if not isinstance(cache, Node) or cache.op != "placeholder" or set(cache.users) != {write}:
            return None
        if facts.writers.get(cache, []) != [write] or not isinstance(new, Node) or (stride(new) or (0,))[-1] != 1:
            return None
        readers = list(write.users)  # views and copies on the way to the attention, one reader each
        while readers:
            user = readers.pop()
            if user is found.result.args[0]:
                continue
            if not _is(user, aten.unsqueeze.default, aten.expand.default, aten.clone.default, aten.view.default,
                       aten._unsafe_view.default, aten.reshape.default):
                return None
            readers.extend(user.users)
    if key.args[0] is value.args[0]:
        return None
    q, k = _rotation(found.q), _rotation(key.args[3])
    rotated = None
    if q is not None and k is not None and q.cos is k.cos and q.sin is k.sin and set(key.args[3].users) == {key}:  # type: ignore[union-attr]
        rotated = (q, k)
    return Update(key, value, index, rotated)


def _rotation(node: Any) -> Rotation | None:
    """x · cos + cat(−x₂, x₁) · sin, with cos and sin [B or 1, 1, 1, D]."""
    if not _is(node, aten.add.Tensor) or node.kwargs:
        return None
    for straight, crossed in (node.args[:2], node.args[1::-1]):
        if not (_is(straight, aten.mul.Tensor) and _is(crossed, aten.mul.Tensor)):
            return None
        for turned, sin in (crossed.args[:2], crossed.args[1::-1]):
            x = _turned(turned)
            if x is None or x not in straight.args[:2]:
                continue
            cos = straight.args[1] if straight.args[0] is x else straight.args[0]
            sizes = shape(x)
            good = [c for c in (cos, sin) if isinstance(c, Node) and dtype(c) is dtype(x) and (stride(c) or (0,))[-1] == 1
                    and shape(c) in ((1, 1, 1, sizes[3]), (sizes[0], 1, 1, sizes[3]))]  # type: ignore[index]
            if len(good) == 2 and shape(cos) == shape(sin) and stride(cos) == stride(sin) and stride(x)[-1] == 1:  # type: ignore[index]
                return Rotation(x, cos, sin)  # type: ignore[arg-type]
    return None


def _turned(node: Any) -> Node | None:
    """x of cat(−x[half:], x[:half])."""
    if not _is(node, aten.cat.default) or len(node.args[0]) != 2 or len(node.args) < 2:
        return None
    minus, low = node.args[0]
    if not _is(minus, aten.neg.default) or not _is(minus.args[0], aten.slice.Tensor) or not _is(low, aten.slice.Tensor):
        return None
    high = minus.args[0]
    x = low.args[0]
    sizes = shape(x)
    if high.args[0] is not x or sizes is None or len(sizes) != 4 or node.args[1] not in (-1, 3):
        return None
    half = sizes[3] // 2
    if tuple(low.args[1:]) not in ((3, 0, half), (-1, 0, half)) or high.args[1] not in (3, -1) or high.args[2] != half:
        return None
    return x if shape(low) == shape(high) == (*sizes[:3], half) else None


def _scalar(index: Node) -> Node:
    """The number that a one-element index is made of: ``arange(1) + n`` is n."""
    if _is(index, aten.add.Tensor) and not index.kwargs:
        for zero, other in (index.args[:2], index.args[1::-1]):
            if _is(zero, aten.arange.default) and zero.args == (1,) and isinstance(other, Node) \
                    and shape(other) == () and dtype(other) is torch.int64:
                return other
    return index
