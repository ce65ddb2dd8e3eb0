"""Tiny models of every family with random weights: as a checkpoint folder and as tensors in memory,
for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor

VOCAB = {"vocab_size": 29}
"""29 rows of vocabulary, which vLLM pads to 64."""
TINY = tiny_config("qwen3", **VOCAB)


_EXPERTS = {
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "first_k_dense_replace": 1,
}
GLM4_MOE: dict[str, Any] = _EXPERTS | {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "num_hidden_layers": 3,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "use_qk_norm": True,
}
"""One family that kimisys does not name anywhere."""
QWEN2_5_VL: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "image_token_id": 26,
    "video_token_id": 27,
    "vision_start_token_id": 24,
    "vision_end_token_id": 25,
    "rope_parameters": {
        "rope_theta": 10000.0,
        "rope_type": "default",
        "mrope_section": [4, 6, 6],
    },
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
        "patch_size": 4,
        "spatial_merge_size": 2,
        "window_size": 16,
        "in_channels": 3,
    },
}


def family_config(family: str, tied: bool = False, **overrides: Any) -> dict[str, Any]:
    """config.json of a family of tiny_models, or of "glm4_moe" or "qwen2_5_vl"."""
    if family == "glm4_moe":
        return tiny_config("qwen3", tied=tied, **VOCAB | GLM4_MOE | overrides)
    if family == "qwen2_5_vl":
        return tiny_config("qwen2", tied=tied, **VOCAB | QWEN2_5_VL | overrides)
    return tiny_config(family, tied=tied, **VOCAB | overrides)


def write_config(folder: Path, tied: bool, family: str = "qwen3", **overrides: Any) -> Path:
    """The folder, with a config.json in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(family_config(family, tied, **overrides)))
    return folder


def random_model(folder: Path, seed: int) -> PreTrainedModel:
    """transformers' model in float32, every parameter random, norms around one."""
    config = AutoConfig.from_pretrained(folder)
    sees = hasattr(config, "vision_config")
    kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.float().eval().named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 + (1.0 if "norm" in name else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """By Hugging Face name; tied ones once, under the name that checkpoints have."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def write_checkpoint(folder: Path, seed: int, into: Path) -> dict[str, torch.Tensor]:
    """Saves a random model, with the folder's config.json; returns the checkpoint's tensors."""
    random_model(folder, seed).save_pretrained(into)
    (into / "config.json").write_text((folder / "config.json").read_text())
    return load_file(into / "model.safetensors")


def checkpoint(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """A random model as its checkpoint holds it, where experts are not stacked."""
    with TemporaryDirectory() as into:
        return write_checkpoint(folder, seed, Path(into))


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
