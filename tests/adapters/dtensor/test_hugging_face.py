"""Names and shapes of checkpoints, against what transformers' `save_pretrained` writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_checkpoints import (
    checkpoint,
    random_model,
    tensor_table,
    write_checkpoint,
    write_config,
)
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from kimisys.adapters.dtensor.hugging_face import checkpoint_converter
from kimisys.adapters.dtensor.layout import dtensor_buffers, dtensor_layout, named_tensors
from kimisys.reshard import Tensor, plan

FAMILIES = ["qwen3", "mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "qwen2_5_vl"]


@contextmanager
def three_ranks() -> Iterator[None]:
    """This process as rank 1 of three that do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    try:
        yield
    finally:
        dist.destroy_process_group()


def converted(model: PreTrainedModel) -> set[Tensor]:
    return set(dtensor_layout(model, 1, checkpoint_converter(model)).tensors)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_what_transformers_saves(tmp_path: Path, family: str, tied: bool) -> None:
    folder = write_config(tmp_path / "model", tied, family)
    given = write_checkpoint(folder, seed=1, into=folder)
    # what save_pretrained leaves out of tied models stays out
    expected = set(tensor_table(given))
    kind = AutoModelForImageTextToText if family.endswith("vl") else AutoModelForCausalLM
    loaded = kind.from_pretrained(folder, dtype=torch.float32)
    for model in (random_model(folder, seed=1), loaded):
        assert converted(model) == expected
        early = checkpoint_converter(model)
        with three_ranks():
            fully_shard(model)
            late = converted(model)
            assert set(dtensor_layout(model, 1, early).tensors) == late == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_in_memory_becomes_its_checkpoint(tmp_path: Path, family: str) -> None:
    folder = write_config(tmp_path / "model", False, family)
    given = checkpoint(folder, seed=2)
    model = random_model(folder, seed=2)
    layout = dtensor_layout(model, 0, checkpoint_converter(model))
    landed = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    made = plan(layout, dtensor_layout(landed, 0))
    made.execute(dtensor_buffers(model, 0), dtensor_buffers(landed, 0))
    assert all(torch.equal(landed[name], tensor) for name, tensor in given.items())
    assert named_tensors(landed).keys() == given.keys()
