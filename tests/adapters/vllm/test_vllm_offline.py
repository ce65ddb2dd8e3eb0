"""Symbolic layouts of engines against tracing every layer of every rank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from tiny_checkpoints import checkpoint, family_config, tensor_table, write_config
from vllm.config import VllmConfig
from vllm.model_executor.models.registry import ModelRegistry, _RegisteredModel

from kimisys.adapters import trace_cache
from kimisys.adapters.vllm import offline
from kimisys.adapters.vllm.layers import shortest_window
from kimisys.adapters.vllm.layout import offline_config, trace_vllm_layout
from kimisys.adapters.vllm.offline import engine_layout, symbolic_layout
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.errors import LayoutError, TraceError
from kimisys.reshard import Layout, SymbolicLayout, Tensor


@dataclass(frozen=True)
class Model:
    folder: Path
    config: VllmConfig
    table: list[Tensor]


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 5},
    "qwen3_moe": {"num_hidden_layers": 5, "mlp_only_layers": [2]},
    "deepseek_v3": {"num_hidden_layers": 6, "first_k_dense_replace": 2},
    "glm4_moe": {"num_hidden_layers": 5},
    "qwen2_5_vl": {"num_hidden_layers": 5},
    # as many layers as its vision tower has, which no pipeline splits
    "qwen2_5_vl even": {"num_hidden_layers": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    made = {}
    for name, options in FAMILIES.items():
        family = name.split()[0]
        folder = write_config(tmp_path_factory.mktemp(family), False, family, **options)
        table = tensor_table(checkpoint(folder, 3))
        made[name] = Model(folder, offline_config(folder, "float32"), table)
    return made


def parts(layout: Layout) -> Iterator[Any]:
    """What a layout says, whatever the order it says it in."""
    yield {(t.name, t.dtype, t.shape) for t in layout.tensors}
    yield {(b.rank, b.name, b.nbytes) for b in layout.buffers}
    yield sorted(
        (
            f.tensor,
            f.region.offset,
            f.region.extent,
            f.rank,
            f.buffer,
            f.byte_offset,
            f.byte_strides,
        )
        for f in layout.fragments
    )
    yield sorted((p.rank, p.buffer, p.byte_offset, p.nbytes) for p in layout.padding)


CASES = [
    ("qwen3", "tp=2", 2),
    ("qwen3", "pp=2,dp=2", 2),
    ("qwen3_moe", "tp=2,dp=2,ep=on", 3),
    ("qwen3_moe", "tp=2,dp=2", 3),
    ("deepseek_v3", "tp=2,dp=2,ep=on", 3),
    ("deepseek_v3", "tp=2,pp=3", 3),
    ("glm4_moe", "tp=2,pp=2,dp=2,ep=on", 3),
    ("qwen2_5_vl", "tp=2", 2),
    ("qwen2_5_vl", "pp=2", 2),
    ("qwen2_5_vl even", "tp=2", 2),
    ("qwen2_5_vl even", "pp=2", 2),
]


@pytest.mark.parametrize(("family", "text", "blocks"), CASES)
def test_the_same_as_asking_for_every_layer_of_every_rank(
    models: dict[str, Model], family: str, text: str, blocks: int
) -> None:
    model, parallel = models[family], EngineParallel.parse(text)
    symbolic = symbolic_layout(model.config, model.table, parallel)
    every = Layout.merge(
        [
            trace_vllm_layout(model.config, model.table, parallel, rank)
            for rank in range(parallel.world_size)
        ]
    )
    assert list(parts(symbolic.concrete())) == list(parts(every))
    assert len(symbolic.blocks) == blocks, "alike layers of all stages are one block"
    assert symbolic.ranks == tuple(range(parallel.world_size))


def test_replicas_have_the_same_tensors_on_other_ranks(models: dict[str, Model]) -> None:
    model = models["qwen3_moe"]
    one = symbolic_layout(model.config, model.table, EngineParallel.parse("tp=2,ep=on"))
    three = symbolic_layout(
        model.config, model.table, EngineParallel.parse("tp=2,ep=on,replicas=3")
    )
    assert three.ranks == tuple(range(6)) and three.nbytes == 3 * one.nbytes
    for rank in range(6):
        original, copied = (
            [
                (f.tensor, f.region, f.buffer, f.byte_offset, f.byte_strides)
                for f in layout.fragments
            ]
            for layout in (one.of_rank(rank % 2), three.of_rank(rank))
        )
        assert original == copied


def test_layers_that_the_checkpoint_tells_apart_are_not_alike(models: dict[str, Model]) -> None:
    """One layer without its query norm: a message names it, though its likes have theirs."""
    model = models["qwen3"]
    name = "model.layers.3.self_attn.q_norm.weight"
    table = [tensor for tensor in model.table if tensor.name != name]
    with pytest.raises(TraceError, match=name.replace(".", r"\.")):
        symbolic_layout(model.config, table, EngineParallel())


def test_what_would_be_lost_is_refused_by_name(models: dict[str, Model]) -> None:
    """100 columns do not divide by 8: vLLM would take 12 on each rank."""
    config = family_config("qwen3_moe", moe_intermediate_size=100, num_attention_heads=8)
    wide = {"gate_proj": (100, 64), "up_proj": (100, 64), "down_proj": (64, 100)}
    table = [
        Tensor(t.name, t.dtype, wide[t.name.split(".")[-2]] if ".experts." in t.name else t.shape)
        for t in models["qwen3_moe"].table
    ]
    with pytest.raises((LayoutError, TraceError), match=r"experts|divide"):
        engine_layout(config, table, EngineParallel(tensor=8))


def test_a_layout_is_traced_once_and_then_read(
    models: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(trace_cache.SWITCH, raising=False)
    model, parallel = models["qwen3"], EngineParallel(2)
    first = engine_layout(model.folder, model.table, parallel, "float32")
    assert first == symbolic_layout(model.config, model.table, parallel)

    def fail(*_: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(offline, "symbolic_layout", fail)
    config = json.loads((model.folder / "config.json").read_text())
    assert engine_layout(config, model.table[::-1], parallel, "float32") == first
    for table, other, dtype in (
        (model.table[1:], parallel, "float32"),
        (model.table, EngineParallel(4), "float32"),
        (model.table, parallel, "bfloat16"),
    ):
        with pytest.raises(AssertionError, match="asked again"):
            engine_layout(config, table, other, dtype)  # type: ignore[arg-type]


def test_what_a_plug_in_builds_is_asked_anew(
    models: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache's key does not know its code; and of the environment it keeps no secret."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VLLM_API_KEY", "not-for-the-disk")
    monkeypatch.delenv(trace_cache.SWITCH, raising=False)
    model, asked = models["qwen3"], []

    def traced(*arguments: Any) -> SymbolicLayout:
        asked.append(arguments)
        return symbolic_layout(*arguments)

    monkeypatch.setattr(offline, "symbolic_layout", traced)

    def ask() -> int:
        engine_layout(model.folder, model.table, EngineParallel(), "float32")
        return len(asked)

    assert [ask(), ask()] == [1, 1]
    (file,) = (tmp_path / "kimisys").iterdir()
    assert b"not-for-the-disk" not in file.read_bytes() and b"Qwen3ForCausalLM" in file.read_bytes()
    monkeypatch.setenv("VLLM_API_KEY", "another")
    assert ask() == 2
    monkeypatch.setattr(vllm, "__version__", "0.0")
    assert ask() == 3
    # what the plug-in's model would be loaded with does not matter here
    known = engine_layout(model.folder, model.table, EngineParallel(), "float32")
    monkeypatch.setattr(offline, "offline_config", lambda *_: model.config)
    monkeypatch.setattr(offline, "symbolic_layout", lambda *given: asked.append(given) or known)
    plugged = type("Qwen3ForCausalLM", (), {"__module__": "plugin.models"})
    own = _RegisteredModel(None, plugged)  # type: ignore[arg-type]
    monkeypatch.setitem(ModelRegistry.models, "Qwen3ForCausalLM", own)
    assert [ask(), ask()] == [4, 5]


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"config\.json cannot be read: .*name the folder"):
        engine_layout(tmp_path, [], EngineParallel())
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(LayoutError, match=r"config\.json holds no JSON object"):
        engine_layout(tmp_path, [], EngineParallel())


def test_the_shortest_window() -> None:
    assert shortest_window([[0, 1], [2, 3, 4]]) == range(1, 3)
    assert shortest_window([[0, 2, 4], [1, 3]]) == range(0, 2)
    assert shortest_window([[0], [1, 2, 3], [4]]) == range(0, 5)
    assert shortest_window([[7, 8]]) == range(7, 8)


def test_sizes_that_vllm_cannot_split_are_refused(models: dict[str, Model]) -> None:
    model = models["qwen3_moe"]
    with pytest.raises(LayoutError, match=r"tp=3 does not divide the 4 .*tp=1, 2, 4"):
        engine_layout(model.folder, model.table, EngineParallel(3))
    with pytest.raises(LayoutError, match=r"pp=9 stages for 5 layers.*pp=5"):
        engine_layout(model.folder, model.table, EngineParallel(pipeline=9))
    assert torch.get_default_dtype() == torch.float32
