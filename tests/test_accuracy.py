"""The contract of approximate passes: plans that are checked when read, errors that are what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fusionc.accuracy import Agreement, Entry, Plan, agreement, change, weight_hash, within
from fusionc.errors import OptionError

PLAN = Plan("remove_attention", 6, (Entry(3, "a.b", "why", 0.5, "0" * 32), Entry(1)), "gate_norm/layer")


def test_round_trip(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "p.json")
    found = Plan.load(tmp_path / "p.json")
    assert found.to_json() == PLAN.to_json() and found.layers == (1, 3) and math.isnan(found.entries[1].score)
    assert PLAN.without(3).layers == (1,)


@pytest.mark.parametrize("change_", [
    {"format": "other"}, {"total": "6"}, {"total": True}, {"entries": {}}, {"extra": 1}, {"total": 2},
    {"entries": [{"layer": 1}]}, {"entries": [{"layer": 1, "name": "", "reason": "", "score": 0.0, "weights": "zz"}]},
    {"entries": [{"layer": 1, "name": "", "reason": "", "score": "0", "weights": ""}]},
    {"entries": [{"layer": 1, "name": "", "reason": "", "score": 10**400, "weights": ""}]},
    {"entries": [{"layer": 1, "name": "", "reason": "", "score": None, "weights": ""}] * 2},
    {"entries": [{"layer": -1, "name": "", "reason": "", "score": None, "weights": ""}]},
])  # fmt: skip
def test_rejects(change_: dict, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(PLAN.to_json() | change_))
    with pytest.raises(OptionError):
        Plan.load(tmp_path / "p.json")


def test_rejects_what_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(OptionError, match="not JSON"):
        Plan.load(tmp_path / "p.json")


def test_numbers() -> None:
    a = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    found = change(a, torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    assert found.cosine == pytest.approx(0.5) and found.relative_l2 == pytest.approx(math.sqrt(2 / 26))
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    both = agreement([p.log(), p.log()], [p.log(), q.log()])
    assert both.kl == pytest.approx(0.5 * (0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5)))
    assert both.top1 == 1.0  # argmax of equal logits is the first
    never = torch.tensor([[0.0, -math.inf]])
    assert agreement([never], [never]).kl == 0.0
    nothing = torch.full((1, 2), math.nan)
    assert math.isnan(agreement([nothing], [nothing]).kl)  # not 0: nobody knows


def test_hash_sees_content_shape_and_type() -> None:
    x = torch.arange(6.0)
    known = {weight_hash([t]) for t in (x, x + 1, x.view(2, 3), x.half(), x.bfloat16())}
    assert len(known) == 5 and weight_hash([x.view(2, 3).T]) == weight_hash([x.view(2, 3).T.contiguous()])


def test_within_leaves_the_worst_out() -> None:
    seen: list[tuple[int, ...]] = []

    def apply(p: Plan) -> Agreement:
        seen.append(p.layers)
        return Agreement(float(sum(p.layers)), 1.0, 0.0)

    plan, found, gone = within(PLAN, 1.0, {1: 0.1, 3: 0.7}, apply)
    assert plan.layers == (1,) and gone == (3,) and found is not None and seen == [(1, 3), (1,)]
    with pytest.raises(OptionError, match="KL"):
        within(PLAN, -1, {}, apply)
