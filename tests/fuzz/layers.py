"""Rules for what models are made of: layers with weights, normalisations, pooling, attention, losses, recurrences.

A layer's weights are new inputs that the rule asks for (``Chooser.fresh``), so that any value can meet any layer.
Importing this module adds its rules to those of ``rules``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tests.fuzz.choose import Chooser, Value
from tests.fuzz.rules import Arguments, is_float, is_int, is_wide, named, positions, rule, varied


def _float_of(c: Chooser, *ranks: int, least: int = 1, test: Callable[[Value], bool] = is_float) -> Value | None:
    """A float value of one of these ranks whose sizes are at least ``least``."""
    return c.value(lambda v: test(v) and v.tensor.ndim in ranks and all(n >= least for n in v.tensor.shape))


def _made(c: Chooser, x: Value, *shapes: Any, **params: Any) -> Arguments:
    """``x`` and fresh weights of its dtype: arguments of a layer."""
    return (x.name, *(c.fresh(list(shape), c.dtype(x)).name for shape in shapes)), params


# --- linear layers ---
def _last(c: Chooser, *, bias: bool) -> Arguments:
    x = _float_of(c, 1, 2, 3)
    if x is None:
        return None
    wide = c.pick([1, 3, 8, 16, 33, 64])
    return _made(c, x, (wide, x.tensor.shape[-1]), *[(wide,)] * bias)


def _swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return x + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _gated(c: Chooser) -> Arguments:
    x = _float_of(c, 2, 3)
    if x is None:
        return None
    width, hidden = x.tensor.shape[-1], c.pick([3, 8, 32])
    return _made(c, x, (hidden, width), (hidden, width), (width, hidden))


def _qkv(c: Chooser) -> Arguments:
    x = _float_of(c, 2, 3)
    if x is None:
        return None
    width = x.tensor.shape[-1]
    return _made(c, x, *[(c.pick([4, 8, 16]), width) for _ in range(3)])


def _batched(c: Chooser) -> Arguments:
    x = _float_of(c, 3)
    if x is None:
        return None
    b, _, k = x.tensor.shape
    return _made(c, x, (b, k, c.pick([1, 5, 16])))


rule("linearfresh", lambda x, w: F.linear(x, w), lambda c: _last(c, bias=False), weight=2)
rule("linearbias", lambda x, w, b: F.linear(x, w, b), lambda c: _last(c, bias=True), weight=3)
rule("linearrelu", lambda x, w, b: F.relu(F.linear(x, w, b)), lambda c: _last(c, bias=True), ties=True)
rule("lineargelu", lambda x, w, b: F.gelu(F.linear(x, w, b)), lambda c: _last(c, bias=True), weight=2)
rule("swiglu", _swiglu, _gated, weight=2)
rule("siblings", lambda x, a, b, d: torch.cat([x @ a.t(), x @ b.t(), x @ d.t()], -1), _qkv)
rule("bmm", torch.bmm, _batched)
rule("einsum", lambda x, w: torch.einsum("bik,bkj->bji", x, w), _batched)


# --- convolutions ---
def _conv(c: Chooser, rank: int) -> Arguments:
    x = _float_of(c, rank + 1, rank + 2)
    if x is None:
        return None
    channels = x.tensor.shape[-rank - 1]
    smallest = min(x.tensor.shape[-rank:])
    kernel = c.pick([1, 1, 2, 3, 3, 5])
    dilation = c.pick([1, 1, 1, 2])
    padding = c.integer(0, kernel // 2)
    if smallest + 2 * padding < dilation * (kernel - 1) + 1:
        return None
    groups = c.pick([g for g in (1, 1, 1, 2, channels) if channels % g == 0])
    out = groups * c.pick([1, 2, 4, 8])
    fields = {"stride": c.pick([1, 1, 2]), "padding": padding, "dilation": dilation, "groups": groups}
    return _made(c, x, (out, channels // groups, *[kernel] * rank), (out,), **fields)


def _upward(c: Chooser) -> Arguments:
    x = _float_of(c, 4)
    if x is None:
        return None
    return _made(c, x, (x.tensor.shape[1], c.pick([1, 3, 4]), 2, 2), stride=c.pick([1, 2]))


def _patches(c: Chooser) -> Arguments:
    x = _float_of(c, 4, least=2)
    return None if x is None else _made(c, x, (c.pick([4, 8]), x.tensor.shape[1], 2, 2))


rule("conv1d", F.conv1d, lambda c: _conv(c, 1), weight=2)
rule("conv2d", F.conv2d, lambda c: _conv(c, 2), weight=4)
rule("convnobias", lambda x, w, b, **k: F.conv2d(x, w, None, **k) + b.view(-1, 1, 1), lambda c: _conv(c, 2))
rule("convrelu", lambda x, w, b, **k: F.relu(F.conv2d(x, w, b, **k)), lambda c: _conv(c, 2), ties=True, weight=2)
rule("convtranspose", lambda x, w, stride: F.conv_transpose2d(x, w, stride=stride), _upward)
rule("patches", lambda x, w: F.conv2d(x, w, stride=2).flatten(2).transpose(1, 2), _patches)


# --- normalisations ---
def _channels(c: Chooser, weights: int, least: int = 2) -> Arguments:
    x = _float_of(
        c, 2, 3, 4, least=least, test=_finite if least == 1 else lambda v: v.tensor.ndim > 1 and _in_channels(v)
    )
    return None if x is None else _made(c, x, *[(x.tensor.shape[1],)] * weights)


def _finite(v: Value) -> bool:
    return is_float(v) and bool(v.tensor.isfinite().all())


def _in_channels(v: Value) -> bool:
    return varied(dataclasses.replace(v, tensor=v.tensor.transpose(0, 1).flatten(1)))


def _grouped(c: Chooser) -> Arguments:
    x = _float_of(c, 3, 4, least=2, test=_in_images)
    if x is None:
        return None
    channels = x.tensor.shape[1]
    groups = c.pick([g for g in (1, 2, 4, channels) if channels % g == 0])
    return _made(c, x, (channels,), (channels,), groups=groups)


def _in_images(v: Value) -> bool:
    return v.tensor.ndim > 2 and varied(dataclasses.replace(v, tensor=v.tensor.flatten(2)))


def _rows(c: Chooser, weights: int) -> Arguments:
    x = _float_of(c, 1, 2, 3, least=2, test=varied)
    return None if x is None else _made(c, x, *[(x.tensor.shape[-1],)] * weights)


def _evaluated(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, m.detach(), v.detach().abs() + 0.5, w, b)


def _moving(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, m, v, w, b, training=True)


def _residual_norm(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = (x + r).to(torch.promote_types(x.dtype, torch.float32))
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-3)).to(x.dtype) * w


def _residual(c: Chooser) -> Arguments:
    x = _float_of(c, 2, 3, least=2, test=lambda v: varied(v) and v.tensor.dtype is not torch.float64)
    return None if x is None else _made(c, x, x.tensor.shape, (x.tensor.shape[-1],))


rule("bntrain", lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), lambda c: _channels(c, 2))
rule("bneval", _evaluated, lambda c: _channels(c, 4, 1), weight=2)
rule("bnmoving", _moving, lambda c: _channels(c, 4), mutates=True, smooth=False)
rule("groupnorm", lambda x, w, b, groups: F.group_norm(x, groups, w, b, 1e-3), _grouped)
rule(
    "instancenorm",
    lambda x: F.instance_norm(x, eps=1e-2),
    lambda c: named(_float_of(c, 3, 4, least=2, test=_in_images)),
)
rule("layernormw", lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-3), lambda c: _rows(c, 2), weight=2)
rule("rmsnormw", lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-3), lambda c: _rows(c, 1), weight=2)
rule("residualnorm", _residual_norm, _residual)
rule(
    "normalize",
    lambda x: F.normalize(x, dim=-1, eps=1e-2),
    lambda c: named(_float_of(c, 1, 2, 3, test=_finite)),
    smooth=False,
)


# --- images: pooling, sizes, borders ---
def _image(c: Chooser, least: int = 1) -> Value | None:
    return _float_of(c, 4, least=least, test=is_wide)


def _padded(c: Chooser, mode: str) -> Arguments:
    x = _float_of(c, 3, 4, least=3)
    return named(x, pad=[c.integer(0, 2) for _ in range(2 * (x.tensor.ndim - 2))] if x else [], mode=mode)


rule("maxpool2d", lambda x: F.max_pool2d(x, 3, 2, 1), lambda c: named(_image(c, 2)), keeps=True, ties=True)
rule("maxpool22", lambda x: F.max_pool2d(x, 2), lambda c: named(_image(c, 2)), keeps=True, ties=True)
rule("avgpool2d", lambda x: F.avg_pool2d(x, 3, 2, 1), lambda c: named(_image(c, 2)))
rule("adaptive", lambda x, size: F.adaptive_avg_pool2d(x, size), lambda c: named(_image(c), size=c.integer(1, 4)))
rule("pooled", lambda x: x.mean((2, 3)), lambda c: named(_float_of(c, 4)))
rule("nearest", lambda x: F.interpolate(x, scale_factor=2), lambda c: named(_image(c)), keeps=True)
rule("bilinear", lambda x: F.interpolate(x, size=(5, 6), mode="bilinear"), lambda c: named(_image(c)))
for _mode in ("reflect", "replicate", "circular"):
    rule(_mode, F.pad, lambda c, mode=_mode: _padded(c, mode), keeps=True)
rule("shuffle", lambda x: F.pixel_shuffle(x, 2), lambda c: named(_shuffled(c)), keeps=True)
rule("im2col", lambda x: F.unfold(x, 2, stride=2), lambda c: named(_image(c, 2)), keeps=True)
rule("channelslast", lambda x: x.contiguous(memory_format=torch.channels_last), lambda c: named(_image(c)), keeps=True)


def _shuffled(c: Chooser) -> Value | None:
    return c.value(lambda v: is_float(v) and v.tensor.ndim == 4 and v.tensor.shape[1] % 4 == 0)


# --- attention ---
def _single(v: Value) -> bool:
    return v.tensor.dtype is torch.float32


def _attended(c: Chooser, masked: bool = False, test: Callable[[Value], bool] = is_float) -> Arguments:
    x = _float_of(c, 4, test=test) or _float_of(c, 3, test=test)
    if x is None:
        return None
    *batch, rows, width = x.tensor.shape
    keys = c.pick([rows, 1, 5, 17])
    return _made(c, x, (*batch, keys, width), (*batch, keys, width), *[(rows, keys)] * masked)


def _causal(c: Chooser, test: Callable[[Value], bool] = is_float) -> Arguments:
    x = _float_of(c, 4, test=test)
    return None if x is None else _made(c, x, x.tensor.shape, x.tensor.shape)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.softmax(-1, dtype=torch.promote_types(v.dtype, torch.float32)).to(v.dtype) @ v


def _plain_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / 4
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1) @ v


def _rotated(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()


def _turned(c: Chooser) -> Arguments:
    x = c.value(lambda v: is_float(v) and v.tensor.ndim >= 2 and v.tensor.shape[-1] % 2 == 0)
    return None if x is None else _made(c, x, x.tensor.shape[-2:])


rule("sdpa", F.scaled_dot_product_attention, _attended)
rule("sdpamask", F.scaled_dot_product_attention, lambda c: _attended(c, masked=True))
rule("sdpacausal", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), _causal)
rule("plainattention", _plain, lambda c: _attended(c, test=_single))
rule("plaincausal", _plain_causal, lambda c: _causal(c, _single))
rule("rope", _rotated, _turned)


# --- embeddings, losses, recurrences, gates ---
def _looked_up(c: Chooser) -> Arguments:
    index = c.value(lambda v: is_int(v) and v.tensor.ndim <= 2)
    if index is None:
        return None
    return (index.name, c.fresh([c.pick([3, 16]), c.pick([4, 16, 33])], "float32").name), {}


def _classes(c: Chooser) -> Arguments:
    x = _float_of(c, 2, test=is_wide)
    index = c.value(lambda v: is_int(v) and x is not None and v.tensor.shape == x.tensor.shape[:1])
    if x is None:
        return None
    return (x.name, (index or c.fresh([x.tensor.shape[0]], "int64")).name), {}


def _same(c: Chooser) -> Arguments:
    x = _float_of(c, 1, 2, 3)
    return None if x is None else _made(c, x, x.tensor.shape)


def _unrolled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = torch.zeros_like(x[0])
    out = []
    for step in x[:8].unbind(0):
        h = torch.tanh(step + F.linear(h, w))
        out.append(h)
    return torch.stack(out)


def _sequence(c: Chooser) -> Arguments:
    x = _float_of(c, 2, 3)
    return None if x is None else _made(c, x, (x.tensor.shape[-1], x.tensor.shape[-1]))


def _even(c: Chooser) -> Arguments:
    return named(c.value(lambda v: is_float(v) and v.tensor.ndim > 0 and v.tensor.shape[-1] % 2 == 0))


rule("embedding", lambda i, w: F.embedding(positions(i, w.shape[0]), w), _looked_up, weight=2)
rule("crossentropy", lambda x, i: F.cross_entropy(x, positions(i, x.shape[1])), _classes, weight=2)
rule("nll", lambda x, i: F.nll_loss(x.log_softmax(1), positions(i, x.shape[1]), reduction="none"), _classes)
rule("mse", lambda x, y: F.mse_loss(x, y), _same)
rule("huber", lambda x, y: F.huber_loss(x, y), _same)
rule("bce", lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid()), _same)
rule("lerp", lambda x, y: torch.lerp(x, y, 0.25), _same)
rule("addcmul", lambda x, y: torch.addcmul(x, x, y, value=0.5), _same)
rule("unroll", _unrolled, _sequence)
rule("glu", lambda x: F.glu(x, -1), _even)
rule("geglu", lambda x: (lambda a, b: a * F.gelu(b))(*x.chunk(2, -1)), _even)
rule("nodropout", lambda x: F.dropout(x, 0.5, training=False) * 2, lambda c: named(c.value(is_float)))
