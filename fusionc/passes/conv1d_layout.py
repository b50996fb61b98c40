"""One-dimensional convolutions of many channels run in the layout of matrix units: channels side by side in memory.

Math       conv1d(x, w) = conv2d(x[:, :, None], w[:, :, None])[:, :, 0], whatever the strides
Exactness  reassociates: the library may pick another kernel
Legality   on a GPU, 16-bit floats, one group; sizes are known and channels a multiple of 8; the result's new strides are the
           readers' business as in ``row_major``, whose conditions hold here too
Cost       torch has no channels-last layout for three dimensions, so the library transposes input and result around its
           kernel each time; a stack of convolutions is transposed once now, and a transformer that takes (N, L, C) not at all
Source     Whisper's stem: 80 → 512 → 512 channels, 3000 positions
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.fx import Node

from ..graph import edit
from ..graph.facts import Facts, tensor
from .base import Match, Pass, Reassociates, Refuse
from .row_major import downstream

aten = torch.ops.aten
_CHANNELS = 64  # below, the transposition is nothing or the library's other kernels are as good
_LEAST = 1 << 18  # elements of the result


class Conv1dLayout(Pass):
    """Channels-last for convolutions over one axis."""

    name = "conv1d_layout"
    atomic = True
    exactness = Reassociates(rtol=1e-3)

    def __init__(self, devices: Collection[str] = ("cuda",), dtypes: Collection[torch.dtype] = (torch.bfloat16, torch.float16)):
        self.devices, self.dtypes = tuple(devices), tuple(dtypes)

    def find(self, facts: Facts) -> Iterator[Match]:
        """Convolutions of three-dimensional tensors."""
        for node in list(facts.gm.graph.nodes):
            if node.op == "call_function" and node.target is aten.convolution.default and self._fits(node):
                yield Match({"conv": node, "values": {}, "new": []}, (node,))

    def _fits(self, node: Node) -> bool:
        x, w, out = tensor(node.args[0]), tensor(node.args[1]), tensor(node)
        if x is None or w is None or out is None or x.dim() != 3 or w.dim() != 3:
            return False
        if x.device.type not in self.devices or x.dtype not in self.dtypes or w.dtype != x.dtype:
            return False
        if not all(isinstance(n, int) for n in (*x.shape, *w.shape, *out.shape)) or out.numel() < _LEAST:
            return False
        wide = min(w.shape[:2]) >= _CHANNELS and w.shape[0] % 8 == w.shape[1] % 8 == 0
        return wide and node.args[6] is False and node.args[8] == 1 and out.is_contiguous()

    def check(self, match: Match, facts: Facts) -> Refuse | None:
        """See Legality."""
        out = tensor(match.conv)
        assert out is not None
        n, c, length = out.shape
        turned = edit.fake_empty(out, (n, c, length), (c * length, 1, c))
        found, refusal = downstream(match.conv, turned, facts)
        match.values.update(found)
        return refusal

    def replace(self, match: Match, facts: Facts) -> None:
        """The same convolution over two axes, the first of which has one element, and new strides behind it."""
        conv: Node = match.conv
        graph = facts.gm.graph
        x, w, bias, stride, padding, dilation, transposed, _, groups = conv.args
        assert isinstance(stride, (list, tuple)) and isinstance(padding, (list, tuple)) and isinstance(dilation, (list, tuple))
        with graph.inserting_before(conv):
            sides = [self._turned(graph, side, conv) for side in (x, w)]
            args = (*sides, bias, [1, *stride], [0, *padding], [1, *dilation], transposed, [0, 0], groups)
            val = match.values[conv]
            n, c, length = val.shape
            wide = edit.insert(graph, aten.convolution.default, args, origin=[conv],
                               val=edit.fake_empty(val, (n, c, 1, length), (c * length, 1, c * length, c)))  # fmt: skip
            flat = edit.insert(graph, aten.squeeze.dim, (wide, 2), origin=[conv], val=val)
        for node, made in match.values.items():
            node.meta["val"] = made
        edit.replace(conv, flat)

    @staticmethod
    def _turned(graph: Any, node: Any, origin: Node) -> Node:
        """node[:, :, None] in channels-last."""
        wide = edit.insert(graph, aten.unsqueeze.default, (node, 2), origin=[origin])
        val = tensor(wide)
        if val is not None and val.is_contiguous(memory_format=torch.channels_last):
            return wide
        return edit.insert(graph, aten.clone.default, (wide,), {"memory_format": torch.channels_last}, origin=[origin])
