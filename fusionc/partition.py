"""AOTAutograd's cut of a training step into forward and backward, after four changes to the joint graph.

The cut saves the fewest bytes between the two graphs (`min_cut_rematerialization_partition`).  It cannot see that

* a log-softmax can be made anew from its operand, which may be of half precision, and two numbers a row, where the result
  is float32 and often the largest tensor of a language model's step: the operator is taken apart, and so is its gradient
  (in training only: for inference the whole operator is one kernel already);
* zeros that only take another tensor's sizes (those that the gradient of a gather is scattered into) do not need the
  tensor: they get the sizes themselves;
* the gradient of max pooling reads nothing of the image, and its positions fit into a byte (`ops.max_pool`; on a GPU);
* `detach` means nothing any more.

Source: min-cut rematerialisation as in functorch (Chen et al. 2016 for recomputation itself); Inductor makes the same
changes in its joint graph passes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .graph.facts import each, same_strides

_aten = torch.ops.aten
_POOLS = ("cuda",)  # where pooling has kernels of ours


def partition(joint: GraphModule, inputs: Sequence[Any], **more: Any) -> tuple[GraphModule, GraphModule]:
    """The forward and the backward graph; changes ``joint``. ``more`` is what AOTAutograd hands a partitioner."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    prepare(joint)
    return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **more)


def prepare(joint: GraphModule) -> None:
    """The changes to the joint graph."""
    graph = joint.graph
    for node in graph.find_nodes(op="call_function", target=_aten.detach.default):
        if all(user.op == "call_function" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for target, parts in ((_aten._log_softmax.default, log_softmax),
                          (_aten._log_softmax_backward_data.default, log_softmax_backward)):  # fmt: skip
        for node in graph.find_nodes(op="call_function", target=target):
            _take_apart(node, parts)
    for node in graph.find_nodes(op="call_function", target=_aten.zeros_like.default):
        _zeros_of_its_own(node)
    for node in graph.find_nodes(op="call_function", target=_aten.max_pool2d_with_indices.default):
        if node.meta["val"][0].device.type in _POOLS:
            _positions_in_bytes(node)


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """`aten._log_softmax` in parts."""
    wide = x.to(_work(x))
    shifted = wide - torch.amax(wide, dim, keepdim=True)
    y = shifted - torch.log(torch.sum(torch.exp(shifted), dim, keepdim=True))
    return y if half_to_float else y.to(x.dtype)


def log_softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """`aten._log_softmax_backward_data` in parts."""
    wide = grad.to(_work(y))
    return (wide - torch.exp(y.to(_work(y))) * torch.sum(wide, dim, keepdim=True)).to(dtype)


def _work(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _take_apart(node: Node, parts: Callable[..., Tensor]) -> None:
    """Put the operators of ``parts`` in a node's place, unless their result lies otherwise in memory: ATen's is contiguous
    whatever the operand, and what follows may be a view of it. A dimension without elements has no maximum."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    graph, given, value = node.graph, [a for a in node.args if isinstance(a, Node)], node.meta["val"]
    rest: list[Any] = [a for a in node.args if not isinstance(a, Node)]  # they come after the tensors
    length = value.shape[rest[0]] if value.dim() else 1
    if type(length) is not int or length == 0 or free_unbacked_symbols(value):
        return

    def call(*tensors: Tensor) -> Tensor:
        return parts(*tensors, *rest)

    values = [a.meta["val"] for a in given]
    with values[0].fake_mode:
        traced = make_fx(call)(*values)
    (result,) = traced.graph.find_nodes(op="output")[0].all_input_nodes
    if not same_strides(value.shape, value.stride(), result.meta["val"].stride()):
        return
    known = dict(zip(traced.graph.find_nodes(op="placeholder"), given))
    about = {key: part for key, part in node.meta.items() if key not in ("val", "tensor_meta")}
    with graph.inserting_before(node):
        for step in traced.graph.nodes:
            if step.op == "call_function":
                known[step] = graph.node_copy(step, known.__getitem__)
                known[step].meta = {**about, "val": step.meta["val"]}
    node.replace_all_uses_with(known[result])
    graph.erase_node(node)


def _zeros_of_its_own(node: Node) -> None:
    value = node.meta["val"]
    if value.layout is not torch.strided or any(type(n) is not int for n in value.shape) or not value.is_contiguous():
        return
    about = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    with node.graph.inserting_before(node):
        made = node.graph.call_function(_aten.full.default, (list(value.shape), 0), about)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _positions_in_bytes(pool: Node) -> None:
    """max_pool2d_with_indices and its gradients → max_pool2d_with_places, max_pool2d_gradient.

    One operator has both results: the cut makes places alone anew in the backward, for which it keeps the image.
    """
    from .ops import max_pool

    graph, x = pool.graph, pool.args[0]
    given: list[Any] = [*pool.args[1:], *([], 0, 1, False)[len(pool.args) - 2 :]]
    kernel, stride, padding, dilation = (each(numbers, 2) for numbers in (given[0], given[1] or given[0], *given[2:4]))
    taken = [user for user in pool.users if user.args[1] == 1]
    gradients = [g for each in taken for g in each.users]
    value = x.meta["val"]  # type: ignore[union-attr]
    sizes = (*value.shape, *kernel, *stride, *padding)
    if (
        not gradients
        or any(g.target is not _aten.max_pool2d_with_indices_backward.default or g.args[7] not in taken for g in gradients)
        or any(type(n) is not int for n in sizes) or dilation != [1, 1] or kernel[0] * kernel[1] > max_pool.LARGEST
        or value.dtype not in (torch.float32, torch.float16, torch.bfloat16)
    ):  # fmt: skip
        return
    ours = torch.ops.fusionc
    window = (kernel, stride, padding)
    with value.fake_mode:
        both = ours.max_pool2d_with_places(value, *window, bool(given[4]))
        made = [ours.max_pool2d_gradient(g.args[0].meta["val"], both[1], list(value.shape[-2:]), *window) for g in gradients]
    if any(new.stride() != g.meta["val"].stride() for new, g in zip(made, gradients)):
        return
    with graph.inserting_before(pool):
        whole = graph.call_function(ours.max_pool2d_with_places.default, (x, *window, bool(given[4])))
        pooled, places = (graph.call_function(operator.getitem, (whole, k)) for k in (0, 1))
    for step, val in ((whole, both), (pooled, both[0]), (places, both[1])):
        step.meta = {**pool.meta, "val": val}
    for g, new in zip(gradients, made):
        with graph.inserting_before(g):
            gradient = graph.call_function(ours.max_pool2d_gradient.default, (g.args[0], places, list(value.shape[-2:]), *window))
        gradient.meta = {**g.meta, "val": new}
        g.replace_all_uses_with(gradient)
        graph.erase_node(g)
    for user in list(pool.users):
        if user not in taken:
            user.replace_all_uses_with(pooled)
        graph.erase_node(user)
    graph.erase_node(pool)
