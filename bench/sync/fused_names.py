"""A Megatron model as mbridge 0.15.1 wants to see it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kimisys.adapters.megatron.model import Model

_FUSED = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
"""As in megatron-core's own `sharded_state_dict_keys_map` of the local layer spec."""


class FusedNames:
    """What mbridge asks of a model, its parameters under the names of Transformer Engine's layer
    spec: there the norms are part of the linear layers after them."""

    def __init__(self, model: Model) -> None:
        self.decoder = model.decoder
        self._parameters = {_fused(n): parameter for n, parameter in model.named_parameters()}

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return iter(self._parameters.items())

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._parameters)


def _fused(name: str) -> str:
    for local, fused in _FUSED.items():
        name = name.replace(local, fused)
    return name
