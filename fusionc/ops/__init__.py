"""Custom operators ``fusionc::*``: a reference on the CPU, fake tensors, gradients, and kernels on a GPU; one file each.

A pass inserts a call of such an operator; a Program read from the cache names it. ``load`` registers it for either.
"""

from __future__ import annotations


def load(name: str) -> None:
    """Register the operators of the file that ``fusionc::<name>`` lives in; unknown names are left to the caller."""
    if name in ("attention", "attention_backward", "attention_operand_backward"):
        from . import attention  # noqa: F401
    elif name in ("linear_cross_entropy", "linear_cross_entropy_backward"):
        from . import linear_cross_entropy  # noqa: F401
