"""A Plan: everything that may change a kernel's speed and nothing that may change its result."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Plan:
    """Launch parameters of one kernel.

    target       "cpp" or "triton"
    xblock       points of `loops` per program (Triton: power of two; C++: outer tile of column reductions)
    rblock       points of `axis` per step (Triton: power of two); 0: the whole axis at once, kept in registers
    warps        warps per program (Triton)
    stages       software pipeline depth (Triton)
    unroll       tiles of a looped axis that are loaded at once (Triton)
    columns      C++: vectorise along the last loop instead of the axis (reductions over a slow dimension)
    parallel     C++: use threads
    stream       far more data passes by than the caches hold. C++: write those results past them that the loops allow to
                 (`rules_cpp.streamed`); Triton: load with `evict_last` (`rules_triton.streams`)
    """

    target: str
    xblock: int = 1
    rblock: int = 0
    warps: int = 4
    stages: int = 1
    columns: bool = False
    parallel: bool = True
    unroll: int = 1
    stream: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_dict(data: Any) -> Plan:
        """A validated Plan from parsed JSON.  Raises ValueError for anything that is not a legal plan."""
        if not isinstance(data, dict) or set(data) != {f.name for f in fields(Plan)}:
            raise ValueError("a plan must have exactly the fields of Plan")
        plan = Plan(**data)
        for name, lo, hi in (
            ("xblock", 1, 1 << 16),
            ("rblock", 0, 1 << 16),
            ("warps", 1, 32),
            ("stages", 1, 8),
            ("unroll", 1, 16),
        ):
            v = getattr(plan, name)
            if type(v) is not int or not lo <= v <= hi:
                raise ValueError(f"plan field {name} must be an integer in [{lo}, {hi}], not {v!r}")
        flags = (plan.columns, plan.parallel, plan.stream)
        if plan.target not in ("cpp", "triton") or any(type(v) is not bool for v in flags):
            raise ValueError("plan has a field of the wrong type")
        return plan
