"""Edits of a module that take sublayers out of it: what stands in their places, which places these are, and undoing it all.

The modules to change follow from the weights: the smallest module that holds a sublayer's projections and nothing that the
rest still needs is replaced by one that returns zeros, and a norm that only fed it becomes an identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fusionc.accuracy import Place
from fusionc.errors import OptionError

from . import edit
from .capture import Inputs, call
from .find import Finder, Sublayer
from .parts import Linear, size


class Removed(nn.Module):
    """Stands where an attention or MLP module was: returns zeros in the same place of the result. They are a broadcast view
    (no memory), or ``dense`` where the model writes into them."""

    def __init__(self, seat: int | str, template: Any, dense: bool = False) -> None:
        super().__init__()
        self.seat, self.template, self.dense = seat, template, dense

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros like the hidden states; None for every other tensor (weights, caches)."""
        x = args[self.seat] if isinstance(self.seat, int) else kwargs[self.seat]
        zero = x.new_zeros(x.shape) if self.dense else x.new_zeros(()).expand(x.shape)
        return _fill(self.template, zero)


class ZeroOutput(nn.Module):
    """Stands where a projection was: zeros [..., width], a broadcast view unless ``dense``."""

    def __init__(self, width: int, dense: bool = False) -> None:
        super().__init__()
        self.width, self.dense = width, dense

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] to zeros [..., width]."""
        shape = (*x.shape[:-1], self.width)
        return x.new_zeros(shape) if self.dense else x.new_zeros(()).expand(shape)


class ValueRows(nn.Module):
    """Stands where a fused projection was: some of its rows, zeros for the others."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: Tensor) -> None:
        """weight [out, d], bias [out], rows [n]: those that stay."""
        super().__init__()
        self.width = len(weight)
        self.weight = nn.Parameter(weight[rows].clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias[rows].clone(), requires_grad=False)
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] to [..., out]."""
        y = nn.functional.linear(x, self.weight, self.bias)
        return y.new_zeros(*x.shape[:-1], self.width).index_copy(-1, self.rows, y)


class KeylessCache:
    """A Hugging Face cache as an attention sees it whose keys are all zero: one element of each key is kept (the length is
    read from it, and beams are reordered by it), values as they are."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the values; return zero keys (a broadcast view) and the values so far."""
        held = self.cache.layers[layer].keys if layer < len(self.cache.layers) else None
        # another width: it was allocated before we were asked
        width = held.shape[-1] if held is not None and held.dim() == keys.dim() else 1
        kept, values = self.cache.update(keys[..., :width], values, layer, *args, **kwargs)
        return keys.new_zeros(()).expand(*kept.shape[:-1], keys.shape[-1]), values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def without_keys(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: the module's cache keeps no keys."""

    def swap(a: Any) -> Any:
        return KeylessCache(a) if hasattr(a, "update") and hasattr(a, "layers") else a

    return tuple(swap(a) for a in args), {name: swap(a) for name, a in kwargs.items()}


def _fill(template: Any, zero: Tensor) -> Any:
    if isinstance(template, (tuple, list)):
        parts = [_fill(t, zero) for t in template]
        return type(template)(*parts) if hasattr(template, "_fields") else type(template)(parts)
    return zero if template == "zero" else None


def _template(result: Any, shape: torch.Size) -> Any:
    if isinstance(result, Tensor):
        return "zero" if result.shape == shape else None
    if isinstance(result, (tuple, list)):
        parts: list[Any] = []
        for r in result:
            parts.append(None if "zero" in parts else _template(r, shape))
        if hasattr(result, "_fields"):  # a named tuple
            return type(result)(*parts)
        return parts if isinstance(result, list) else tuple(parts)
    return None


class Stuck(Exception):
    """Sublayers that cannot leave their modules: place → reason."""

    def __init__(self, reasons: dict[Place, str]) -> None:
        super().__init__()
        self.reasons = reasons


class Surgeon:
    """Edits of one model that can be undone."""

    def __init__(self, model: nn.Module, inputs: Inputs, finder: Finder, subs: Sequence[Sublayer]) -> None:
        self.model, self.inputs, self.finder, self.subs = model, inputs, finder, subs
        self.paths: dict[int, str] = {}
        for path, p in model.named_parameters(remove_duplicate=False):
            self.paths.setdefault(id(p), path)
        self.undo_list: list[tuple[nn.Module, str, nn.Module]] = []
        self.hooks: list[Any] = []
        self.written: set[str] = set()  # modules whose result the model writes into
        self.seats: dict[str, tuple[int | str, Any]] = {}

    def owner(self, node: Node) -> str:
        """Path of the module that holds a weight."""
        path = self.paths.get(id(self.finder.real.get(node)))
        if path is None:
            raise OptionError(f"weight {node.name} is no parameter of the model.")
        return path.rpartition(".")[0]

    def undo(self) -> None:
        """Put every replaced module back."""
        for parent, name, old in reversed(self.undo_list):
            parent._modules[name] = old
        for hook in self.hooks:
            hook.remove()
        self.keep()

    def keep(self) -> None:
        """What was done stays: forget the old modules."""
        self.undo_list.clear()
        self.hooks.clear()

    def put(self, path: str, new: nn.Module) -> None:
        """Replace the module at ``path``."""
        above, _, name = path.rpartition(".")
        parent = self.model.get_submodule(above)
        old = parent._modules[name]
        assert old is not None
        self.undo_list.append((parent, name, old))
        new.train(old.training)
        parent._modules[name] = new

    def uniform(self, s: Sublayer) -> None:
        """Queries and keys become zero: softmax then weighs all visible values alike."""
        assert s.queries is not None and s.keys is not None
        q, k = self.owner(s.queries.linear.weight), self.owner(s.keys.linear.weight)
        for path, maps in {q: s.queries.linear, k: s.keys.linear}.items():
            weight = self.finder.real[maps.weight].detach()
            weight = weight.T if maps.turned else weight
            kept = coupled_rows(s, maps) == 0
            if not bool(kept.any()):
                self.put(path, ZeroOutput(len(weight)))
                continue
            bias = self.finder.real[maps.bias].detach() if maps.bias is not None else None
            self.put(path, ValueRows(weight, bias, kept.nonzero()[:, 0].to(weight.device)))
        above = self.model.get_submodule(_common([q, k]) if q != k else q.rpartition(".")[0])
        if above is not self.model:
            self.hooks.append(above.register_forward_pre_hook(without_keys, with_kwargs=True))

    def uniform_graph(self, gone: Sequence[Sublayer]) -> GraphModule:
        """The graph in which the queries and keys of these sublayers are zero. Raises Stuck."""
        from ..graph.edit import copy_module

        gm = copy_module(self.finder.gm)
        twin = dict(zip(self.finder.gm.graph.nodes, gm.graph.nodes))
        stuck: dict[Place, str] = {}
        for s in gone:
            assert s.queries is not None and s.keys is not None
            if any(rows.linear.bias is not rows.bias for rows in (s.queries, s.keys)):
                stuck[s.place] = "mode='uniform' needs the biases of queries and keys in their projections"
            for maps in {s.queries.linear.node: s.queries.linear, s.keys.linear.node: s.keys.linear}.values():
                node, name = twin[maps.node], f"fusionc_kept_{s.index}_{maps.node.name}"
                like = self.finder.real[maps.weight]
                gm.register_buffer(name, (coupled_rows(s, maps) == 0).to(like.device, like.dtype))
                with gm.graph.inserting_after(node):
                    kept = gm.graph.get_attr(name)
                with gm.graph.inserting_after(kept):
                    new = gm.graph.call_function(torch.mul, (node, kept))
                node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        if stuck:
            raise Stuck(stuck)
        gm.recompile()
        return gm

    def plan_edits(self, gone: Sequence[Sublayer]) -> tuple[dict[str, Any], GraphModule]:
        """(path → "sublayer" | "projection" | "norm", the graph after removal) for an identity removal."""
        from ..graph.edit import copy_module

        gm = copy_module(self.finder.gm)
        twin = dict(zip(self.finder.gm.graph.nodes, gm.graph.nodes))
        real = {twin[n]: t for n, t in self.finder.real.items()}
        copy = Finder(gm, real, {twin[n] for n in self.finder.parameters})
        cut = {s.place for s in gone}
        found = copy.sublayers() + (copy.mlps() if any(s.part == "mlp" for s in gone) else [])
        for s in found:
            if s.place in cut:
                edit.remove(copy.again(s))
        gm.recompile()
        lifeless = edit.dead(gm)
        live = {self.paths.get(id(self.finder.real[n])) for n in self.finder.parameters if twin[n] not in lifeless}
        lost = {
            p for n in self.finder.parameters if twin[n] in lifeless and (p := self.paths.get(id(self.finder.real[n])))
        }
        out: dict[str, Any] = {}
        stuck: dict[Place, str] = {}
        for s in gone:
            assert s.output is not None
            inside = list(dict.fromkeys(self.owner(m.weight) for m in s.maps if m is not s.output))
            last = self.owner(s.output.weight)
            whole, part = _common([*inside, last]), _common(inside)
            if whole and not self._needed(whole, live) and not self._adds(whole, s):
                out[whole] = "sublayer"
            elif s.part == "attention" and part and part not in inside and not self._needed(part, live):
                out |= {part: "sublayer", last: "projection"}
            elif not any(self._needed(path, live) for path in (*inside, last)):
                out |= dict.fromkeys((*inside, last), "projection")
            else:
                stuck[s.place] = "no module holds it alone: the rest of the model needs its weights"
                continue
            if s.out is not None and edit.written_later(s.out):
                self.written.add(whole if whole in out else last)
        if stuck:
            raise Stuck(stuck)
        for path in sorted({p.rpartition(".")[0] for p in lost}):
            if not any(path == o or path.startswith(o + ".") for o in out) and not self._needed(path, live):
                out[path] = "norm"
        return out, gm

    def _needed(self, path: str, live: set[Any]) -> bool:
        return any(f"{path}.{name}" in live for name, _ in self.model.get_submodule(path).named_parameters())

    def _adds(self, path: str, s: Sublayer) -> bool:
        """The residual addition happens inside this module (BERT): its result is not the addend."""
        stack = list((s.add.meta.get("nn_module_stack") or {}).values())  # type: ignore[union-attr]
        names = [_dots(str(entry[0])) for entry in stack]
        return any(n == path or n.endswith("." + path) or n.startswith(path + ".") for n in names)

    def apply(self, edits: dict[str, Any]) -> None:
        """Replace the modules; those called are looked at first, to know what they take and return."""
        wanted = [p for p, kind in edits.items() if kind != "projection" and p not in self.seats]
        hooks = []
        for path in wanted:

            def hook(module: nn.Module, args: Any, kwargs: Any, result: Any, path: str = path) -> None:
                given = [*enumerate(args), *kwargs.items()]
                first = next((r for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, Tensor)), None)
                if edits[path] == "norm" and (len(given) != 1 or result is not first or given[0][0] != 0):
                    return  # it does something else than map one tensor: let it stand
                seat = next((k for k, t in given if isinstance(t, Tensor) and first is not None and t.shape == first.shape
                             and t.dtype == first.dtype), None)  # fmt: skip
                template = None if first is None else _template(result, first.shape)
                if seat is not None and "zero" in torch.utils._pytree.tree_leaves(template):  # not in a dictionary
                    self.seats[path] = (seat, template)

            hooks.append(self.model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        try:
            if hooks:
                with torch.no_grad():
                    call(self.model, self.inputs)
        finally:
            for h in hooks:
                h.remove()
        for path, kind in edits.items():
            if kind == "sublayer":
                if path not in self.seats:
                    raise OptionError(f"module {path} returns no tensor of its input's shape, alone or in a tuple.")
                self.put(path, Removed(*self.seats[path], path in self.written))
            elif kind == "projection":
                old = self.model.get_submodule(path)
                self.put(path, ZeroOutput(_width(old), path in self.written))
            elif path in self.seats:
                self.put(path, nn.Identity())


def coupled_rows(s: Sublayer, maps: Linear) -> Tensor:
    """[out] of 0 and 1: the rows of this linear map that make queries or keys."""
    width = size(maps.node.meta["example_value"].shape[-1])
    used = torch.zeros(width, dtype=torch.int32)
    for rows in (s.queries, s.keys):
        if rows is not None and rows.linear.node is maps.node:
            for ids in (rows.ids, rows.mates):
                found = torch.unique(ids) if ids is not None else torch.empty(0, dtype=torch.int32)
                used[found[found >= 0].long()] = 1
    return used


def _dots(path: str) -> str:
    text = path.replace("L['self']", "").replace("L['fn']", "")
    for a, b in (("._modules['", "."), ("['", "."), ("']", ""), ("[", "."), ("]", ""), ("_modules.", "")):
        text = text.replace(a, b)
    return text.strip(".")


def _width(linear: nn.Module) -> int:
    found = getattr(linear, "out_features", None) or getattr(linear, "nf", None)
    if not isinstance(found, int):
        raise OptionError(f"the width of a {type(linear).__name__} is unknown.")
    return found


def _common(paths: Sequence[str]) -> str:
    parts = [p.split(".") for p in paths]
    out = []
    for column in zip(*parts):
        if len(set(column)) > 1:
            break
        out.append(column[0])
    return ".".join(out)


__all__ = ["KeylessCache", "Removed", "Stuck", "Surgeon", "ValueRows", "ZeroOutput", "without_keys"]
