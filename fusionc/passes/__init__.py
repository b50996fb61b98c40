"""The pipeline: one ordered tuple, a word for each position. Numbers are what the files of a dump start with.

Model level works on Dynamo's torch-level graph, graph level on the functional ATen graph after AOTAutograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .attention_inputs import AttentionInputs
from .base import Approximate, Exact, Exactness, Match, Pass, Reassociates, Refuse
from .biased_attention import BiasedAttention
from .bn_conv import BatchNormConv
from .causal_mask import CausalMask
from .channels_last import ChannelsLast
from .conv1d_layout import Conv1dLayout
from .conv_add_relu import ConvAddRelu
from .conv_bias import ConvBias
from .conv_bn import ConvBatchNorm
from .conv_branches import ConvBranches
from .conv_matmul import ConvMatmul
from .conv_relu import ConvRelu
from .conv_values import ConvValues
from .counters import Counters
from .cse import CommonSubexpressions
from .decode_attention import DecodeAttention
from .depthwise import Depthwise
from .depthwise_affine import DepthwiseAffine
from .depthwise_backward import DepthwiseBackward
from .depthwise_cpu import DepthwiseCPU
from .fft_conv import FftConv
from .grouped_conv import GroupedConv
from .grouped_heads import GroupedHeads
from .grouped_rows import GroupedRows
from .horizontal_matmul import HorizontalMatmul
from .known_numbers import KnownNumbers
from .large_kernel import LargeKernel
from .linear_act import LinearActivation
from .linear_cross_entropy import LinearCrossEntropy
from .manager import named_approximate, run, run_passes, static_inputs
from .max_pool import MaxPool
from .outer_product import OuterProduct
from .pad_matmul import PadMatmul
from .per_example_conv import PerExampleConv
from .plain_attention import PlainAttention
from .reinplace import Reinplace
from .remove_attention import RemoveAttention
from .row_major import RowMajor
from .shared_bmm import SharedBmm
from .short_attention import ShortAttention
from .skinny_linear import SkinnyLinear
from .stacked_sum import StackedSum
from .strided_conv import StridedConv
from .strip import Strip
from .tiled_mlp import TiledMLP
from .two_step_variance import TwoStepVariance
from .weight_prefetch import WeightPrefetch


@dataclass(frozen=True)
class Step:
    """One position: its number, the pass (None: the user's passes go here) and why it stands where it stands."""

    position: int
    item: Pass | None
    level: str
    word: str


PIPELINE: tuple[Step, ...] = (
    Step(0, RemoveAttention(), "model", "before anything is done to attention that the user wants gone"),
    Step(1, ConvBatchNorm(), "model", "while a convolution and its BatchNorm are still single calls with real weights"),
    Step(2, BiasedAttention(), "model", "before the next one, whose kernel walks over long sequences"),
    Step(3, PlainAttention(), "model", "before AOTAutograd derives it; library calls that it makes go on to the next two"),
    Step(4, CausalMask(), "model", "while attention is one call and its mask a few named operators"),
    Step(5, GroupedHeads(), "model", "kernels that group heads take no mask"),
    Step(6, LinearCrossEntropy(), "model", "while the loss is one call, before autograd makes its gradient"),
    Step(7, ConvBranches(), "model", "after each branch took its BatchNorm in; folds the one after the sum itself"),
    Step(8, BatchNormConv(), "model", "a BatchNorm that a layer before it could take is gone by now"),
    Step(9, ConvValues(), "model", "looks at the filters as they are after merging; only with frozen weights"),
    Step(10, LargeKernel(), "model", "after all that merges or folds kernels exactly: what is left is what runs"),
    Step(11, AttentionInputs(), "model", "once masks and repeated heads are gone, which decide the kernel that is asked for"),
    Step(12, None, "model", "the user's model passes see what ours left"),
    Step(16, ChannelsLast(), "graph", "first: every other pass sees its layouts; copies that became none go next"),
    Step(17, Conv1dLayout(), "graph", "before the next one: behind a turned convolution rows are in order"),
    Step(18, RowMajor(), "graph", "before copies that it makes needless are stripped"),
    Step(19, KnownNumbers(), "graph", "before the marks of what the trace made itself are stripped, and while equal ones differ"),
    Step(20, Strip(), "graph", "nothing that does nothing, so that patterns have one spelling"),
    Step(21, FftConv(), "graph", "before the convolution is taken by anything else"),
    Step(22, CommonSubexpressions(), "graph", "equal values are one node, so that siblings share their input by identity"),
    Step(23, StackedSum(), "graph", "once equal stacks are one node, so that all of its readers can go"),
    Step(24, PerExampleConv(), "graph", "takes the bias along, so before it is split off"),
    Step(25, ConvMatmul(), "graph", "with the bias, so before it is split off"),
    Step(26, GroupedConv(), "graph", "takes the bias along, so before it is split off"),
    Step(27, DepthwiseBackward(), "graph", "what it makes are kernels' calls, which later passes leave alone"),
    Step(28, DepthwiseCPU(), "graph", "like the next one, with a kernel for the CPU"),
    Step(29, TwoStepVariance(), "graph", "after equal nodes are one: its differences are to be made twice, not stored"),
    Step(30, Depthwise(), "graph", "takes the bias along, so before it is split off"),
    Step(31, ConvBias(), "graph", "once equal convolutions are one node"),
    Step(32, MaxPool(), "graph", "moves in front of the bias that was just split off"),
    Step(33, StridedConv(), "graph", "a convolution without bias has fewer spellings"),
    Step(34, ConvRelu(), "graph", "takes back the biases that only relu follows"),
    Step(35, ConvAddRelu(), "graph", "those that relu follows after one more sum"),
    Step(36, OuterProduct(), "graph", "before products are merged: this one is none"),
    Step(38, DepthwiseAffine(), "graph", "after the convolutions' biases are where they stay"),
    Step(39, SharedBmm(), "graph", "before siblings are merged: what it makes may be some"),
    Step(40, HorizontalMatmul(), "graph", "needs shared inputs; before any write to an input appears"),
    Step(43, SkinnyLinear(), "graph", "after q/k/v and gate/up are one product; takes in norms before they are kernels"),
    Step(44, TiledMLP(), "graph", "after siblings were merged: a merged product is none of its kind"),
    Step(45, PadMatmul(), "graph", "after siblings were merged: their width together counts"),
    Step(46, LinearActivation(), "graph", "what serves few rows or merges products goes first; takes aligned sizes only"),
    Step(47, GroupedRows(), "graph", "nothing else takes these products"),
    Step(50, None, "graph", "the user's graph passes see a functional graph"),
    Step(90, Reinplace(), "graph", "late: it gives up the functional form"),
    Step(92, DecodeAttention(), "graph", "takes in the writes into the cache, once they are in place"),
    Step(93, ShortAttention(), "graph", "what reads no cache"),
    Step(94, Counters(), "graph", "after nothing reads a counter through the index that it was"),
    Step(95, WeightPrefetch(), "graph", "once attention over a cache is one call"),
)


def pipeline(level: str, config: Any = None) -> list[tuple[int, Pass]]:
    """(position, pass) of one level: built-in ones that are not disabled, and the user's at their place."""
    disabled = set(getattr(config, "disable", ()) or ())
    if getattr(config, "weights", "checked") != "frozen":
        disabled.add(ConvValues.name)  # decides by values, which may change under any other policy
    given = [item for item in getattr(config, "passes", ()) or () if getattr(item, "level", "graph") == level]
    found: list[tuple[int, Pass]] = []
    for step in PIPELINE:
        if step.level != level:
            continue
        chosen = given if step.item is None else [_configured(step.item, config)]
        found.extend((step.position + offset, item) for offset, item in enumerate(chosen)
                     if item.name not in disabled and (step.item is None or named_approximate(item, config)))
    return found


def _configured(item: Pass, config: Any) -> Pass:
    """The pass with what the user asked of it."""
    wanted = getattr(config, "remove_attention", None)
    if isinstance(item, LargeKernel) and getattr(config, "large_kernel", None) is not None:
        return LargeKernel(config.large_kernel)
    if isinstance(item, HorizontalMatmul) and SkinnyLinear.name in (getattr(config, "disable", ()) or ()):
        return HorizontalMatmul(apart=False)
    return RemoveAttention(wanted) if isinstance(item, RemoveAttention) and wanted is not None else item


__all__ = ["PIPELINE", "Approximate", "Exact", "Exactness", "Match", "Pass", "PlainAttention", "Reassociates", "Refuse", "Step",
           "pipeline", "run", "run_passes", "static_inputs"]
