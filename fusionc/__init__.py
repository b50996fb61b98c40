"""fusionc: a torch.compile backend.

``torch.compile(model, backend="fusionc")`` needs no import of this module: torch finds the backend by its entry point.
Everything here is imported on first use, so that ``import fusionc`` costs milliseconds and does not import torch.

    fusionc.Config            the options of the backend, as one frozen dataclass
    fusionc.report()          records of the graphs compiled by this process, newest last
    fusionc.explain(f, *args) compile f and say what was fused, called, and refused, with the reasons
    fusionc.loss_only(model)  a module that returns only the loss, so that the logits need not be held
    fusionc.remove_attention(model, n)  take attention sublayers out of a module (approximate), with a report; Plan: its file
    fusionc.plan_large_kernels(model, what)  what large kernels could become within an error bound, with a report
    fusionc.refresh(model)    recompute folded weights now (for weights="manual")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusionc.config import Config

__version__ = "0.1.0"
__all__ = ["Config", "Plan", "__version__", "explain", "loss_only", "plan_large_kernels", "refresh", "remove_attention", "report"]

# Public name -> (module, attribute). No module of fusionc may carry one of these names: importing it would bind the
# module over the function. tests/test_layering.py checks that.
_LAZY = {
    "Config": ("fusionc.config", "Config"),
    "Plan": ("fusionc.accuracy", "Plan"),
    "explain": ("fusionc.explanation", "explain"),
    "loss_only": ("fusionc.modules", "loss_only"),
    "plan_large_kernels": ("fusionc.kernel_plans", "plan_large_kernels"),
    "refresh": ("fusionc.runtime.weights", "refresh"),
    "remove_attention": ("fusionc.removal.module", "remove_attention"),
    "report": ("fusionc.record", "report"),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'fusionc' has no attribute {name!r}; public names: {', '.join(__all__)}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
