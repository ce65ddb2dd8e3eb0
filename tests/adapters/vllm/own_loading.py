"""What vLLM's own loader leaves in its parameters: the oracle of every layout of an engine."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig

from kimisys.adapters.vllm.layout import build_model
from kimisys.adapters.vllm.parallel import EngineParallel

Model = tuple[VllmConfig, dict[str, torch.Tensor]]
"""vLLM's configuration of a model, and a checkpoint's tensors by their names."""


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
