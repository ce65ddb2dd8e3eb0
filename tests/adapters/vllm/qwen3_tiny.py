"""A tiny Qwen3, or another family, with random weights: as a checkpoint folder and as tensors in
memory, for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor

VOCAB = {"vocab_size": 29}
"""29 rows of vocabulary, which vLLM pads to 64."""
TINY = tiny_config("qwen3", **VOCAB)


def write_config(folder: Path, tied: bool, family: str = "qwen3", **overrides: Any) -> Path:
    """The folder, with a config.json in it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, tied=tied, **VOCAB | overrides)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_model(folder: Path, seed: int) -> PreTrainedModel:
    """transformers' model in float32, every parameter random, norms around one."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.float().eval().named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 + (1.0 if "norm" in name else 0.0))
    return model


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """By Hugging Face name; tied ones once, under the name that checkpoints have."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def tensor_table(tensors: Mapping[str, torch.Tensor]) -> list[Tensor]:
    return [
        Tensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def memory_layout(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Whole tensors in the memory of rank 0, one buffer each, under their own names."""
    return Layout(
        tensor_table(tensors),
        [Buffer(0, name, tensor.nbytes) for name, tensor in tensors.items()],
        [
            Fragment(
                name,
                Region([0] * tensor.dim(), tuple(tensor.shape)),
                0,
                name,
                0,
                [stride * tensor.element_size() for stride in tensor.stride()],
            )
            for name, tensor in tensors.items()
        ],
    )


def memory_buffers(tensors: Mapping[str, torch.Tensor], rank: int = 0) -> dict[Any, np.ndarray]:
    """(rank, name) to the tensor's bytes: views that write through."""
    return {(rank, name): tensor.view(torch.uint8).numpy() for name, tensor in tensors.items()}


def reference(model: PreTrainedModel, token_ids: list[int]) -> np.ndarray:
    """transformers' log-softmax at each position but the last: float32[tokens - 1, vocab]."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0]
    found: np.ndarray = torch.log_softmax(logits, -1)[:-1].numpy()
    return found
