"""Every family in every kind of parallelism: traced layouts against vLLM's own loading."""

from __future__ import annotations

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
Model = tuple[VllmConfig, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """By family: vLLM's configuration, and a checkpoint's tensors."""
    made = {}
    for family in FAMILIES:
        folder = write_config(tmp_path_factory.mktemp(family), False, family)
        given = checkpoint(folder, seed=3)
        made[family] = (offline_config(folder, "float32"), given)
    return made


def loaded_by_vllm(model: Model, parallel: EngineParallel, rank: int) -> dict[str, torch.Tensor]:
    """What vLLM's own loader leaves in every parameter of a rank; sevens where it wrote nothing."""
    config, given = model
    made = build_model(config, parallel, rank, device="cpu")
    expected = dict(made.module.named_parameters())
    with torch.no_grad():
        for parameter in expected.values():
            parameter.fill_(7.0)
    made.load(given)
    return {name: parameter.detach() for name, parameter in expected.items()}


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
