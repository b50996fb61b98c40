"""What is gone is gone: parameters, key/value caches of both kinds, and reads and writes in the compiled graph, counted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fusionc

from .models import Backend, inputs, make, run, values, zeroed

pytestmark = pytest.mark.filterwarnings("ignore::fusionc.errors.FallbackWarning")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def held(cache: Any) -> list[int]:
    """Bytes of keys and values by layer."""
    return [sum(t.nbytes for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)
            for layer in cache.layers]  # fmt: skip


def caches(model: Any, prompt: torch.Tensor) -> list[list[int]]:
    """Bytes by layer after a call with a growing cache and with a static one of 16 positions."""
    from transformers import DynamicCache, StaticCache

    found = []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        with torch.no_grad():
            model(prompt, past_key_values=cache, use_cache=True)
        found.append(held(cache))
    return found


def test_module_form_holds_neither_weights_nor_cache() -> None:
    model, prompt = make("Llama"), inputs("Llama")["input_ids"]
    layer = model.model.layers[2]
    mine = sum(p.nbytes for p in layer.self_attn.parameters()) + layer.input_layernorm.weight.nbytes
    before = caches(model, prompt)
    report = fusionc.remove_attention(model, [2, 4], inputs={"input_ids": prompt})
    after = caches(model, prompt)
    assert report.freed_bytes == 2 * mine
    assert not [path for path, _ in model.named_parameters() if ".2.self_attn" in path or ".4.input_layernorm" in path]
    for whole, pruned in zip(before, after):
        assert [n for n, size in enumerate(pruned) if size == 0] == [2, 4]
        assert all(b == a for n, (a, b) in enumerate(zip(whole, pruned)) if n not in (2, 4)) and min(whole) > 0


def test_uniform_mode_keeps_values_only() -> None:
    model, prompt = make("Llama"), inputs("Llama")["input_ids"]
    before = caches(model, prompt)
    fusionc.remove_attention(model, [0, 3], inputs={"input_ids": prompt}, mode="uniform")
    for whole, pruned in zip(before, caches(model, prompt)):
        assert [n for n, (a, b) in enumerate(zip(whole, pruned)) if a != b] == [0, 3]
        # values of 8 elements a head and position, and one element of the key
        assert pruned[0] == pruned[3] == whole[0] * (8 + 1) // (8 + 8)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
def test_uniform_mode_generates(more: dict[str, Any]) -> None:
    model, prompt = make("Llama"), inputs("Llama")["input_ids"]
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for n in (0, 3):
            reference.model.layers[n].self_attn.q_proj.weight.zero_()
    fusionc.remove_attention(model, [0, 3], inputs={"input_ids": prompt}, mode="uniform")
    given = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)} | more
    assert model.generate(prompt, **given).tolist() == reference.generate(prompt, **given).tolist()


def test_uniform_mode_compiles_in_one_graph() -> None:
    from transformers import StaticCache

    model, prompt = make("Llama"), inputs("Llama")["input_ids"]
    fusionc.remove_attention(model, [0, 3], inputs={"input_ids": prompt}, mode="uniform")
    step, found = torch.compile(model, backend="aot_eager", fullgraph=True), []
    for call in (model, step):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(prompt, past_key_values=cache)
            found.append(call(prompt[:, :1], past_key_values=cache).logits)
        assert [layer.keys.shape[-1] for layer in cache.layers] == [1, 8, 8, 1, 8, 8]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_uniform_mode_undone_leaves_no_trace() -> None:
    model, batch = make("Llama"), inputs("Llama")
    before = values(model, batch)
    report = fusionc.remove_attention(model, [3], calibration=[batch], mode="uniform", error_budget=0.0)
    assert not report.plan.entries and not model.model.layers[3].self_attn._forward_pre_hooks
    assert (values(model, batch) - before).abs().max() == 0


class Seen(Backend):
    """The graph form, then AOTAutograd: which parameters and caches its graph still reads or writes."""

    def __call__(self, gm: torch.fx.GraphModule, given: list[Any]) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        super().__call__(gm, given)
        names = [n.name for n in self.gm.graph.find_nodes(op="placeholder")]

        def look(graph: torch.fx.GraphModule, _: Any) -> Any:
            inputs = list(graph.graph.find_nodes(op="placeholder"))
            self.unread = {name for name, n in zip(names, inputs, strict=True) if not n.users}
            return graph.forward

        return aot_autograd(fw_compiler=look, inference_compiler=look, keep_inference_input_mutations=True)(
            self.gm, given
        )


def test_graph_form_reads_no_removed_weight_and_writes_no_cache() -> None:
    from transformers import StaticCache

    model, tokens = make("Llama"), inputs("Llama")["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        model(tokens[:, :8], past_key_values=cache)
    twin = copy.deepcopy(cache)
    backend = Seen({"attention": [2], "block": [4]})
    found = run(backend, model, tokens[:, 8:], past_key_values=cache)
    weights = {n for n in backend.unread if "parameters" in n}
    assert all("layers_modules_2" in n or "layers_modules_4" in n for n in weights)
    # q, k, v, o and the norm of two layers, gate, up, down and the norm of one
    assert len(weights) == 2 * 5 + 4
    assert len(backend.unread - weights) >= 4, backend.unread  # keys and values of both
    from .test_drop_lists import without

    with torch.no_grad():
        expected = without(zeroed(copy.deepcopy(model), (2, 4)), (4,))(tokens[:, 8:], past_key_values=twin).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_write_that_no_pass_declared_is_still_a_fault() -> None:
    """An approximate pass may drop the writes that it says it drops, and no others."""
    from fusionc.errors import VerifyError
    from fusionc.passes.base import DROPPED_KEY, Approximate, Match, Pass
    from fusionc.passes.manager import run as run_pipeline

    class Forgets(Pass):
        name, level, exactness = "forgets", "model", Approximate("test")

        def __init__(self, says: list[str]) -> None:
            self.says = says

        def find(self, facts: Any) -> Any:
            for n in facts.gm.graph.nodes:
                if n.target == "add_":
                    yield Match({}, (n,))

        def replace(self, match: Any, facts: Any) -> None:
            (node,) = match.nodes
            node.replace_all_uses_with(node.args[0])
            facts.gm.graph.erase_node(node)
            facts.gm.meta[DROPPED_KEY] = self.says

    def graph() -> torch.fx.GraphModule:
        g = torch.fx.Graph()
        a, b = g.placeholder("a"), g.placeholder("b")
        g.call_method("add_", (a, 1))
        g.output(g.call_method("add_", (b, 1)))
        return torch.fx.GraphModule(torch.nn.Module(), g)

    config = fusionc.Config(verify=True, strict=True)
    run_pipeline([(0, Forgets(["a", "b"]))], graph(), "model", config, [])
    with pytest.raises(VerifyError, match="not written any more: b"):
        run_pipeline([(0, Forgets(["a"]))], graph(), "model", config, [])
