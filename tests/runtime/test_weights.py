"""Derived weights follow their sources: fault F11 of the reliability list, and the promise about addresses."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import pytest
import torch
from torch import nn

from fusionc.runtime.weights import Derived, DerivedWeights, VariantTable, refresh


def cat(sources: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(sources)


class Pair(nn.Module):
    """Two weights whose concatenation is derived; compiled graphs get them as arguments 1 and 2."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 3))

    def args(self) -> list[Any]:
        return ["x", self.a, self.b]


def table(policy: str = "checked", share: str | None = None, **kwargs: Any) -> DerivedWeights:
    return DerivedWeights([Derived("derived_0", (1, 2), cat, share)], policy, **kwargs)


def right(found: list[torch.Tensor], model: Pair) -> bool:
    return torch.equal(found[0], torch.cat([model.a.detach(), model.b.detach()]))


def change_in_place(model: Pair) -> None:
    with torch.no_grad():
        model.b.mul_(2)


def change_by_load(model: Pair) -> None:
    model.load_state_dict(Pair(5).state_dict())


def change_by_assign(model: Pair) -> None:
    model.load_state_dict(Pair(6).state_dict(), assign=True)


def change_by_data(model: Pair) -> None:
    model.a.data = torch.randn(2, 3)


def change_by_step(model: Pair) -> None:
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    (model.a.sum() + model.b.sum()).backward()
    sgd.step()


def change_by_parameter(model: Pair) -> None:
    model.a = nn.Parameter(torch.randn(2, 3))


CHANGES = [change_in_place, change_by_load, change_by_assign, change_by_data, change_by_step, change_by_parameter]


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_seen_in_place(change: Any) -> None:
    model, weights = Pair(), table()
    first = weights.resolve(model.args())[0]
    address = first.data_ptr()
    change(model)
    gc.collect()
    found = weights.resolve(model.args())
    assert right(found, model)
    assert found[0].data_ptr() == address and found[0] is first
    assert weights.refreshes == 2
    for _ in range(3):
        weights.resolve(model.args())
    assert weights.refreshes == 2


def test_data_mul_needs_refresh() -> None:
    model, weights = Pair(), table()
    weights.resolve(model.args())
    model.a.data.mul_(2)
    assert not right(weights.resolve(model.args()), model)  # the documented gap: nothing shows this write
    assert refresh(model) == 1
    assert right(weights.resolve(model.args()), model)
    model.a.data.mul_(2)
    assert refresh() >= 1
    assert right(weights.resolve(model.args()), model)
    assert refresh(Pair(3)) == 0


def test_instances_take_turns_without_recomputing() -> None:
    one, two, weights = Pair(1), Pair(2), table()
    first = [weights.resolve(one.args())[0], weights.resolve(two.args())[0]]
    for _ in range(5):
        assert weights.resolve(one.args())[0] is first[0] and right(first[:1], one)
        assert weights.resolve(two.args())[0] is first[1] and right(first[1:], two)
    assert weights.refreshes == 2
    change_in_place(one)
    assert right(weights.resolve(one.args()), one) and right(weights.resolve(two.args()), two)
    assert weights.refreshes == 3


def test_the_table_is_bounded() -> None:
    weights, models = table(limit=2), [Pair(i) for i in range(5)]
    for _ in range(2):
        for model in models:
            assert right(weights.resolve(model.args()), model)
    assert len(weights._entries) == 2


def test_dead_instances_leave_and_their_ids_may_return() -> None:
    weights = table()
    for seed in range(20):
        model = Pair(seed)
        assert right(weights.resolve(model.args()), model)
        del model  # no cycles: dies here
    assert len(weights._entries) <= 1 and len(weights._spare) <= 8


def test_tied_weights() -> None:
    model, weights = Pair(), table()
    model.b = model.a
    assert right(weights.resolve(model.args()), model)
    change_in_place(model)
    assert right(weights.resolve(model.args()), model)
    model.b = nn.Parameter(torch.randn(4, 3))
    assert right(weights.resolve(model.args()), model)


@pytest.mark.parametrize("policy", ["frozen", "manual"])
def test_policies(policy: str) -> None:
    model, other, weights = Pair(), Pair(9), table(policy)
    weights.resolve(model.args())
    change_in_place(model)
    assert not right(weights.resolve(model.args()), model)
    assert right(weights.resolve(other.args()), other)  # another instance is never confused
    assert refresh(model) == 1
    assert right(weights.resolve(model.args()), model)
    with pytest.raises(ValueError, match="valid ones are"):
        table("sometimes")


def test_graphs_share_one_copy() -> None:
    model, prefill, decode = Pair(), table(share="cat 0"), table(share="cat 0")
    a, b = prefill.resolve(model.args())[0], decode.resolve(model.args())[0]
    assert a is b and prefill.refreshes == 1 and decode.refreshes == 0
    change_in_place(model)
    assert right(decode.resolve(model.args()), model) and right(prefill.resolve(model.args()), model)
    assert prefill.refreshes + decode.refreshes == 2
    change_by_assign(model)
    gc.collect()
    assert right(prefill.resolve(model.args()), model) and right(decode.resolve(model.args()), model)
    assert decode.resolve(model.args())[0] is prefill.resolve(model.args())[0]
    assert table(share="other").resolve(model.args())[0] is not a


def test_only_what_changed_is_recomputed() -> None:
    c = nn.Parameter(torch.randn(3))
    model = Pair()
    weights = DerivedWeights([Derived("derived_0", (1, 2), cat), Derived("derived_1", (3,), lambda s: s[0] * 2)])
    args = [*model.args(), c]
    weights.resolve(args)
    change_in_place(model)
    weights.resolve(args)
    assert weights.refreshes == 3
    fresh = [*model.args(), nn.Parameter(torch.randn(3))]
    assert torch.equal(weights.resolve(fresh)[1], fresh[3].detach() * 2)
    assert torch.equal(weights.resolve(args)[1], c.detach() * 2)


def test_inference_tensors() -> None:
    weights = table()
    with torch.inference_mode():
        model = Pair()
        a, b = torch.randn(2, 3), torch.randn(4, 3)
        assert a.is_inference()
        found = weights.resolve(["x", a, b])
        assert torch.equal(found[0], torch.cat([a, b])) and not found[0].is_inference()
    with torch.no_grad():  # written later outside of inference mode
        a2 = torch.randn(2, 3)
        assert torch.equal(weights.resolve(["x", a2, b])[0], torch.cat([a2, b]))
        a2.add_(1)
        assert torch.equal(weights.resolve(["x", a2, b])[0], torch.cat([a2, b]))
    del model


def test_identity_is_not_returned() -> None:
    p = nn.Parameter(torch.randn(3))
    weights = DerivedWeights([Derived("derived_0", (0,), lambda s: s[0])])
    found = weights.resolve([p])[0]
    assert found.data_ptr() != p.data_ptr() and not found.requires_grad
    with torch.no_grad():
        p.add_(1)
    assert torch.equal(weights.resolve([p])[0], p.detach())


def test_other_shape_gets_new_storage() -> None:
    weights = table()
    model = Pair()
    weights.resolve(model.args())
    model.a.data = torch.randn(5, 3)
    assert right(weights.resolve(model.args()), model)


def test_no_derived_weights() -> None:
    assert DerivedWeights(()).resolve([1, 2]) == []


def test_tables_and_models_die() -> None:
    import weakref

    model, weights = Pair(), table(share="cat 0")
    weights.resolve(model.args())
    gone = weakref.ref(model.a), weakref.ref(weights)
    del model
    gc.collect()
    assert gone[0]() is None
    del weights
    gc.collect()
    assert gone[1]() is None


def test_threads() -> None:
    models, weights, wrong = [Pair(i) for i in range(4)], table(limit=2), []

    def work(model: Pair) -> None:
        for _ in range(50):
            if not right(weights.resolve(model.args()), model):
                wrong.append(model)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_variants() -> None:
    built: list[bool] = []

    def build(decision: bool) -> Any:
        built.append(decision)
        return (lambda x: x) if decision else (lambda x: x + 1)

    gate = nn.Parameter(torch.zeros(2))
    variants = VariantTable((0,), lambda s: bool((s[0] == 0).all()), build, limit=2)
    assert variants.select([gate])(1) == 1
    with torch.no_grad():
        gate.add_(1)
    assert variants.select([gate])(1) == 2
    with torch.no_grad():
        gate.zero_()
    assert variants.select([gate])(1) == 1 and built == [True, False]
    other = copy.deepcopy(gate)
    assert variants.select([other])(1) == 1 and built == [True, False]
    gate.data.add_(1)
    variants.forget()
    assert variants.select([gate])(1) == 2
    many = VariantTable((0,), lambda s: int(s[0].sum()), lambda d: lambda: d, limit=2)
    for value in range(6):
        with torch.no_grad():
            gate.fill_(value)
        assert many.select([gate])() == 2 * value
    assert len(many._variants) == 2 and len(many._choices) <= 8


def test_volatile_sources_are_compared_by_value() -> None:
    bn = nn.BatchNorm1d(3)
    weights = DerivedWeights([Derived("derived_0", (0,), lambda s: s[0] * 2, volatile=(0,))])
    first = weights.resolve([bn.running_mean])[0]
    version = bn.running_mean._version
    bn.train()(torch.randn(5, 3))
    assert bn.running_mean._version == version  # why this exists
    assert torch.equal(weights.resolve([bn.running_mean])[0], bn.running_mean * 2)
    assert weights.resolve([bn.running_mean])[0] is first and weights.refreshes == 2


def test_counters_stand_for_statistics_on_a_gpu() -> None:
    from fusionc.runtime.weights import _counters

    one, two = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    found = _counters([one.running_mean, one.running_var])
    assert len(found) == 1 and found[0] is one.num_batches_tracked
    before = found[0]._version
    one.train()(torch.randn(5, 3))
    two.train()(torch.randn(5, 3))
    assert found[0]._version == before + 1
    assert _counters([]) == ()
