"""Derived weights: folded, packed or concatenated parameters that follow their sources at run time.

Dynamo does not guard on parameters: one compiled graph serves another instance of the class, a model after
``load_state_dict(assign=True)`` and a model whose Parameter was replaced. So a derived weight is never a constant. At
each call the parameters *actually passed* are looked at:

* identity (``id``, valid as long as a weak reference lives) picks the entry of the table: two instances that take
  turns have an entry each and cost no recomputing;
* ``_version`` and ``data_ptr()`` tell whether a source was written or re-pointed; if so its derived weights are
  computed anew **into the same storage**, so that a CUDA graph that captured it stays valid.

The policies of ``options={"weights": ...}``: "checked" does all this; "frozen" and "manual" look at identity only and
trust the user that values stay, respectively that ``refresh(model)`` follows every change. ``refresh`` is also for
writers through ``.data``, which change neither identity, version nor pointer. Tensors made under
``inference_mode`` have no version counter: for them identity and pointer must do, and in-place writes need ``refresh``.

One writer hides: eager BatchNorm in training mode moves its running statistics without a version bump. Sources that a
pass declares ``volatile`` are therefore compared by value with a kept copy where that is cheap (CPU: some µs each);
on a GPU, where it would wait for the device, the version of the module's ``num_batches_tracked`` stands for them.

The check is three C-level maps over the source tensors and two tuple comparisons: about 0.1 µs for a source and look
(``python -m fusionc.runtime.weights`` measures it here).
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any, Generic, TypeVar

import torch

from ..graph.edit import Derived

POLICIES = ("checked", "frozen", "manual")
_version: Callable[[torch.Tensor], int] = torch._C.TensorBase._version.__get__
_pointer: Callable[[torch.Tensor], int] = torch._C.TensorBase.data_ptr
_lock = threading.RLock()
_live: weakref.WeakSet[Any] = weakref.WeakSet()
_shared: weakref.WeakValueDictionary[tuple[Any, ...], _Value] = weakref.WeakValueDictionary()


class _Value:
    """One derived tensor in memory, the sources it was made from and the state they had."""

    __slots__ = ("__weakref__", "key", "sources", "state", "tensor")

    def __init__(self) -> None:
        self.tensor: torch.Tensor | None = None
        self.sources: tuple[weakref.ref[torch.Tensor], ...] = ()
        self.state: Any = None
        self.key: tuple[Any, ...] | None = None

    def alive(self) -> bool:
        """All sources still exist."""
        return all(source() is not None for source in self.sources)

    def made_from(self, sources: Sequence[torch.Tensor]) -> bool:
        """These very tensors are its sources."""
        return len(sources) == len(self.sources) and all(r() is s for r, s in zip(self.sources, sources))

    def update(self, derived: Derived, sources: Sequence[torch.Tensor], state: Any) -> None:
        """Compute it again, in place wherever shape, dtype and device stayed."""
        # outside of inference mode: the result must stay writable by later calls
        with torch.inference_mode(False), torch.no_grad():
            made = derived.compute([source.detach() for source in sources])
            old = self.tensor
            if old is not None and old.dtype == made.dtype and old.device == made.device and old.shape == made.shape \
                    and old.stride() == made.stride():
                old.copy_(made)
            else:
                owned = not any(made.untyped_storage()._cdata == s.untyped_storage()._cdata for s in sources)
                self.tensor = made if owned and not made.is_inference() else made.clone()
        self.sources = tuple(weakref.ref(source) for source in sources)
        self.state = state


class _Entry:
    """The derived values for one tuple of source tensors (one instance of the model)."""

    __slots__ = ("__weakref__", "dead", "copies", "counters", "ids", "stale", "tensors", "token", "values", "versioned", "watch")

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids
        self.token: Any = None
        self.values: list[_Value] = []
        self.tensors: list[torch.Tensor] = []
        self.watch: tuple[Any, ...] = ()
        self.versioned: Callable[[Any], Any] | None = None
        self.copies: list[tuple[int, torch.Tensor]] = []  # volatile sources on the CPU and what they held
        self.counters: tuple[torch.Tensor, ...] = ()  # num_batches_tracked of volatile sources elsewhere
        self.stale = False
        self.dead = False


class DerivedWeights:
    """The derived weights of one compiled graph; ``resolve(args)`` gives their values for this call.

    Addresses are stable for each instance of the model for as long as its entry lives: the table keeps ``limit``
    instances, the least recently used one is dropped first. Whoever captured a CUDA graph on a dropped entry keeps the
    memory alive by holding the tensors, and sees new addresses at the next call.
    """

    def __init__(self, derived: Sequence[Derived], policy: str = "checked", limit: int = 8) -> None:
        if policy not in POLICIES:
            raise ValueError(f"weights={policy!r} is not a policy; valid ones are {', '.join(POLICIES)}")
        self.derived = tuple(derived)
        self.checked = policy == "checked"
        self.limit = max(1, limit)
        self.refreshes = 0
        positions = sorted({position for each in self.derived for position in each.sources})
        where = {position: index for index, position in enumerate(positions)}
        self.positions = tuple(positions)
        self._parts = tuple(tuple(where[position] for position in each.sources) for each in self.derived)
        self._pick = _picker(positions)
        self._volatile = tuple(sorted({where[position] for each in self.derived for position in each.volatile}))
        self._entries: OrderedDict[tuple[int, ...], _Entry] = OrderedDict()
        self._spare: list[_Entry] = []
        self._last = _Entry((-1,))
        if self.derived:
            _live.add(self)

    def resolve(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """Values of the derived placeholders, in order, for the graph's other arguments ``args``.

        The list belongs to the table: do not change it.
        """
        found = self._pick(args)
        ids = tuple(map(id, found))
        entry = self._last
        if entry.ids != ids:
            entry = self._switch(ids, found)
        if self.checked:
            sources = found if entry.versioned is None else entry.versioned(found)
            token = (tuple(map(_version, sources)), tuple(map(_pointer, found)), tuple(map(_version, entry.counters)))
            if token != entry.token or entry.copies and _moved(entry, found):
                self._refresh(entry, found, token)
        elif entry.stale:
            self._refresh(entry, found, None)
        return entry.tensors

    __call__ = resolve

    def _switch(self, ids: tuple[int, ...], found: Sequence[torch.Tensor]) -> _Entry:
        with _lock:
            entry = self._entries.get(ids)
            if entry is None or entry.dead:
                entry = self._add(ids, found)
            self._entries.move_to_end(ids)
            self._last = entry
            return entry

    def _add(self, ids: tuple[int, ...], found: Sequence[torch.Tensor]) -> _Entry:
        """A new instance, or an old one whose parameters were replaced: then its storage is used again."""
        entry = _Entry(ids)
        entry.stale = True
        kept = [index for index, source in enumerate(found) if not source.is_inference()]
        if len(kept) < len(found):
            entry.versioned = _picker(kept)
        old = self._spare.pop() if self._spare else None
        for index, (each, part) in enumerate(zip(self.derived, self._parts)):
            sources = [found[i] for i in part]
            key = None if each.share is None else (each.share, *map(id, sources))
            value = _shared.get(key) if key is not None else None
            if value is not None and not value.made_from(sources):
                value = None
            if value is None and old is not None and not old.values[index].alive():
                value = old.values[index]  # nobody can call with its sources any more
                value.state = None
                if value.key is not None and _shared.get(value.key) is value:
                    del _shared[value.key]
            elif value is None and old is not None and old.values[index].made_from(sources):
                value = old.values[index]
            if value is None:
                value = _Value()
            if key is not None:
                value.key = key
                _shared[key] = value
            entry.values.append(value)
        if self._volatile and self.checked:
            entry.counters = _counters([found[i] for i in self._volatile if found[i].device.type != "cpu"])
        entry.watch = tuple(weakref.ref(source, _forget(weakref.ref(self), weakref.ref(entry))) for source in found)
        self._entries[ids] = entry
        while len(self._entries) > self.limit:
            self._entries.popitem(last=False)
        return entry

    def _refresh(self, entry: _Entry, found: Sequence[torch.Tensor], token: Any) -> None:
        """Recompute the values whose sources changed (all that are marked stale)."""
        with _lock:
            moved = _moved(entry, found)
            counted = tuple(map(_version, entry.counters))
            if self._volatile and self.checked:
                entry.copies = [(i, found[i].detach().clone()) for i in self._volatile if found[i].device.type == "cpu"]
            for index, (each, part) in enumerate(zip(self.derived, self._parts)):
                sources = [found[i] for i in part]
                value = entry.values[index]
                state = (*[(None if s.is_inference() else s._version, s.data_ptr()) for s in sources],
                         *(counted if each.volatile else ()))
                if moved and each.volatile:
                    value.state = None
                if value.tensor is None or value.state is None or not value.made_from(sources) or \
                        self.checked and value.state != state:
                    value.update(each, sources, state)
                    self.refreshes += 1
            entry.tensors = [value.tensor for value in entry.values]  # type: ignore[misc]
            entry.token, entry.stale = token, False

    def mark_stale(self, tensors: Sequence[torch.Tensor]) -> int:
        """The next call recomputes everything made from one of these tensors. Returns how many values that is."""
        wanted, marked = {id(found) for found in tensors}, 0
        with _lock:
            for entry in self._entries.values():
                for value in entry.values:
                    if any((source := r()) is not None and id(source) in wanted for r in value.sources):
                        value.state, entry.token, entry.stale = None, None, True
                        marked += 1
        return marked


def _moved(entry: _Entry, found: Sequence[torch.Tensor]) -> bool:
    """A volatile source on the CPU does not hold any more what it held."""
    return not all(torch.equal(found[index], copy) for index, copy in entry.copies)


def _counters(sources: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The ``num_batches_tracked`` buffers that live beside these running statistics (looked for once an instance)."""
    if not sources:
        return ()
    import gc

    wanted = {id(source) for source in sources}
    return tuple(
        holder["num_batches_tracked"] for holder in gc.get_referrers(*sources)
        if isinstance(holder, dict) and isinstance(holder.get("num_batches_tracked"), torch.Tensor)
        and not holder["num_batches_tracked"].is_inference()
        and (id(holder.get("running_mean")) in wanted or id(holder.get("running_var")) in wanted)
    )


def _picker(positions: Sequence[int]) -> Callable[[Any], Any]:
    if not positions:
        return lambda args: ()
    if len(positions) == 1:
        only = positions[0]
        return lambda args: (args[only],)
    return itemgetter(*positions)


def _forget(owner: weakref.ref[Any], which: weakref.ref[_Entry]) -> Callable[[Any], None]:
    """Called when a source dies: its id may come back on another tensor, so the entry must never match again."""

    def died(_: Any) -> None:
        table, entry = owner(), which()
        if table is None or entry is None or entry.dead:
            return
        entry.dead, ids, entry.ids = True, entry.ids, (-1,)
        if table._entries.get(ids) is entry:
            del table._entries[ids]
            if len(table._spare) < table.limit:
                table._spare.append(entry)

    return died


def refresh(model: torch.nn.Module | None = None) -> int:
    """Recompute, at the next call, all derived weights made from parameters or buffers of ``model`` (None: all models).

    For ``weights="manual"`` after every change, and for writers through ``.data`` under any policy. Returns the number
    of derived weights marked. Submodules of a compiled model, and the object ``torch.compile`` returns, work too.
    """
    if model is None:
        marked = 0
        for table in list(_live):
            with _lock:
                for entry in table._entries.values():
                    entry.token, entry.stale = None, True
                    for value in entry.values:
                        value.state = None
                        marked += 1
        return marked
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors.extend(found for found in vars(module).values() if isinstance(found, torch.Tensor))
    return sum(table.mark_stale(tensors) for table in list(_live))


D = TypeVar("D", bound=Hashable)


class VariantTable(Generic[D]):
    """Choices that depend on weight *values*: fingerprint of the sources → decision → compiled variant, both bounded.

    ``decide(sources)`` reads the tensors and returns something hashable; ``build(decision)`` compiles the variant. At
    each call the sources' identity, version and pointer are compared; on a change ``decide`` runs again, and ``build``
    only for a decision not seen lately.
    """

    def __init__(self, sources: Sequence[int], decide: Callable[[list[torch.Tensor]], D],
                 build: Callable[[D], Callable[..., Any]], limit: int = 4) -> None:
        self._pick, self._decide, self._build, self.limit = _picker(tuple(sources)), decide, build, max(1, limit)
        self._choices: OrderedDict[Any, tuple[tuple[Any, ...], D]] = OrderedDict()
        self._variants: OrderedDict[D, Callable[..., Any]] = OrderedDict()

    def select(self, args: Sequence[Any]) -> Callable[..., Any]:
        """The variant for these arguments; compiles it if need be."""
        found = self._pick(args)
        key = tuple((id(s), None if s.is_inference() else s._version, s.data_ptr()) for s in found)
        with _lock:
            known = self._choices.get(key)
            if known is not None and all(r() is s for r, s in zip(known[0], found)):
                decision = known[1]
            else:
                with torch.no_grad():
                    decision = self._decide([s.detach() for s in found])
                self._choices[key] = (tuple(weakref.ref(s) for s in found), decision)
                while len(self._choices) > 4 * self.limit:
                    self._choices.popitem(last=False)
            variant = self._variants.get(decision)
            if variant is None:
                variant = self._variants[decision] = self._build(decision)
            self._variants.move_to_end(decision)
            while len(self._variants) > self.limit:
                self._variants.popitem(last=False)
            return variant

    def forget(self) -> None:
        """Decide again at the next call (for writers through ``.data``)."""
        with _lock:
            self._choices.clear()


def _measure(count: int = 300, group: int = 3, calls: int = 2000) -> float:
    """Microseconds of one ``resolve`` for ``count`` parameters in groups of ``group``."""
    import time

    parameters = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(count)]
    derived = [Derived(f"derived_{i}", tuple(range(i * group, (i + 1) * group)), lambda s: torch.cat(s))
               for i in range(count // group)]
    table = DerivedWeights(derived)
    table.resolve(parameters)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            table.resolve(parameters)
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


if __name__ == "__main__":
    print(f"300 parameters, 100 derived weights: {_measure():.1f} µs a call")
