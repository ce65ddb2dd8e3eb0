"""Layouts traced from vLLM's loader against running that loader on real weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm.distributed.parallel_state as parallel_state
from tiny_checkpoints import (
    memory_buffers,
    memory_layout,
    random_model,
    tensor_table,
    weights,
    write_config,
)
from vllm.config import VllmConfig
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from kimisys.adapters.vllm.layout import build_model, offline_config, trace_vllm_layout
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.errors import LayoutError, TraceError
from kimisys.reshard import Layout, Tensor, plan


@pytest.fixture(scope="module")
def configs(folders: dict[str, Path]) -> dict[str, VllmConfig]:
    return {name: offline_config(folder, "float32") for name, folder in folders.items()}


MODELS = ["tied", "untied", "qwen2-tied", "qwen2-untied", "llama-tied", "llama-untied"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1), (4, 1), (4, 2)])
def test_the_plan_fills_every_parameter_as_vllm_does(
    folders: dict[str, Path], configs: dict[str, VllmConfig], model: str, size: int, rank: int
) -> None:
    given = weights(random_model(folders[model], seed=1))
    loaded = build_model(configs[model], EngineParallel(size), rank, device="cpu")
    expected = dict(loaded.module.named_parameters())
    with torch.no_grad():
        for parameter in expected.values():
            parameter.fill_(7.0)
    loaded.load(given)

    layout = trace_vllm_layout(configs[model], tensor_table(given), EngineParallel(size), rank)
    landed = {name: torch.full_like(p, 9.0) for name, p in expected.items()}
    made = plan(memory_layout(given), layout)
    made.execute(memory_buffers(given), memory_buffers(landed, rank))

    assert {buffer.name for buffer in layout.buffers} == expected.keys()
    assert ("lm_head.weight" in expected) == model.endswith("untied")
    biases = [name for name in expected if name.endswith("bias")]
    assert len(biases) == (2 if model.startswith("qwen2") else 0)
    for name, parameter in expected.items():
        assert torch.equal(landed[name], parameter), name


@pytest.mark.parametrize("model", ["untied", "qwen2-untied", "llama-untied"])
def test_all_ranks_together_hold_every_tensor(
    folders: dict[str, Path], configs: dict[str, VllmConfig], model: str
) -> None:
    table = tensor_table(weights(random_model(folders[model], seed=1)))
    ranks = [trace_vllm_layout(configs[model], table, EngineParallel(4), rank) for rank in range(4)]
    held: dict[str, int] = {}
    for fragment in Layout.merge(ranks).cover().fragments:
        held[fragment.tensor] = held.get(fragment.tensor, 0) + fragment.region.elements
    assert held == {tensor.name: tensor.elements for tensor in table}


def test_tracing_leaves_the_process_as_it_was(
    folders: dict[str, Path], configs: dict[str, VllmConfig]
) -> None:
    groups = {n: v for n, v in vars(parallel_state).items() if n.startswith("_") and n.isupper()}
    layers = dict(configs["tied"].compilation_config.static_forward_context)
    ropes, dtype = dict(rotary_embedding._ROPE_DICT), torch.get_default_dtype()
    table = tensor_table(weights(random_model(folders["tied"], seed=1)))
    trace_vllm_layout(configs["tied"], table, EngineParallel(2), 1)
    with pytest.raises(TraceError):
        trace_vllm_layout(configs["tied"], table[1:], EngineParallel(2), 1)
    assert {n: getattr(parallel_state, n) for n in groups} == groups
    assert configs["tied"].compilation_config.static_forward_context == layers
    assert configs["tied"].parallel_config.tensor_parallel_size == 1
    assert ropes == rotary_embedding._ROPE_DICT
    assert torch.get_default_dtype() == dtype


def refused(config: VllmConfig, table: Iterable[Tensor], match: str) -> None:
    with pytest.raises(TraceError, match=match):
        trace_vllm_layout(config, list(table), EngineParallel(), 0)


def test_checkpoints_that_do_not_fit_are_refused_by_name(
    folders: dict[str, Path], configs: dict[str, VllmConfig]
) -> None:
    table = tensor_table(weights(random_model(folders["untied"], seed=1)))
    config = configs["untied"]
    norm = "model.layers.1.self_attn.q_norm.weight"
    refused(config, (t for t in table if t.name != norm), f"unwritten: '{norm}' .128 of 128 bytes")
    wrong = (Tensor(t.name, t.dtype, (16,)) if t.name == norm else t for t in table)
    refused(config, wrong, "vLLM's loader failed")
    refused(config, [*table, Tensor("model.layers.7.x.weight", "float32", (3,))], "layers.7")


def test_what_the_tracer_cannot_follow_is_refused_by_name(
    folders: dict[str, Path], configs: dict[str, VllmConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tensor_table(weights(random_model(folders["tied"], seed=1)))
    load: Any = VocabParallelEmbedding.weight_loader

    def scaled(self: Any, param: Any, loaded: torch.Tensor) -> None:
        load(self, param, loaded * 2)

    def assigned(self: Any, param: Any, loaded: torch.Tensor) -> None:
        load(self, param, loaded)
        param.data = param.data.clone()

    def unknown(self: Any, param: Any, loaded: torch.Tensor) -> None:
        load(self, param, torch.ones_like(loaded))

    def beside(self: Any, param: Any, loaded: torch.Tensor) -> None:
        load(self, param, loaded)
        self.copy.copy_(loaded)

    def with_buffer(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        self.register_buffer("copy", torch.zeros(29, 64))

    build: Any = VocabParallelEmbedding.__init__
    monkeypatch.setattr(VocabParallelEmbedding, "__init__", with_buffer)
    name = "'model.embed_tokens.weight'"
    for loader, match in (
        (scaled, rf"{name}.*aten\.mul"),
        (assigned, f"{name} was replaced"),
        (unknown, name),
        (beside, r"loads into 'model\.embed_tokens\.copy', which is not one of the parameters"),
    ):
        monkeypatch.setattr(VocabParallelEmbedding, "weight_loader", loader)
        refused(configs["tied"], table, match)


def test_a_loader_that_ignores_a_tensor_leaves_it_out(
    folders: dict[str, Path], configs: dict[str, VllmConfig]
) -> None:
    """Tied models are sometimes saved with their output head: vLLM ignores it."""
    table = tensor_table(weights(random_model(folders["tied"], seed=1)))
    with_head = [*table, Tensor("lm_head.weight", "float32", (29, 64))]
    layout = trace_vllm_layout(configs["tied"], with_head, EngineParallel(), 0)
    assert layout == trace_vllm_layout(configs["tied"], table, EngineParallel(), 0)


def test_a_model_that_vllm_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="vLLM takes no model from"):
        offline_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"]}')
    with pytest.raises(LayoutError, match="vLLM takes no model from"):
        offline_config(tmp_path)
    with pytest.raises(LayoutError, match=r"vLLM takes no model from.*'hidden_size'"):
        offline_config(write_config(tmp_path, False, hidden_size="wide"))


def test_impossible_ranks_and_sizes_are_refused(configs: dict[str, VllmConfig]) -> None:
    with pytest.raises(LayoutError, match=r"rank 2 of tp=2.* 0 to 1"):
        build_model(configs["tied"], EngineParallel(2), 2)
    with pytest.raises(
        LayoutError, match=r"tp=8 does not divide the 4 attention heads; .* tp=1, 2, 4"
    ):
        build_model(configs["tied"], EngineParallel(8), 0)
