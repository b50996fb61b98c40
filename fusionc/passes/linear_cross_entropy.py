"""The last linear layer and cross entropy become one operator that never holds all logits.

Math       cross_entropy(slice(x Wᵀ + b), t)  =  fusionc::linear_cross_entropy(slice(x), W, b, t): same loss and gradients,
           computed chunk of tokens by chunk of tokens, the gradients in the forward for an incoming gradient of 1
Exactness  reassociates: dW is summed over chunks (one more rounding to its dtype each)
Legality   nobody else reads the logits, and between the layer and the loss they are only widened, reshaped and cut along
           tokens; mean or sum over int64 targets, no class weights; not float16, whose gradients live on the loss scale
Cost       three matmuls as before; instead of the logits, their float32 copy and their gradient one chunk of logits lives.
           A forward with gradients enabled makes them even if no backward follows: use no_grad for evaluation
Source     Liger Kernel (arXiv 2410.10989); conditions from ``specs/quant_moe_training.md`` §11
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from .. import ops
from ..graph import edit
from ..graph.facts import Facts, device, dtype, same, shape, tensor, value
from .base import Match, Pass, Reassociates, Refuse

_LINEAR = (torch._C._nn.linear, torch.nn.functional.linear)
_MATMUL = (torch.matmul, torch.mm, operator.matmul, "matmul", "mm")
_TURNS = {"t": (), "T": (), "mT": (), "transpose": ((0, 1), (1, 0), (-2, -1), (-1, -2)), "permute": ((1, 0), ((1, 0),))}
_CASTS = ("float", "double", "to", "type", "contiguous")
_VIEWS = ("view", "reshape", "flatten")
_NAMES = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
_DEFAULTS = (None, None, None, None, -100, None, "mean", 0.0)
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch._subclasses.FakeTensor)


class LinearCrossEntropy(Pass):
    """Model level. ``places``: devices; ``least``: number of logits below which nothing is gained."""

    name = "linear_cross_entropy"
    exactness = Reassociates(rtol=1e-2)
    level = "model"

    def __init__(self, places: Sequence[str] = ("cuda",), least: int = 1 << 23) -> None:
        self.places, self.least = tuple(places), least

    def find(self, facts: Facts) -> Iterator[Match]:
        """cross_entropy calls and the chain of calls that leads from a linear layer to them."""
        for node in list(facts.gm.graph.nodes):
            if node.op != "call_function" or node.target is not torch.nn.functional.cross_entropy:
                continue
            given = dict(zip(_NAMES, _DEFAULTS)) | dict(zip(_NAMES, node.args)) | node.kwargs
            chain: list[Node] = []
            source = given["input"]
            while isinstance(source, Node) and source.args and _word(source) in (*_CASTS, *_VIEWS, "getitem"):
                chain.append(source)
                source = source.args[0]
            layer = _layer(source)
            if layer is not None:
                yield Match(
                    {"loss": node, "given": given, "chain": chain[::-1], "linear": source, **layer},
                    (source, *chain[::-1], node),
                )

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        loss, given, linear, x, weight = match.loss, match.given, match.linear, match.x, match.weight
        where = device(loss)
        if where is None or where.type not in self.places:
            return Refuse("not on a CUDA device", loss)
        refusal = _loss(loss, given)
        if refusal is not None:
            return refusal
        for node in (linear, *match.chain):
            if len(node.users) != 1:
                return Refuse("the logits have another reader", node)
        operands = [n for n in (x, weight, match.bias) if n is not None]
        if any(type(value(n)) not in _PLAIN for n in operands):
            return Refuse("an operand is a tensor subclass", linear)
        words = (shape(weight) or (None,))[0]
        if len(shape(weight) or ()) != 2 or not isinstance(words, int):
            return Refuse("the weight is not a matrix of fixed size", weight)
        if dtype(linear) not in (torch.bfloat16, torch.float32, torch.float64):
            return Refuse("float16 gradients would lose the loss scale" if dtype(linear) == torch.float16 else
                          "the logits are not floating-point numbers", linear)  # fmt: skip
        before = dtype(linear)
        for node in match.chain:
            refusal = _step(node, words, before)
            if refusal is not None:
                return refusal
            before = dtype(node)
        if len(shape(given["input"]) or ()) != 2:
            return Refuse("the words are not the last of two dimensions", loss)
        if any(
            linear < writer < loss
            for n in operands
            for root in facts.roots(n)
            for writer in facts.writers.get(root, ())
        ):
            return Refuse("memory of an operand is written before the loss is taken", loss)
        rows = (shape(given["input"]) or (0,))[0]
        if isinstance(rows, int) and rows * words < self.least:
            return Refuse("the logits are small", loss)
        return None

    def replace(self, match: Match, facts: Facts) -> None:
        """The operator where the loss was; x is cut and reshaped as the logits were."""
        loss, given, linear = match.loss, match.given, match.linear
        graph = facts.gm.graph
        ops.load(self.name)
        learning = _learns(loss)
        wanted = [learning and _learns(n) for n in (match.x, match.weight, match.bias)]
        origin = (linear, loss)

        def call(target: Any, *args: Any, **kwargs: Any) -> Node:
            return edit.insert(graph, target, args, kwargs, origin=origin, key="example_value")

        with graph.inserting_before(loss):
            x, weight, bias = (
                n if n is None or dtype(n) == dtype(linear) else call(torch.Tensor.to, n, dtype(linear))
                for n in (match.x, match.weight, match.bias)
            )
            width = (shape(match.weight) or (0, 0))[1]
            for node in match.chain:
                word = _word(node)
                if word == "getitem":
                    x = call(operator.getitem, x, node.args[1])
                elif word == "flatten":
                    x = call(torch.flatten, x, *node.args[1:], **node.kwargs)
                elif word in _VIEWS:
                    x = call(torch.reshape, x, (*_sizes(node)[:-1], width))
            args = (x, weight, bias, given["target"], given["ignore_index"], given["reduction"] == "mean",
                    given["label_smoothing"], dtype(loss), wanted)  # fmt: skip
            made = call(torch.ops.fusionc.linear_cross_entropy.default, *args)
            made = edit.insert(graph, operator.getitem, (made, 0), origin=origin, val=value(loss), key="example_value")
        edit.replace(loss, made)
        for node in (*match.chain[::-1], linear):
            edit.erase_dead([node])


def _word(node: Node) -> str:
    """The name of a method or of the function of that name, "" for what is neither."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    if node.target is getattr and len(node.args) == 2:
        return str(node.args[1])
    name = getattr(node.target, "__name__", "")
    return name if getattr(torch, name, None) is node.target else ""


def _layer(node: Any) -> dict[str, Any] | None:
    """x, weight [V, K] and bias of a linear layer or of x @ weightᵀ."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.target in _LINEAR:
        found = dict(zip(("input", "weight", "bias"), node.args)) | node.kwargs
        parts = {"x": found.get("input"), "weight": found.get("weight"), "bias": found.get("bias")}
    elif node.target in _MATMUL and len(node.args) == 2 and not node.kwargs and isinstance(node.args[1], Node):
        turn = node.args[1]
        dims = tuple(tuple(d) if isinstance(d, list) else d for d in turn.args[1:])
        word = _word(turn)
        known = _TURNS.get(word)
        if known is None or turn.kwargs or known and dims not in known or len(shape(turn) or ()) != 2:
            return None
        parts = {"x": node.args[0], "weight": turn.args[0], "bias": None}
    else:
        return None
    return parts if isinstance(parts["x"], Node) and isinstance(parts["weight"], Node) else None


def _loss(loss: Node, given: dict[str, Any]) -> Refuse | None:
    """What the operator does not do."""
    if given["weight"] is not None:
        return Refuse("class weights", loss)
    if given["size_average"] is not None or given["reduce"] is not None:
        return Refuse("old reduction arguments", loss)
    if given["reduction"] not in ("mean", "sum"):
        return Refuse("one loss for each token: its gradient is not known before the backward", loss)
    if type(given["ignore_index"]) is not int or not isinstance(given["label_smoothing"], (int, float)):
        return Refuse("ignore_index or label_smoothing is computed", loss)
    if not isinstance(given["target"], Node) or dtype(given["target"]) != torch.int64:
        return Refuse("the targets are not int64", loss)
    if len(shape(given["target"]) or ()) != 1:
        return Refuse("the words are not the last of two dimensions", loss)
    return None


def _step(node: Node, words: int, before: torch.dtype | None) -> Refuse | None:
    """A cast that loses nothing, or a view that keeps each token's words together."""
    word, source = _word(node), node.args[0]
    if word in _CASTS:
        if dtype(node) != before and (before, dtype(node)) != (torch.bfloat16, torch.float32):
            return Refuse("the logits are rounded or widened to float64 before the loss", node)
        return Refuse("the logits move to another device", node) if device(node) != device(source) else None
    sizes, old = shape(node) or (), shape(source) or ()
    if not sizes or not same(sizes[-1], words):
        return Refuse("a view cuts or mixes the words", node)
    if word == "getitem":
        index: Any = node.args[1]
        index = index if isinstance(index, tuple) else (index,)
        if not all(part is Ellipsis or isinstance(part, slice) for part in index):
            return Refuse("the logits are indexed", node)
        full = index[-1] in (Ellipsis, slice(None, None, None)) or len(index) < len(old) and Ellipsis not in index
        return None if full else Refuse("a view cuts or mixes the words", node)
    if word == "flatten" or all(isinstance(size, (int, Node)) for size in _sizes(node)) and node.kwargs == {}:
        return None
    return Refuse("a view of the logits to another dtype", node)


def _sizes(node: Node) -> tuple[Any, ...]:
    given = node.args[1:]
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else tuple(given)


def _learns(node: Node | None) -> bool:
    found = tensor(node)
    return found is not None and found.requires_grad
