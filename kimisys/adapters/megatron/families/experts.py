"""What the families with routed experts share: which layers have them, and where each expert's
weights lie.

Megatron: MoELayer; however its experts are built (one by one or grouped), the global tensors are
linear_fc1 [experts, 2 · width, hidden] and linear_fc2 [experts, hidden, width].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kimisys.adapters.megatron.families.dense import Dense, check_divides, gated_mlp_shapes
from kimisys.adapters.megatron.families.numbers import number
from kimisys.adapters.megatron.families.part import Part, layers_of
from kimisys.adapters.megatron.parallel import Parallel

_EXPERTS = "mlp.experts.experts."


@dataclass(frozen=True)
class Experts(Dense):
    """A dense family some of whose layers have `experts` MLPs of `expert_width` columns instead of
    one, of which a token uses `active`. moe_layers: the numbers of those layers."""

    count_name: ClassVar[str] = "num_experts"
    """The configuration's name for the number of experts."""
    width_name: ClassVar[str] = "moe_intermediate_size"
    """The configuration's name for the columns of an expert."""
    router: ClassVar[str] = "mlp.gate.weight"
    """The router's name in the checkpoint, below the layer's."""
    expert: ClassVar[str] = "mlp.experts.{}."
    """An expert's prefix in the checkpoint; "{}" is its number."""
    projections: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    """What the checkpoint calls an expert's three matrices."""

    experts: int
    active: int
    expert_width: int
    moe_layers: tuple[int, ...]
    pre_softmax: bool

    @classmethod
    def _fields(cls, given: dict[str, Any]) -> dict[str, Any]:
        fields = super()._fields(given)
        return fields | {
            "experts": number(given, cls.count_name, int),
            "active": number(given, "num_experts_per_tok", int),
            "expert_width": number(given, cls.width_name, int),
            "moe_layers": cls.moe_layer_numbers(given, fields["layers"]),
            # weights that do not add up to one are a softmax over all experts
            "pre_softmax": not given.get("norm_topk_prob", True),
        }

    @classmethod
    def moe_layer_numbers(cls, given: Mapping[str, Any], layers: int) -> tuple[int, ...]:
        return tuple(range(layers))

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The numbers of the layers without experts."""
        return tuple(layer for layer in range(self.layers) if layer not in self.moe_layers)

    def check(self, parallel: Parallel) -> None:
        """Raise LayoutError unless the ranks can share out attention, MLPs and experts."""
        name = type(self).__name__
        self._check_heads()
        self._check_tensor_parallel(parallel.tensor)
        check_divides("expert_parallel", parallel.expert, {self.count_name: self.experts}, name)
        width = {self.width_name: self.expert_width}
        check_divides("expert_tensor_parallel", parallel.expert_tensor_size, width, name)

    def _check_tensor_parallel(self, size: int) -> None:
        parts = {"num_attention_heads": self.heads, "num_key_value_heads": self.groups}
        if self.dense_layers:
            parts["intermediate_size"] = self.intermediate_size
        check_divides("tensor_parallel", size, parts, type(self).__name__)

    def transformer_config(self) -> dict[str, Any]:
        dense = set(self.dense_layers)
        return super().transformer_config() | {
            "num_moe_experts": self.experts,
            "moe_ffn_hidden_size": self.expert_width,
            "moe_router_topk": self.active,
            "moe_router_pre_softmax": self.pre_softmax,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_layer_freq": [0 if layer in dense else 1 for layer in range(self.layers)],
        }

    def layer_parts(self) -> list[Part]:
        common = self.norm_shapes() | self.attention_shapes()
        kinds = [
            ("dense layer", self.dense_layers, self.mlp_shapes(), self.layer_rule),
            ("MoE layer", self.moe_layers, self.expert_shapes(), self.moe_layer_rule),
        ]
        return [
            layers_of(name, layers, common | shapes, rule, self._dtypes(name))
            for name, layers, shapes, rule in kinds
            if layers
        ]

    def _dtypes(self, part: str) -> dict[str, str]:
        return {}

    def expert_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {self.router: (self.experts, self.hidden_size)}
        plain = gated_mlp_shapes("", self.hidden_size, self.expert_width).values()
        for expert in range(self.experts):
            for projection, shape in zip(self.projections, plain, strict=True):
                shapes[f"{self.expert.format(expert)}{projection}.weight"] = shape
        return shapes

    def moe_layer_rule(
        self, megatron: Mapping[str, torch.Tensor], hf: Mapping[str, torch.Tensor]
    ) -> None:
        """One layer with experts; names as in `layer_rule`."""
        self.attention_rule(megatron, hf)
        self.norm_rule(megatron, hf)
        hf[self.router].copy_(megatron["mlp.router.weight"])
        rows = megatron[f"{_EXPERTS}linear_fc1.weight"].unbind()
        columns = megatron[f"{_EXPERTS}linear_fc2.weight"].unbind()
        for expert, (gate_up, down) in enumerate(zip(rows, columns, strict=True)):
            for projection, tensor in zip(self.projections, (*gate_up.chunk(2), down), strict=True):
                hf[f"{self.expert.format(expert)}{projection}.weight"].copy_(tensor)
