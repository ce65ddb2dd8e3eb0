"""What the dense families share: grouped-query attention, SwiGLU, RMSNorm, rotary embedding, tied
or untied embeddings. QK-norm and a bias on the QKV projection are what they differ by.

Hugging Face: transformers' `LlamaForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM`. Megatron:
GPTModel, keys as in `ShardedTensor.key` where layers are not homogeneous: "decoder.layers.17.".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar, Self

import torch

from kimisys.adapters.megatron.families.numbers import number
from kimisys.adapters.megatron.families.part import Part, copy_all, layers_of, tensors_of
from kimisys.adapters.megatron.families.rope import Rope
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.errors import LayoutError
from kimisys.reshard import Tensor


@dataclass(frozen=True)
class Dense:
    """The numbers of a configuration that decide shapes and arithmetic; a family is a subclass."""

    qk_norm: ClassVar[bool] = False
    """Whether queries and keys are normalised, head by head."""
    qkv_bias: ClassVar[bool] = False
    """Whether the query, key and value projections have a bias; no other projection has one."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """What the family's config.json means where it leaves a number out, as in transformers."""
    only: ClassVar[Mapping[str, Any]] = {}
    """Switches of the family's config.json, and the one setting of each that can be honoured."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    norm_epsilon: float
    rope: Rope
    max_positions: int
    initializer_range: float
    tied: bool

    @classmethod
    def from_config(cls, hf_config: Mapping[str, Any]) -> Self:
        """Read config.json's contents (transformers 4 or 5). Raises LayoutError for what cannot
        be honoured."""
        given = {"head_dim": None, "initializer_range": 0.02, **cls.defaults, **hf_config}
        cls._refuse_variants(given)
        try:
            return cls(**cls._fields(given))
        except KeyError as error:
            raise LayoutError(
                f"the {cls.__name__} configuration lacks {error}: "
                "give the whole config.json of the checkpoint"
            ) from error

    @classmethod
    def _fields(cls, given: dict[str, Any]) -> dict[str, Any]:
        heads, hidden = (
            number(given, name, int) for name in ("num_attention_heads", "hidden_size")
        )
        # null, as transformers reads it
        given["num_key_value_heads"] = given["num_key_value_heads"] or heads
        given["head_dim"] = given["head_dim"] or (hidden // heads if heads else None)
        return {
            "vocab_size": number(given, "vocab_size", int),
            "hidden_size": hidden,
            "intermediate_size": number(given, "intermediate_size", int),
            "layers": number(given, "num_hidden_layers", int),
            "heads": heads,
            "groups": number(given, "num_key_value_heads", int),
            "head_dim": number(given, "head_dim", int),
            "norm_epsilon": number(given, "rms_norm_eps", float),
            "rope": Rope.from_config(given),
            "max_positions": number(given, "max_position_embeddings", int),
            "initializer_range": number(given, "initializer_range", float),
            "tied": bool(given.get("tie_word_embeddings", False)),
        }

    @classmethod
    def _refuse_variants(cls, given: Mapping[str, Any]) -> None:
        for name, supported in {"hidden_act": "silu", **cls.only}.items():
            value = given.get(name)
            if value is not None and value != supported:
                raise LayoutError(
                    f"{name} {value!r} of this {cls.__name__} configuration is not supported: "
                    f"only {supported!r} is"
                )

    def check(self, parallel: Parallel) -> None:
        """Raise LayoutError unless heads, KV heads and the MLP's width can be split over so many
        tensor-parallel ranks."""
        self._check_heads()
        parts = {
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "intermediate_size": self.intermediate_size,
        }
        check_divides("tensor_parallel", parallel.tensor, parts, type(self).__name__)
        if parallel.expert > 1:
            raise LayoutError(
                f"expert_parallel {parallel.expert} needs experts, and this "
                f"{type(self).__name__} model has none: leave it out"
            )

    def _check_heads(self) -> None:
        if self.heads % self.groups:
            raise LayoutError(
                f"num_attention_heads {self.heads} is not a multiple of num_key_value_heads "
                f"{self.groups}: each KV head must serve the same number of query heads"
            )

    def has_partial_gradient(self, parameter: str) -> bool:
        """QK-norm weights are one for all heads, but a rank only sees its own heads' gradient."""
        return self.qk_norm and parameter.endswith(("q_layernorm.weight", "k_layernorm.weight"))

    def transformer_config(self) -> dict[str, Any]:
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.intermediate_size,
            "num_attention_heads": self.heads,
            "num_query_groups": self.groups,
            "kv_channels": self.head_dim,
            "layernorm_epsilon": self.norm_epsilon,
            "init_method_std": self.initializer_range,
            "normalization": "RMSNorm",
            "qk_layernorm": self.qk_norm,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
        }

    def model_arguments(self) -> dict[str, Any]:
        return {
            "max_sequence_length": self.max_positions,
            "share_embeddings_and_output_weights": self.tied,
            **self.rope.model_arguments(),
        }

    def parts(self) -> list[Part]:
        """The model in pieces: its ends, and its layers."""
        return [*self.ends(), *self.layer_parts()]

    def hf_tensors(self, dtype: str) -> list[Tensor]:
        """The checkpoint's tensors. `dtype` is kimisys' name of it, as in "float32"."""
        return tensors_of(self.parts(), dtype)

    def ends(self) -> list[Part]:
        rows, hidden = self.vocab_size, self.hidden_size
        table: dict[str, tuple[int, ...]] = {"weight": (rows, hidden)}
        same = copy_all({"weight": "weight"}, rows)
        ends = [
            Part(
                "embedding",
                table,
                same,
                hf_prefix="model.embed_tokens.",
                key_prefix="embedding.word_embeddings.",
                padded_rows=True,
            ),
            Part(
                "final norm",
                {"weight": (hidden,)},
                copy_all({"weight": "weight"}),
                hf_prefix="model.norm.",
                key_prefix="decoder.final_layernorm.",
            ),
        ]
        if not self.tied:
            ends.append(
                Part(
                    "output",
                    table,
                    same,
                    hf_prefix="lm_head.",
                    key_prefix="output_layer.",
                    padded_rows=True,
                )
            )
        return ends

    def layer_parts(self) -> list[Part]:
        shapes = self.norm_shapes() | self.attention_shapes() | self.mlp_shapes()
        return [layers_of("layer", tuple(range(self.layers)), shapes, self.layer_rule)]

    def norm_shapes(self) -> dict[str, tuple[int, ...]]:
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        return dict.fromkeys(norms, (self.hidden_size,))

    def attention_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, dim = self.hidden_size, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (self.heads * dim, hidden),
            "self_attn.k_proj.weight": (self.groups * dim, hidden),
            "self_attn.v_proj.weight": (self.groups * dim, hidden),
            "self_attn.o_proj.weight": (hidden, self.heads * dim),
        }
        if self.qkv_bias:
            for kind, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups)):
                shapes[f"self_attn.{kind}_proj.bias"] = (heads * dim,)
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
        return shapes

    def mlp_shapes(self) -> dict[str, tuple[int, ...]]:
        return gated_mlp_shapes("mlp.", self.hidden_size, self.intermediate_size)

    def layer_rule(
        self, megatron: Mapping[str, torch.Tensor], hf: Mapping[str, torch.Tensor]
    ) -> None:
        """One layer; names are those below "decoder.layers.N." and "model.layers.N."."""
        self.attention_rule(megatron, hf)
        self.mlp_rule(megatron, hf)
        self.norm_rule(megatron, hf)

    def mlp_rule(
        self, megatron: Mapping[str, torch.Tensor], hf: Mapping[str, torch.Tensor]
    ) -> None:
        copy_gated_mlp(megatron, "mlp.", hf, "mlp.")

    def norm_rule(
        self, megatron: Mapping[str, torch.Tensor], hf: Mapping[str, torch.Tensor]
    ) -> None:
        # Megatron fuses a norm with the linear layer after it, or not: the key tells
        hf["input_layernorm.weight"].copy_(
            either(
                megatron, "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
            )
        )
        hf["post_attention_layernorm.weight"].copy_(
            either(megatron, "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        )

    def attention_rule(
        self, megatron: Mapping[str, torch.Tensor], hf: Mapping[str, torch.Tensor]
    ) -> None:
        for kind in ("weight", "bias") if self.qkv_bias else ("weight",):
            self._qkv_rule(
                megatron[f"self_attention.linear_qkv.{kind}"],
                *(hf[f"self_attn.{part}_proj.{kind}"] for part in "qkv"),
            )
        hf["self_attn.o_proj.weight"].copy_(megatron["self_attention.linear_proj.weight"])
        if self.qk_norm:
            hf["self_attn.q_norm.weight"].copy_(megatron["self_attention.q_layernorm.weight"])
            hf["self_attn.k_norm.weight"].copy_(megatron["self_attention.k_layernorm.weight"])

    def _qkv_rule(
        self, qkv: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Megatron's QKV rows, for each KV head: its query heads, the key head, the value head.
        A weight's rows have a second axis, a bias' have none."""
        query_heads, dim, inputs = self.heads // self.groups, self.head_dim, qkv.shape[1:]
        qkv = qkv.view(self.groups, query_heads + 2, dim, *inputs)
        query.view(self.groups, query_heads, dim, *inputs).copy_(qkv[:, :query_heads])
        key.view(self.groups, dim, *inputs).copy_(qkv[:, -2])
        value.view(self.groups, dim, *inputs).copy_(qkv[:, -1])


def gated_mlp_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    """A SwiGLU MLP's tensors in a checkpoint."""
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


def copy_gated_mlp(
    megatron: Mapping[str, torch.Tensor], key: str, hf: Mapping[str, torch.Tensor], name: str
) -> None:
    """A SwiGLU MLP: Megatron's first linear layer is the gate's rows, then the up projection's."""
    gate, up = megatron[f"{key}linear_fc1.weight"].chunk(2)
    hf[f"{name}gate_proj.weight"].copy_(gate)
    hf[f"{name}up_proj.weight"].copy_(up)
    hf[f"{name}down_proj.weight"].copy_(megatron[f"{key}linear_fc2.weight"])


def check_divides(name: str, size: int, parts: Mapping[str, int], model: str) -> None:
    """Raise LayoutError, naming what is legal, unless `size` divides every one of `parts`."""
    bad = [f"{part} {count}" for part, count in parts.items() if size < 1 or count % size]
    if bad:
        divisor = gcd(*parts.values())
        legal = [n for n in range(1, divisor + 1) if divisor % n == 0]
        raise LayoutError(
            f"{name} {size} does not divide {' and '.join(bad)} of this {model} model: "
            f"{name} may be one of {legal}"
        )


def either(megatron: Mapping[str, torch.Tensor], *keys: str) -> torch.Tensor:
    """The tensor under the first of `keys` that is there. Raises KeyError with the last one."""
    return megatron[next((key for key in keys if key in megatron), keys[-1])]
