"""transformers' models over two FSDP2 ranks into vLLM's layouts and into checkpoints, against
vLLM's own loading of what `save_pretrained` writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsdp_checkpoint_ranks import save_and_load
from megatron_ranks import run_ranks
from safetensors.torch import load_file
from tiny_checkpoints import checkpoint, random_model, tensor_table, write_config
from vllm.config import VllmConfig

from kimisys.adapters.vllm.layout import build_model, offline_config, trace_vllm_layout
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.reshard import Layout, plan

FAMILIES = ["qwen2_5_vl", "qwen3_moe", "deepseek_v3"]
"""The first with a vision tower; of the others transformers stacks the experts in memory."""


@dataclass(frozen=True)
class Trained:
    """What two FSDP2 ranks left: their layout and bytes, and the checkpoint that they hold."""

    config: VllmConfig
    given: dict[str, torch.Tensor]
    layout: Layout
    buffers: dict[Any, Any]
    out: Path


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    family: str = request.param
    folder = write_config(tmp_path_factory.mktemp(family), False, family)
    given = checkpoint(folder, seed=5)
    out = tmp_path_factory.mktemp("ranks")
    random_model(folder, seed=6).save_pretrained(out / "other", max_shard_size="100KB")
    assert len(list((out / "other").glob("*.safetensors"))) > 1
    run_ranks(2, save_and_load, folder, out, deadline=240)
    layouts = [Layout.from_json((out / f"{rank}.json").read_text()) for rank in range(2)]
    buffers = {}
    for rank in range(2):
        names = (out / f"{rank}.txt").read_text().split("\n")
        with np.load(out / f"{rank}.npz") as file:
            buffers |= {(rank, name): file[f"arr_{i}"] for i, name in enumerate(names)}
    return Trained(offline_config(folder, "float32"), given, Layout.merge(layouts), buffers, out)


def test_the_ranks_hold_the_checkpoint_s_tensors(trained: Trained) -> None:
    assert set(trained.layout.tensors) == set(tensor_table(trained.given))
    assert trained.layout.ranks == (0, 1)


@pytest.mark.parametrize("text", ["tp=1", "tp=2", "tp=4", "pp=2"])
def test_every_parameter_is_filled_as_vllm_fills_it(trained: Trained, text: str) -> None:
    parallel = EngineParallel.parse(text)
    for rank in range(parallel.engine_size):
        model = build_model(trained.config, parallel, rank, device="cpu")
        expected = dict(model.module.named_parameters())
        with torch.no_grad():
            for parameter in expected.values():
                parameter.fill_(7.0)
        model.load(trained.given)
        layout = trace_vllm_layout(trained.config, trained.layout.tensors, parallel, rank)
        landed = {(rank, b.name): np.full(b.nbytes, 0xEE, np.uint8) for b in layout.buffers}
        plan(trained.layout, layout).execute(trained.buffers, landed)
        assert {name for _, name in landed} == expected.keys()
        for name, parameter in expected.items():
            bits = parameter.detach().reshape(-1).view(torch.uint8).numpy()
            assert np.array_equal(landed[rank, name], bits), f"{name} of rank {rank}"


def test_the_checkpoint_that_the_ranks_wrote_together_is_transformers_own(
    trained: Trained,
) -> None:
    saved = {
        name: tensor
        for file in ("a.safetensors", "b.safetensors")
        for name, tensor in load_file(trained.out / "saved" / file).items()
    }
    assert saved.keys() == trained.given.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained.given.items())
