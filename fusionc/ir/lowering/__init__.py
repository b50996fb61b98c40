"""ATen operators as lazy tensors of the loop IR.  An operator without an entry here is called through ATen."""

from . import gather, matvec, pointwise, pooling, reductions, views  # noqa: F401  (they fill the registry)
from .registry import LOWERINGS, Lowering, lookup

__all__ = ["LOWERINGS", "Lowering", "lookup"]
