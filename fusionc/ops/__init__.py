"""Custom operators ``fusionc::*``: a reference on the CPU, fake tensors, gradients, and kernels on a GPU; one file each.

A pass inserts a call of such an operator; a Program read from the cache names it. ``load`` registers it for either.
"""

from __future__ import annotations

import importlib

_HOMES = {  # operator -> file
    "conv_relu": "conv_relu",
    "depthwise_conv": "depthwise_conv",
    "depthwise_conv_weight": "depthwise_conv",
    "linear_cross_entropy": "linear_cross_entropy",
    "linear_cross_entropy_backward": "linear_cross_entropy",
}


def load(name: str) -> None:
    """Register the operators of the file that ``fusionc::<name>`` lives in; unknown names are left to the caller."""
    home = _HOMES.get(name)
    if home is not None:
        importlib.import_module(f"{__name__}.{home}")
