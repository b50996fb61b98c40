"""A rewrite of one's own, given to the compiler as an option.

Math       exp(a) · exp(b) = exp(a + b)
Exactness  reassociates: one rounding of the sum, amplified by |a + b|, in place of two roundings of exp
Legality   a and b have one floating dtype and one shape (so that the sum costs no more than the product did)
Cost       saves one exp per element, the most expensive part of such kernels
Source     school

The docstring has the five parts that every pass of fusionc has; `fusionc passes` prints them.

    python examples/write_a_pass.py
"""

from __future__ import annotations

from typing import Any

import torch

import fusionc
from fusionc.passes.base import Pass, Reassociates, Refuse


class MergeExp(Pass):
    """exp(a) · exp(b) becomes exp(a + b)."""

    name, exactness = "merge_exp", Reassociates(rtol=1e-5)

    @staticmethod
    def pattern(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Plain torch, traced once; found also as exp(b) · exp(a)."""
        return torch.exp(a) * torch.exp(b)

    def check(self, match: Any, facts: Any) -> Refuse | None:
        """Refusing is a value: the dump and ``explain`` print the reason."""
        a, b = match.a.meta["val"], match.b.meta["val"]
        if a.dtype != b.dtype or not a.dtype.is_floating_point:
            return Refuse(f"dtypes are {a.dtype} and {b.dtype}", match.b)
        if a.shape != b.shape:
            return Refuse(f"shapes are {list(a.shape)} and {list(b.shape)}", match.b)
        return None

    @staticmethod
    def replace(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """What stands there instead, in plain torch."""
        return torch.exp(a + b)


def main() -> tuple[int, list[str]]:
    """Compile one function where the pass applies and one where it refuses; return (times applied, refusals)."""
    a, b, row = torch.randn(64, 128), torch.randn(64, 128), torch.randn(128)
    options = {"passes": [MergeExp()]}

    def same_shape(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(a) * torch.exp(b) + 1

    def other_shape(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(a) * torch.exp(b) - 1

    fired, refused = 0, []
    for function, second in ((same_shape, b), (other_shape, row)):
        got = torch.compile(function, backend="fusionc", options=options)(a, second)
        torch.testing.assert_close(got, function(a, second), rtol=1e-5, atol=1e-5)
        record = next(p for p in fusionc.report()[-1].passes if p.name == MergeExp.name)
        fired += record.fired
        refused += [r.reason for r in record.refusals]
        print(f"{function.__name__}: {record.name} applied {record.fired} times")
        for refusal in record.refusals:
            print(f"    refused at {refusal.node}: {refusal.reason}")
    return fired, refused


if __name__ == "__main__":
    main()
