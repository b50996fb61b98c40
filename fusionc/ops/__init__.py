"""Custom operators ``fusionc::*``: a reference on the CPU, fake tensors, gradients, and kernels on a GPU; one file each.

A pass inserts a call of such an operator; a Program read from the cache names it. ``load`` registers it for either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

KERNELS: dict[str, Callable[..., Any]] = {}
"""What `late` made, by the operator's name."""


def direct(operator: Any) -> Callable[..., Any] | None:
    """The implementation for CUDA of an operator of ours, given as an overload's builtin; None for any other.

    A Program calls it without torch's dispatcher, which costs 4 µs a call (more than the kernel's launch): its tensors
    are plain ones on the GPU and autograd is off.  Operators that write to arguments stay with the dispatcher.
    """
    import torch

    for name, kernel in KERNELS.items():
        overload = getattr(getattr(torch.ops.fusionc, name, None), "default", None)
        if overload is not None and overload._op is operator:
            on_gpu = torch._C._dispatch_has_kernel_for_dispatch_key(f"fusionc::{name}", "CUDA")
            return kernel if on_gpu and not overload._schema.is_mutable else None
    return None


def load(name: str) -> None:
    """Register the operators of the file that ``fusionc::<name>`` lives in; unknown names are left to the caller."""
    if name in ("attention", "attention_backward", "attention_operand_backward"):
        from . import attention  # noqa: F401
    elif name in ("conv_add_relu", "conv_add_relu_over"):
        from . import conv_add_relu  # noqa: F401
    elif name == "conv_relu":
        from . import conv_relu  # noqa: F401
    elif name in ("decode_attention", "decode_attention_update"):
        from . import decode_attention  # noqa: F401
    elif name in ("depthwise_conv", "depthwise_conv_weight"):
        from . import depthwise_conv  # noqa: F401
    elif name in ("fft_conv", "fft_conv_backward"):
        from . import fft_conv  # noqa: F401
    elif name == "depthwise_cpu":
        from . import depthwise_cpu  # noqa: F401
    elif name in ("grouped_conv", "per_example_conv"):
        from . import grouped_conv  # noqa: F401
    elif name == "grouped_rows":
        from . import grouped_rows  # noqa: F401
    elif name == "linear_act":
        from . import linear_act  # noqa: F401
    elif name in ("linear_cross_entropy", "linear_cross_entropy_backward"):
        from . import linear_cross_entropy  # noqa: F401
    elif name in ("max_pool2d_with_places", "max_pool2d_gradient"):
        from . import max_pool  # noqa: F401
    elif name == "short_attention":
        from . import short_attention  # noqa: F401
    elif name == "skinny_linear":
        from . import skinny_linear  # noqa: F401
    elif name == "tiled_mlp":
        from . import tiled_mlp  # noqa: F401


def on_device(found: Callable[..., Any]) -> Callable[..., Any]:
    """``found``, run with the GPU of its first tensor as the current one, which launches through the driver take."""
    import torch

    def launch(x: Any, *args: Any) -> Any:
        with torch.cuda.device_of(x):
            return found(x, *args)

    return launch


def late(find: Callable[[], Callable[..., Any]], name: str, instead: Callable[..., Any]) -> Callable[..., Any]:
    """The function that ``find`` returns, found at the first call: kernels are launched by packages to the right of this one.

    A kernel that cannot be built or launched (some GPU has too little shared memory for it) costs speed, with one
    warning, not the answer: ``instead`` computes it.
    """
    ready: list[Callable[..., Any]] = []

    def call(*args: Any, **named: Any) -> Any:
        try:
            if not ready:
                ready.append(find())
            return ready[0](*args, **named)
        except Exception as e:  # whatever Triton or the driver say
            import torch

            from ..errors import fell_back

            if isinstance(e, torch.OutOfMemoryError):
                raise
            fell_back(name, e, "ATen computes it instead")
            return instead(*args, **named)

    KERNELS[name] = call
    return call
