"""Index maps pushed through their producers: crop, flip, pad, resize, roll and normalise are one kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.schedule.test_group import compiled, launches

MEAN, STD = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.25])[:, None, None]


def norm(x: torch.Tensor) -> torch.Tensor:
    return (x - MEAN) / STD


def unit(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 255


def resize(x: torch.Tensor, mode: str, size: tuple[int, int], **more: bool) -> torch.Tensor:
    return F.interpolate(unit(x)[None], size=size, mode=mode, **more)[0]


PIPELINES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "crop, flip, pad": lambda x: norm(F.pad(unit(x[:, 5:40, 8:50].flip(-1)), (3, 4, 5, 6))),
    "roll, take every second": lambda x: norm(torch.roll(unit(x), (5, 7), (1, 2))[:, ::2, ::2]),
    "turn": lambda x: norm(torch.rot90(unit(x), 1, (1, 2))),
    "nearest, smaller": lambda x: norm(resize(x, "nearest", (24, 20))),
    "nearest, larger": lambda x: norm(resize(x, "nearest", (96, 112))),
    "bilinear, smaller": lambda x: norm(resize(x, "bilinear", (24, 20), align_corners=False)),
    "crop, bilinear, larger, half": lambda x: norm(
        resize(x[:, 8:40, 8:48], "bilinear", (64, 64), align_corners=True)
    ).half(),
    "reflect": lambda x: norm(F.pad(unit(x)[None], (4, 4, 4, 4), mode="reflect")[0]),
    "replicate": lambda x: norm(F.pad(unit(x)[None], (4, 4, 4, 4), mode="replicate")[0]),
    "patches": lambda x: torch.stack([norm(unit(x[:, i : i + 16, i : i + 16])) for i in (0, 8, 16)]),
    "shuffle": lambda x: norm(F.pixel_shuffle(unit(x).repeat(4, 1, 1)[None], 2)[0]),
    "pieces": lambda x: torch.cat([x[:, :8].float(), x[:, 16:24].float() * 2, norm(x[:, 24:32].float())], 1),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_one_kernel(name: str) -> None:
    x = torch.randint(0, 256, (3, 48, 56), dtype=torch.uint8)
    want, got, (record,) = compiled(PIPELINES[name], x)
    torch.testing.assert_close(got, want, rtol=2e-3 if want.dtype == torch.float16 else 1e-5, atol=1e-5)
    assert launches(record) == 1 and not record.calls


def test_what_many_read_is_stored_once() -> None:
    """The limits: a costly chain that every output reads again is not computed again."""

    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.exp(torch.sin(x))
        return y[torch.arange(0, 90) % 9] + 1

    x = torch.randn(9, 70)
    want, got, (record,) = compiled(f, x)
    torch.testing.assert_close(got, want)
    assert launches(record) == 2
