"""An update of some parameters packs what depends on them, nothing else, and it packs it right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_vllm_pack import Dtype, loaded, outputs, packer_of, process, unprocessed
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from kimisys.adapters.vllm.layout import RankModel

CASES: list[tuple[str, str, Dtype]] = [
    ("tied", "", "float32"),
    ("tied", "", "bfloat16"),
    ("untied", "tp=2", "float32"),
    ("qwen2-untied", "", "bfloat16"),
    ("mixtral", "", "float32"),
    ("qwen3_moe", "tp=2", "bfloat16"),
    ("deepseek_v3", "", "float32"),
    ("glm4_moe", "tp=2,ep=on", "float32"),
    ("qwen2_5_vl", "", "bfloat16"),
]
METHODS: list[Any] = [
    UnquantizedLinearMethod,
    UnquantizedEmbeddingMethod,
    UnquantizedFusedMoEMethod,
]


def weights_of(model: RankModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


class World:
    """A running model that is updated in part, again and again, and what it should have become."""

    def __init__(self, folder: Path, parallel: str, dtype: Dtype) -> None:
        self.folder, self.parallel, self.dtype = folder, parallel, dtype
        self.running = loaded(folder, 0, parallel, dtype=dtype)
        self.packer = packer_of(self.running)
        self.weights = weights_of(self.unprocessed(0))
        self.others = [weights_of(self.unprocessed(seed)) for seed in (1, 2)]
        self.replayed: list[str] = []

    def unprocessed(self, seed: int) -> RankModel:
        return unprocessed(self.folder, seed, self.parallel, dtype=self.dtype)

    def replay(self, places: Mapping[str, torch.Tensor]) -> bool:
        """As a delta does it: what it writes into holds the version before."""
        for name, place in places.items():
            assert torch.equal(place, self.before[name]), f"{name} is not what was loaded"
            place.copy_(self.weights[name])
        self.replayed += places
        return True

    def update(self, touched: set[str], seed: int, replay: bool) -> None:
        self.before = dict(self.weights)
        self.weights |= {name: self.others[seed][name].clone() for name in touched}
        self.packer.pack(self.weights, touched, self.replay if replay else None)

    def expected(self) -> torch.nn.Module:
        model = self.unprocessed(0)
        with torch.no_grad():
            for name, parameter in model.module.named_parameters():
                parameter.copy_(self.weights[name])
        process(model)
        return model.module

    def check(self) -> None:
        expected, found = outputs(self.expected()), outputs(self.running.module)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("model", "parallel", "dtype"), CASES)
def test_any_parameters_touched_give_what_a_fresh_load_gives(
    folders: dict[str, Path], model: str, parallel: str, dtype: Dtype
) -> None:
    world = World(folders[model], parallel, dtype)
    names = sorted(world.packer.shapes)
    one_update = st.tuples(st.sets(st.sampled_from(names)), st.integers(0, 1), st.booleans())

    @settings(
        max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(st.lists(one_update, min_size=1, max_size=3))
    def run(updates: list[tuple[set[str], int, bool]]) -> None:
        for touched, seed, replay in updates:
            world.update(touched, seed, replay)
        world.check()

    run()
    for name in names:  # each alone: what depends on it is packed again
        world.update(
            {name}, 1 if torch.equal(world.weights[name], world.others[0][name]) else 0, True
        )
    world.check()
    assert any("norm" in name for name in world.replayed)
    assert not any("experts" in name for name in world.replayed), "experts are packed in place"


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """Layers in the order in which vLLM's methods process them."""
    seen: list[torch.nn.Module] = []

    def noting(kind: Any) -> Any:
        process = kind.process_weights_after_loading

        def run(method: Any, layer: torch.nn.Module) -> None:
            seen.append(layer)
            process(method, layer)

        return run

    for kind in METHODS:
        monkeypatch.setattr(kind, "process_weights_after_loading", noting(kind))
    return seen


@pytest.mark.parametrize("model", ["tied", "qwen3_moe", "deepseek_v3"])
def test_layers_that_were_not_touched_are_not_packed(
    folders: dict[str, Path], derived: list[torch.nn.Module], model: str
) -> None:
    running = loaded(folders[model], 1)
    packer, weights = packer_of(running), weights_of(unprocessed(folders[model], 1))
    modules = dict(running.module.named_modules())

    def packed(*touched: str) -> list[str]:
        derived.clear()
        packer.pack(weights, touched)
        names = [name for name, module in modules.items() if module in derived]
        assert len(names) == len(derived), "a layer was packed twice"
        return names

    assert packed() == []
    assert packed("model.layers.1.input_layernorm.weight") == []
    out = "model.layers.0.self_attn.o_proj"
    assert packed(f"{out}.weight") == [out]
    assert packed("model.embed_tokens.weight") == ["model.embed_tokens"]
    if model == "tied":
        head: Any = running.module.lm_head  # type: ignore[union-attr]
        assert head.cpu_linear is modules["model.embed_tokens"].cpu_linear
        both = ("model.layers.1.mlp.down_proj", "model.layers.0.mlp.gate_up_proj")
        assert packed(*(f"{name}.weight" for name in both)) == sorted(both)
    else:
        (experts,) = {n.rpartition(".")[0] for n in weights if "layers.1" in n and "w13" in n}
        # DeepSeek's router and its experts share a parameter, the router's bias.
        gate = ["model.layers.1.mlp.gate"] if model == "deepseek_v3" else []
        assert packed(f"{experts}.w2_weight") == [*gate, experts]
    if model == "deepseek_v3":
        absorbed = modules["model.layers.0.self_attn.mla_attn.mla_attn"]
        before: Any = absorbed.W_UV
        assert packed(f"{out}.weight") == [out] and absorbed.W_UV is before
        assert packed("model.layers.0.self_attn.kv_b_proj.weight")
        assert absorbed.W_UV is not before, "what MLA absorbs depends on kv_b_proj"


def test_a_hook_of_the_whole_model_has_all_weights_anew(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may derive from any of them, and change them."""
    running = loaded(folders["untied"], 1)
    calls: list[float] = []

    def hook(_: torch.nn.Module) -> None:
        calls.append(float(norm[0]))
        norm.mul_(2)

    kind = type(running.module)
    monkeypatch.setattr(kind, "process_weights_after_loading", hook, raising=False)
    norm = dict(running.module.named_parameters())["model.norm.weight"].detach()
    packer = packer_of(running)
    weights = weights_of(unprocessed(folders["untied"], 1))
    for _ in range(2):
        packer.pack(weights, {"model.embed_tokens.weight"}, lambda places: pytest.fail("replayed"))
    assert calls == [float(weights["model.norm.weight"][0])] * 2
