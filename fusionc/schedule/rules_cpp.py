"""The default Plan of a C++ kernel, by rule: no measurement, no compiler."""

from __future__ import annotations

from fusionc.ir.expr import ITEMSIZE, Load, Var
from fusionc.ir.loop import Kernel, evaluate

from .plan import Plan

_TILE = 128  # columns whose accumulators stay in the first-level cache beside the data


def default_plan(kernel: Kernel, hint: dict[str, int]) -> Plan:
    """A good plan for `kernel`; `hint` gives a likely value of each size by name."""
    columns = _columns(kernel, hint)
    return Plan(target="cpp", xblock=_TILE if columns else 1, columns=columns)


def _columns(kernel: Kernel, hint: dict[str, int]) -> bool:
    """Whether the loads run along the last loop rather than along the axis."""
    if not kernel.axis or not kernel.loops:
        return False
    x, r = kernel.loops[-1], kernel.axis[-1]
    if evaluate(x.extent, hint) < 8:
        return False
    along_x = along_r = 0
    for at, dtype in _accesses(kernel):
        along_x += _unit(at, x) * ITEMSIZE[dtype]
        along_r += _unit(at, r) * ITEMSIZE[dtype]
    if along_x == along_r:
        return evaluate(kernel.inner, hint) < 8
    return along_x > along_r


def _accesses(kernel: Kernel) -> list[tuple]:
    """Accesses that move with the axis: (index, dtype)."""
    axis = frozenset(kernel.axis)
    out = [(n.index, n.dtype) for n in kernel.nodes if isinstance(n, Load) and n.index.free & axis]
    return out + [(s.index, kernel.buffer(s.buffer).dtype) for s in kernel.stores if s.inner]


def _unit(at: object, v: Var) -> int:
    """1 if the index moves by one element with `v`."""
    c = at.coefficient(v)  # type: ignore[attr-defined]
    return int(c is not None and c.is_const and c.value == 1)
