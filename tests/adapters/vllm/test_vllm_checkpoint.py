"""A checkpoint that Megatron's layouts wrote, read by others: vLLM's loader and transformers.

Neither knows of kimisys, so together they say what the tensors of the checkpoint must be.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_checkpoint
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import TINY, memory_buffers, memory_layout
from transformers import AutoConfig, AutoModelForCausalLM

from kimisys.adapters.vllm.layout import build_model, offline_config, trace_vllm_layout
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.reshard import Layout, plan

MEGATRON_RANKS = 2
TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6, 28, 0, 17]]


@dataclass(frozen=True)
class Trained:
    """A saved model, and the same in the memory of Megatron's ranks."""

    checkpoint: Path
    layout: Layout
    buffers: dict[Any, np.ndarray]


@pytest.fixture(scope="module", params=["tied", "untied", "qwen2-untied", "llama-tied"])
def trained(
    request: pytest.FixtureRequest,
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    base = tmp_path_factory.mktemp(f"trained-{request.param}")
    checkpoint, memory = base / "checkpoint", base / "memory"
    script, model = megatron_checkpoint.__file__, folders[request.param]
    subprocess.run(
        [sys.executable, script, str(model), str(MEGATRON_RANKS), str(checkpoint), str(memory)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    layout = Layout.from_json((memory / "layout.json").read_text())
    with np.load(memory / "buffers.npz") as saved:
        named = [(name.split("/", 1), saved[name]) for name in saved.files]
    buffers = {(int(rank), name): array for (rank, name), array in named}
    assert {rank for rank, _ in buffers} == set(range(MEGATRON_RANKS))
    return Trained(checkpoint, layout, buffers)


def test_the_vocabulary_was_padded(trained: Trained) -> None:
    """Otherwise these tests would prove less: rows of padding are in no checkpoint."""
    table = next(t for t in trained.layout.tensors if t.name == "model.embed_tokens.weight")
    assert table.shape[0] == TINY["vocab_size"]
    held = {buffer.name: buffer.nbytes for buffer in trained.layout.buffers}
    whole = MEGATRON_RANKS * held["embedding.word_embeddings.weight"]
    assert whole > table.nbytes and trained.layout.padding


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_vllm_loads_from_the_checkpoint_what_a_plan_lands_from_memory(
    trained: Trained, size: int, rank: int
) -> None:
    config = offline_config(trained.checkpoint, "float32")
    loaded = build_model(config, EngineParallel(size), rank, device="cpu")
    expected = dict(loaded.module.named_parameters())
    with torch.no_grad():
        for parameter in expected.values():
            parameter.fill_(7.0)
    loaded.load(load_file(trained.checkpoint / "model.safetensors"))

    layout = trace_vllm_layout(config, trained.layout.tensors, EngineParallel(size), rank)
    landed = {name: torch.full_like(p, 9.0) for name, p in expected.items()}
    plan(trained.layout, layout).execute(trained.buffers, memory_buffers(landed, rank))
    assert {buffer.name for buffer in layout.buffers} == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(landed[name].view(torch.int32), parameter.view(torch.int32)), name


@torch.no_grad()
def test_transformers_computes_the_same_from_the_checkpoint_and_from_memory(
    trained: Trained,
) -> None:
    config = AutoConfig.from_pretrained(trained.checkpoint)
    saved = AutoModelForCausalLM.from_pretrained(trained.checkpoint, dtype=torch.float32).eval()
    whole = AutoModelForCausalLM.from_config(config).float().eval()
    tensors = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    for tensor in tensors.values():
        tensor.fill_(9.0)
    assert tensors.keys() == {tensor.name for tensor in trained.layout.tensors}
    gather = plan(trained.layout, memory_layout(tensors))
    gather.execute(trained.buffers, memory_buffers(tensors))

    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
    logits = [model(torch.tensor(TOKENS)).logits for model in (saved, whole)]
    assert torch.equal(*logits) and logits[0].isfinite().all() and logits[0].std() > 0.1
