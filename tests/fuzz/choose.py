"""Where the fuzzer's choices come from: hypothesis (which shrinks them) or a plain random generator (which is fast)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tests.fuzz.program import Input

T = TypeVar("T")
LARGE = 1e3


@dataclass(frozen=True)
class Value:
    """A named value of the growing program: its eager tensor, and whether no rounding happened on the way."""

    name: str
    tensor: torch.Tensor
    exact: bool


class Chooser:
    """Choices and the values chosen from. ``integer(low, high)`` draws from both ends inclusive."""

    def __init__(self, integer: Callable[[int, int], int]) -> None:
        self.integer = integer
        self.values: list[Value] = []
        self.sizes: list[int] = []
        self.inputs = 0
        self.asked: list[Input] = []

    def fresh(self, shape: Sequence[int], dtype: str) -> Input:
        """A new input for the step that is being made: a layer's weight, say."""
        made = Input(
            f"x{self.inputs + len(self.asked)}", dtype, tuple(shape), values="weight", seed=self.integer(0, 99)
        )
        self.asked.append(made)
        return made

    @staticmethod
    def dtype(value: Value) -> str:
        """The name of a value's dtype."""
        return str(value.tensor.dtype).removeprefix("torch.")

    def pick(self, items: Sequence[T]) -> T:
        return items[self.integer(0, len(items) - 1)]

    def value(self, test: Callable[[Value], bool] = lambda v: True) -> Value | None:
        """One of the values that pass the test, newer ones more often; None when none does."""
        fitting = [v for v in reversed(self.values) if test(v)]
        if not fitting:
            return None
        return fitting[min(self.integer(0, len(fitting) - 1), self.integer(0, len(fitting) - 1))]

    @staticmethod
    def finite(value: Value) -> bool:
        """Finite and small, so that a cast to an integer type is defined."""
        return not value.tensor.is_floating_point() or bool((value.tensor.abs() <= LARGE).all())


def from_seed(seed: int) -> Chooser:
    """Choices of Python's generator: the same seed makes the same program in every process."""
    return Chooser(random.Random(seed).randint)


def from_draw(draw: Any) -> Chooser:
    """Choices of a hypothesis ``draw``."""
    from hypothesis import strategies

    return Chooser(lambda low, high: draw(strategies.integers(low, high)))
