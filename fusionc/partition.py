"""AOTAutograd's cut of a training step into forward and backward, after three changes to the joint graph.

The cut saves the fewest bytes between the two graphs (`min_cut_rematerialization_partition`).  It cannot see that

* a log-softmax can be made anew from its operand, which may be of half precision, and two numbers a row, where the result
  is float32 and often the largest tensor of a language model's step: the operator is taken apart, and so is its gradient
  (in training only: for inference the whole operator is one kernel already);
* zeros that only take another tensor's sizes (those that the gradient of a gather is scattered into) do not need the
  tensor: they get the sizes themselves;
* `detach` means nothing any more.

Source: min-cut rematerialisation as in functorch (Chen et al. 2016 for recomputation itself); Inductor makes the same
changes in its joint graph passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_aten = torch.ops.aten


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
            if node.meta["val"].numel() != 0:
                _take_apart(node, parts)
    for node in graph.find_nodes(op="call_function", target=_aten.zeros_like.default):
        _zeros_of_its_own(node)


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
    """Put the operators of ``parts`` in a node's place."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph, given = node.graph, [a for a in node.args if isinstance(a, Node)]
    rest = [a for a in node.args if not isinstance(a, Node)]  # they come after the tensors

    def call(*tensors: Tensor) -> Tensor:
        return parts(*tensors, *rest)

    values = [a.meta["val"] for a in given]
    with values[0].fake_mode:
        traced = make_fx(call)(*values)
    known = dict(zip(traced.graph.find_nodes(op="placeholder"), given))
    about = {key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta")}
    with graph.inserting_before(node):
        for step in traced.graph.nodes:
            if step.op == "call_function":
                known[step] = graph.node_copy(step, known.__getitem__)
                known[step].meta = {**about, "val": step.meta["val"]}
    (result,) = traced.graph.find_nodes(op="output")[0].all_input_nodes
    node.replace_all_uses_with(known[result])
    graph.erase_node(node)


def _zeros_of_its_own(node: Node) -> None:
    value = node.meta["val"]
    if value.layout is not torch.strided or not value.is_contiguous() or any(type(n) is not int for n in value.shape):
        return
    about = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    with node.graph.inserting_before(node):
        made = node.graph.call_function(_aten.full.default, (list(value.shape), 0), about)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
