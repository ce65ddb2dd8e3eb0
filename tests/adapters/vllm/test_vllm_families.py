"""Every family in every kind of parallelism: traced layouts against vLLM's own loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_loading import Model, loaded_by_vllm
from tiny_checkpoints import (
    checkpoint,
    memory_buffers,
    memory_layout,
    tensor_table,
    write_config,
)

from kimisys.adapters.vllm.layout import build_model, offline_config, trace_vllm_layout
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.reshard import Layout, plan

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "glm4_moe",
    "qwen2_5_vl",
]
MOE = ["mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """By family: vLLM's configuration, and a checkpoint's tensors."""
    made = {}
    for family in FAMILIES:
        folder = write_config(tmp_path_factory.mktemp(family), False, family)
        given = checkpoint(folder, seed=3)
        made[family] = (offline_config(folder, "float32"), given)
    return made


CASES = [
    *((family, text) for family in FAMILIES for text in ("tp=1", "tp=4", "pp=2", "tp=2,pp=2,dp=2")),
    *((family, text) for family in MOE for text in ("tp=2,ep=on", "dp=2,ep=on", "dp=2")),
    *((family, text) for family in MOE for text in ("tp=2,dp=2,ep=on", "tp=2,pp=2,dp=2,ep=on")),
]


@pytest.mark.parametrize(("family", "text"), CASES)
def test_every_parameter_is_filled_as_vllm_fills_it(
    models: dict[str, Model], family: str, text: str
) -> None:
    parallel = EngineParallel.parse(text)
    config, given = models[family]
    table = tensor_table(given)
    source = memory_layout(given)
    layouts = []
    for rank in range(parallel.engine_size):
        expected = loaded_by_vllm(models[family], parallel, rank)
        layout = trace_vllm_layout(config, table, parallel, rank)
        layouts.append(layout)
        landed = {name: torch.full_like(p, 9.0) for name, p in expected.items()}
        plan(source, layout).execute(memory_buffers(given), memory_buffers(landed, rank))
        assert {buffer.name for buffer in layout.buffers} == expected.keys()
        for name, parameter in expected.items():
            assert torch.equal(landed[name], parameter), f"{name} of rank {rank}"
    check_back(given, Layout.merge(layouts), models[family], parallel)


FP8: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "qk_nope_head_dim": 96,
    "v_head_dim": 32,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    },
}


def quantized(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As DeepSeek's checkpoints are: weights of linear layers in FP8, scales for 128 x 128 blocks.

    Neither is computed from the other here: any bits will do.
    """
    made = {}
    for name, tensor in given.items():
        if tensor.dim() < 2 or any(part in name for part in ("embed", "lm_head", "mlp.gate.")):
            made[name] = tensor.bfloat16()
            continue
        made[name] = tensor.to(torch.float8_e4m3fn)
        blocks = [-(-size // 128) for size in tensor.shape]
        made[f"{name}_scale_inv"] = torch.rand(blocks)
    return made


@pytest.mark.parametrize("text", ["tp=2", "tp=2,dp=2,ep=on", "pp=3"])
def test_fp8_weights_and_their_scales_are_placed_as_vllm_does(tmp_path: Path, text: str) -> None:
    folder = write_config(tmp_path, False, "deepseek_v3", **FP8)
    plain = {name: v for name, v in FP8.items() if name != "quantization_config"}
    given = quantized(
        checkpoint(write_config(tmp_path / "plain", False, "deepseek_v3", **plain), 3)
    )
    config, parallel = offline_config(folder, "bfloat16"), EngineParallel.parse(text)
    for rank in range(parallel.engine_size):
        loaded = build_model(config, parallel, rank, device="cpu")
        loaded.load(given)
        layout = trace_vllm_layout(config, tensor_table(given), parallel, rank)
        expected = {n: p.detach() for n, p in loaded.module.named_parameters()}
        landed = {name: torch.empty_like(p) for name, p in expected.items()}
        made = plan(memory_layout(given), layout)
        made.execute(memory_buffers(given), memory_buffers(landed, rank))
        assert any(name.endswith("w13_weight_scale_inv") for name in expected) or rank == 0
        for name, parameter in expected.items():
            same = torch.equal(landed[name].view(torch.uint8), parameter.view(torch.uint8))
            assert same, f"{name} of rank {rank}"


def check_back(
    given: dict[str, torch.Tensor], layout: Layout, model: Model, parallel: EngineParallel
) -> None:
    """From what vLLM loaded on all ranks to the checkpoint's tensors again."""
    held = {tensor.name for tensor in layout.tensors}
    buffers: dict[tuple[int, str], np.ndarray] = {}
    for rank in range(parallel.engine_size):
        buffers |= memory_buffers(loaded_by_vllm(model, parallel, rank), rank)
    back = {name: torch.full_like(given[name], 9.0) for name in held}
    plan(layout.cover(), memory_layout(back)).execute(buffers, memory_buffers(back))
    assert held == given.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, given[name]), name
