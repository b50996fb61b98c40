"""What a large depthwise kernel can be replaced by, as small values that print and read back (a plan file holds the text).

    low_rank 3                       three pairs of a column (kh × 1) and a row (1 × kw) filter
    low_rank 2 5x5                   two such pairs, and a dense centred square (a small kernel was merged into a large one)
    inception 3x3 1x31 31x1          a centred square and two bands; 1x1 is the identity branch
    dilated_sparse 5x5 7x7@2         a dense square and dilated ones, all centred
    shiftwise 3x3+0+12 3x3+3+12      small blocks at the given first tap (row, column) of the kernel
    recursive 5x5 9x9/2              a dense square, and one on the image at half the resolution, interpolated back

Sources: inception: Yu et al., InceptionNeXt (arXiv 2303.16900); dilated_sparse: Ding et al., UniRepLKNet (arXiv 2311.15599);
shiftwise: Li et al., Shift-wise convolution (arXiv 2401.12736); recursive: Zhao et al., RecConv (arXiv 2412.19628), here with
fixed down- and upsampling, because learned ones cannot be had from the weights of a single kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

METHODS = ("low_rank", "inception", "dilated_sparse", "shiftwise", "recursive")
_LIMIT = 4096  # taps along one side, and branches


@dataclass(frozen=True)
class Branch:
    """A depthwise filter of ``size`` taps, ``dilation`` apart, whose first tap is tap ``at`` of the kernel it stands in."""

    size: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    at: tuple[int, int] = (0, 0)

    @property
    def reach(self) -> tuple[int, int]:
        """Taps of the kernel from the first to the last, along both sides."""
        return (self.size[0] - 1) * self.dilation[0] + 1, (self.size[1] - 1) * self.dilation[1] + 1

    @property
    def taps(self) -> int:
        """Products for one output."""
        return self.size[0] * self.size[1]


@dataclass(frozen=True)
class LowRank:
    """Σᵢ column i ⊗ row i, ``rank`` of them for every channel, and a centred square of ``dense`` taps a side (0: none)."""

    rank: int
    dense: int = 0
    method: str = "low_rank"

    def __str__(self) -> str:
        return f"low_rank {self.rank}" + (f" {self.dense}x{self.dense}" if self.dense else "")


@dataclass(frozen=True)
class Branches:
    """A sum of depthwise filters of one input ("inception", "dilated_sparse" and "shiftwise")."""

    method: str
    kernel: tuple[int, int]
    branches: tuple[Branch, ...]

    def __str__(self) -> str:
        return " ".join([self.method, *(_text(b, self.kernel) for b in self.branches)])


@dataclass(frozen=True)
class Recursive:
    """A dense centred square of ``dense`` taps a side (0: none) and squares on coarser images: (taps a side, factor)."""

    dense: int
    levels: tuple[tuple[int, int], ...]
    method: str = "recursive"

    def __str__(self) -> str:
        first = [f"{self.dense}x{self.dense}"] if self.dense else []
        return " ".join(["recursive", *first, *(f"{k}x{k}/{f}" for k, f in self.levels)])


Form = LowRank | Branches | Recursive


def centred(kernel: tuple[int, int], size: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> Branch:
    """A branch in the middle of a kernel with odd sides."""
    bare = Branch(size, dilation)
    return Branch(size, dilation, ((kernel[0] - bare.reach[0]) // 2, (kernel[1] - bare.reach[1]) // 2))


def _text(branch: Branch, kernel: tuple[int, int]) -> str:
    out = f"{branch.size[0]}x{branch.size[1]}"
    if branch.dilation != (1, 1):
        out += f"@{branch.dilation[0]}"
    if branch != centred(kernel, branch.size, branch.dilation):
        out += f"+{branch.at[0]}+{branch.at[1]}"
    return out


_BRANCH = re.compile(r"(\d{1,4})x(\d{1,4})(?:@(\d{1,4}))?(?:\+(\d{1,4})\+(\d{1,4}))?(?:/(\d{1,4}))?")


def parse(text: str, kernel: tuple[int, int]) -> Form:
    """The form that ``str`` wrote, for a kernel of these sides. Raises ValueError for anything else."""
    method, *words = text.split()
    if method not in METHODS or not 1 <= len(words) <= _LIMIT:
        raise ValueError(f"{text[:80]!r} is no decomposition")
    if method == "low_rank":
        rank = int(words[0]) if words[0].isdigit() else 0
        square = re.fullmatch(r"(\d{1,4})x\1", words[1]) if len(words) == 2 else None
        side = int(square[1]) if square else 0
        fits = len(words) == 1 or side % 2 == 1 and side < min(kernel) and all(k % 2 for k in kernel)
        if not fits or not 1 <= rank <= min(kernel):
            raise ValueError(f"{text[:80]!r} is no rank of a {kernel[0]}x{kernel[1]} kernel")
        return LowRank(rank, side)
    branches, dense, levels = [], 0, []
    for word in words:
        found = _BRANCH.fullmatch(word)
        if found is None:
            raise ValueError(f"{word[:40]!r} is no branch")
        h, w, d, i, j, factor = (int(n) if n is not None else None for n in found.groups())
        assert h is not None and w is not None
        if method == "recursive":
            if h != w or h % 2 == 0 or d is not None or i is not None or factor not in (None, 2, 4, 8):
                raise ValueError(f"{word[:40]!r} is no level of a recursive decomposition")
            if factor is None:
                dense = h
            else:
                levels.append((h, factor))
            continue
        dilation = (d or 1, d or 1)
        branch = centred(kernel, (h, w), dilation) if i is None or j is None else Branch((h, w), dilation, (i, j))
        ends = [a + r for a, r in zip(branch.at, branch.reach)]
        if factor is not None or not h * w or min(branch.at) < 0 or ends[0] > kernel[0] or ends[1] > kernel[1]:
            raise ValueError(f"{word[:40]!r} does not lie in a {kernel[0]}x{kernel[1]} kernel")
        branches.append(branch)
    if method == "recursive":
        if not levels:
            raise ValueError(f"{text[:80]!r} has no coarse level")
        return Recursive(dense, tuple(levels))
    return Branches(method, kernel, tuple(branches))


__all__ = ["METHODS", "Branch", "Branches", "Form", "LowRank", "Recursive", "centred", "parse"]
