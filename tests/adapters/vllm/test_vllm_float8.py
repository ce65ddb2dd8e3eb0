"""bfloat16 weights into an engine of a float8 model, against vLLM's own loading of a checkpoint
that vLLM's own function has quantized."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import (
    checkpoint,
    memory_buffers,
    memory_layout,
    tensor_table,
    write_config,
)
from vllm.config import VllmConfig
from vllm.utils.deep_gemm import per_block_cast_to_fp8

from kimisys.adapters.vllm.layout import build_model, offline_config, trace_vllm_layout
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.errors import LayoutError
from kimisys.reshard import Buffer, Fragment, Layout, plan
from kimisys.reshard.quantize import (
    check_whole_blocks,
    float8_names,
    quantized,
    scale_name,
)

FLOAT8 = {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "hidden_size": 256,
        "head_dim": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
    },
    # 192 rows of kv_a_proj_with_mqa: its last blocks are ragged, as those of the real model
    "deepseek_v3": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
}
Model = tuple[VllmConfig, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """By family: vLLM's configuration of the float8 model, and bfloat16 weights."""
    made = {}
    for family, sizes in SIZES.items():
        folder = write_config(tmp_path_factory.mktemp(family), False, family, **sizes)
        given = {
            name: tensor if name.endswith("bias") else tensor.bfloat16()
            for name, tensor in checkpoint(folder, seed=3).items()
        }
        write_config(folder, False, family, **sizes, **FLOAT8)
        made[family] = (offline_config(folder, "bfloat16"), given)
    return made


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM chooses its float8 kernels when it builds a model, by this answer; none is run here."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)


def chosen(given: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in given.items() if tensor.dim() == 2 and "_proj" in name]


def as_float8(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint quantized by vLLM's own function."""
    made = dict(given)
    for name in chosen(given):
        made[name], made[scale_name(name)] = per_block_cast_to_fp8(given[name])
    return made


def bits(tensor: torch.Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return found


@pytest.mark.parametrize("text", ["tp=1", "tp=2", "pp=2", "tp=2,ep=on"])
@pytest.mark.parametrize("family", list(SIZES))
def test_every_parameter_is_filled_as_vllm_fills_it(
    models: dict[str, Model], family: str, text: str
) -> None:
    config, given = models[family]
    parallel = EngineParallel.parse(text)
    made = quantized(memory_layout(given), chosen(given))
    sources: dict[Any, Any] = memory_buffers(given) | made.allocate()
    made.fill(memory_buffers(given), sources)
    reference = as_float8(given)
    assert set(tensor_table(reference)) == set(made.layout.tensors)
    for rank in range(parallel.engine_size):
        loaded = build_model(config, parallel, rank, device="cpu")
        expected = dict(loaded.module.named_parameters())
        with torch.no_grad():
            for parameter in expected.values():
                parameter.fill_(7.0)
        loaded.load(reference)
        layout = trace_vllm_layout(config, made.layout.tensors, parallel, rank)
        wanted = {tensor.name for tensor in layout.tensors}
        assert float8_names(layout) == [n for n in sorted(chosen(given)) if n in wanted]
        check_whole_blocks(layout)
        landed = {(b.rank, b.name): np.full(b.nbytes, 0xEE, np.uint8) for b in layout.buffers}
        plan(made.layout, layout).execute(sources, landed)
        for name, parameter in expected.items():
            if (rank, name) in landed:
                assert np.array_equal(landed[rank, name], bits(parameter)), f"{name} of {rank}"
            else:  # a default that the loader leaves alone: nothing of it is in the checkpoint
                assert name.endswith("_scale") and torch.all(parameter == 7.0)


def on_rank(layout: Layout, rank: int) -> Layout:
    """A layout of rank 0, of another rank."""
    fragments = [
        Fragment(f.tensor, f.region, rank, f.buffer, f.byte_offset, f.byte_strides)
        for f in layout.fragments
    ]
    buffers = [Buffer(rank, b.name, b.nbytes) for b in layout.buffers]
    return Layout(layout.tensors, buffers, fragments)


def test_two_source_ranks_quantize_what_they_hold(models: dict[str, Model]) -> None:
    """Every other tensor is on one of two source ranks; neither sees what the other holds."""
    config, given = models["deepseek_v3"]
    halves: list[dict[str, torch.Tensor]] = [{}, {}]
    for index, (name, tensor) in enumerate(given.items()):
        halves[index % 2][name] = tensor
    layouts, sources = [], {}
    for rank, half in enumerate(halves):
        made = quantized(
            on_rank(memory_layout(half), rank), [name for name in chosen(given) if name in half]
        )
        buffers: dict[Any, Any] = memory_buffers(half, rank) | made.allocate()
        made.fill(buffers, buffers)
        layouts.append(made.layout)
        sources |= buffers
    source = Layout.merge(layouts)
    layout = trace_vllm_layout(config, source.tensors, EngineParallel(2), 1)
    landed = {(b.rank, b.name): np.zeros(b.nbytes, np.uint8) for b in layout.buffers}
    plan(source, layout).execute(sources, landed)
    whole = as_float8(given)
    other = {key: np.ones_like(b) for key, b in landed.items()}
    plan(memory_layout(whole), layout).execute(memory_buffers(whole), other)
    assert all(np.array_equal(landed[key], other[key]) for key in landed)


def test_slices_that_cut_a_block_are_refused(models: dict[str, Model]) -> None:
    """At TP 4 an expert's 256 rows would be slices of 64."""
    config, given = models["deepseek_v3"]
    table = tensor_table(as_float8(given))
    with pytest.raises(LayoutError, match="block_n = 128"):
        trace_vllm_layout(config, table, EngineParallel(4), 0)
