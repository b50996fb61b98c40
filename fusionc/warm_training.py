"""Forward and backward Programs as one autograd function: the plain part of what AOTAutograd builds at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

Program = Callable[[list[Any]], Any]


def training_callable(forward: Program, backward: Program, plan: Mapping[str, Any]) -> Callable[..., Any]:
    """The callable for Dynamo.  `plan` was checked by `warm._check_plan`."""
    more, outputs = plan["training"], plan["outputs"]
    count = len(outputs)
    checked, unchecked, _ = more["saved"]
    fixed = [k for k, (_, _, _, grad, _) in enumerate(outputs) if not grad]
    unsafe = [k for k, (kind, *_) in enumerate(outputs) if kind == "unsafe_view_alias"]
    wanted = [k for k, (*_, tangent) in enumerate(outputs) if tangent]
    dynamic = [(k, set(dims)) for k, (_, _, dims, *_) in enumerate(outputs) if dims]
    forms = [_form(form) for form in more["tangents"]]
    quiet = torch._C._DisableAutocast if plan["autocast_off"] else nullcontext
    relaxed = more["deterministic"] is False

    class Compiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with quiet():
                results = list(forward(list(args)))
            saved = [t.detach() if t._is_view() else t for t in results[count : count + checked + unchecked]]
            ctx.save_for_backward(*saved[:checked])
            ctx.unchecked, ctx.symbols = saved[checked:], results[count + checked + unchecked :]
            del results[count:]
            for k in unsafe:
                results[k] = torch.ops.aten._unsafe_view(results[k], results[k].shape)
            ctx.mark_non_differentiable(*[results[k] for k in fixed if isinstance(results[k], torch.Tensor)])
            ctx._materialize_non_diff_grads = False
            return tuple(results)

        @staticmethod
        @torch._dynamo.disable(reason="a graph of fusionc's is compiled already")  # backward() in a compiled function
        def backward(ctx: Any, *grads: Any) -> Any:
            if relaxed and torch.are_deterministic_algorithms_enabled():
                raise RuntimeError(
                    "this backward graph was compiled while torch.use_deterministic_algorithms was off and cannot run "
                    "while it is on"
                )
            tangents = [form(grads[k]) for k, form in zip(wanted, forms, strict=True)]
            args = [*ctx.symbols, *ctx.saved_tensors, *ctx.unchecked, *tangents]
            del grads, tangents
            clear = getattr(ctx, "maybe_clear_saved_tensors", None)
            if clear is not None:
                clear()

            def run() -> Any:
                with quiet():
                    return tuple(backward(args))

            return _once(run, args) if torch.is_grad_enabled() else run()

    increment, detach = tuple(plan["increment"]), tuple(more["detach"])

    def call(*args: Any) -> list[Any]:
        from .warm import mark_dynamic

        mine = list(args)
        for i in detach:  # their gradient is none: autograd need not go there
            if isinstance(mine[i], torch.Tensor):
                mine[i] = mine[i].detach()
        if increment:
            torch.autograd.graph.increment_version(tuple([args[i] for i in increment]))
        del args
        with torch.enable_grad():
            results = Compiled.apply(*mine)
        for k, dims in dynamic:
            mark_dynamic(results[k], dims)
        return list(results)

    return call


def _form(form: Any) -> Callable[[Any], Any]:
    """Bring a gradient into the layout that the backward graph was compiled for."""
    if form[0] == "format":
        memory_format = getattr(torch, form[1])

        def by_format(t: Any) -> Any:
            return t if not isinstance(t, torch.Tensor) else t.contiguous(memory_format=memory_format)

        return by_format
    size, stride = tuple(form[1]), tuple(form[2])

    def by_strides(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or (t.stride() == stride and t.shape == size):
            return t
        return torch.empty_strided(size, stride, dtype=t.dtype, device=t.device).copy_(t)

    return by_strides


def _once(run: Callable[[], Any], args: list[Any]) -> Any:
    """Gradients that report an error, rather than silence, when somebody differentiates them again."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *unused: Any) -> Any:
            return run()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError("torch.compile with aot_autograd does not currently support double backward")

    if not any(isinstance(t, torch.Tensor) and t.requires_grad for t in args):
        return Backward.apply(torch.empty(0, requires_grad=True), *args)
    return Backward.apply(*args)
