"""What the dense families share: grouped-query attention, SwiGLU, RMSNorm, rotary embedding, tied
or untied embeddings. QK-norm and a bias on the QKV projection are what they differ by.

Hugging Face: transformers' `LlamaForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM`. Megatron:
GPTModel with the local layer spec, keys as in `ShardedTensor.key`; tensors inside layers have a
leading axis of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from kimisys.adapters.megatron.families.numbers import number
from kimisys.adapters.megatron.families.rope import Rope
from kimisys.errors import LayoutError
from kimisys.reshard import Tensor

_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_LAYERS = "decoder.layers."


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
            heads, hidden = (
                number(given, name, int) for name in ("num_attention_heads", "hidden_size")
            )
            # null, as transformers reads it
            given["num_key_value_heads"] = given["num_key_value_heads"] or heads
            given["head_dim"] = given["head_dim"] or (hidden // heads if heads else None)
            return cls(
                vocab_size=number(given, "vocab_size", int),
                hidden_size=hidden,
                intermediate_size=number(given, "intermediate_size", int),
                layers=number(given, "num_hidden_layers", int),
                heads=heads,
                groups=number(given, "num_key_value_heads", int),
                head_dim=number(given, "head_dim", int),
                norm_epsilon=number(given, "rms_norm_eps", float),
                rope=Rope.from_config(given),
                max_positions=number(given, "max_position_embeddings", int),
                initializer_range=number(given, "initializer_range", float),
                tied=bool(given.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise LayoutError(
                f"the {cls.__name__} configuration lacks {error}: "
                "give the whole config.json of the checkpoint"
            ) from error

    @classmethod
    def _refuse_variants(cls, given: Mapping[str, Any]) -> None:
        for name, supported in {"hidden_act": "silu", **cls.only}.items():
            value = given.get(name)
            if value is not None and value != supported:
                raise LayoutError(
                    f"{name} {value!r} of this {cls.__name__} configuration is not supported: "
                    f"only {supported!r} is"
                )

    @property
    def vocabulary_keys(self) -> tuple[str, ...]:
        return (_EMBEDDING,) if self.tied else (_EMBEDDING, _OUTPUT)

    def check_tensor_parallel(self, size: int) -> None:
        """Raise LayoutError unless heads, KV heads and the MLP's width can be split over `size`
        ranks."""
        parts = {
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "intermediate_size": self.intermediate_size,
        }
        if self.heads % self.groups:
            raise LayoutError(
                f"num_attention_heads {self.heads} is not a multiple of num_key_value_heads "
                f"{self.groups}: each KV head must serve the same number of query heads"
            )
        bad = [f"{name} {count}" for name, count in parts.items() if size < 1 or count % size]
        if bad:
            legal = [
                n for n in range(1, self.groups + 1) if all(c % n == 0 for c in parts.values())
            ]
            raise LayoutError(
                f"tensor_parallel {size} does not divide {' and '.join(bad)} of this "
                f"{type(self).__name__} model: tensor_parallel may be one of {legal}"
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

    def hf_tensors(self, dtype: str) -> list[Tensor]:
        """The checkpoint's tensors. `dtype` is kimisys' name of it, as in "float32"."""
        return [Tensor(name, dtype, shape) for name, shape in self._shapes().items()]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        for layer in range(self.layers):
            shapes |= {
                f"model.layers.{layer}.{name}": shape
                for name, shape in self._layer_shapes().items()
            }
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, width, dim = self.hidden_size, self.intermediate_size, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (self.heads * dim, hidden),
            "self_attn.k_proj.weight": (self.groups * dim, hidden),
            "self_attn.v_proj.weight": (self.groups * dim, hidden),
            "self_attn.o_proj.weight": (hidden, self.heads * dim),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (width, hidden),
            "mlp.up_proj.weight": (width, hidden),
            "mlp.down_proj.weight": (hidden, width),
        }
        if self.qkv_bias:
            for kind, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups)):
                shapes[f"self_attn.{kind}_proj.bias"] = (heads * dim,)
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
        return shapes

    def rule(self, megatron: Mapping[str, torch.Tensor], hf: Mapping[str, torch.Tensor]) -> None:
        """Copy Megatron's global tensors to Hugging Face's, with views alone."""
        hf["model.embed_tokens.weight"].copy_(megatron[_EMBEDDING][: self.vocab_size])
        hf["model.norm.weight"].copy_(megatron["decoder.final_layernorm.weight"])
        if not self.tied:
            hf["lm_head.weight"].copy_(megatron[_OUTPUT][: self.vocab_size])
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            tensors = {k.removeprefix(prefix): t for k, t in hf.items() if k.startswith(prefix)}
            self._layer_rule(
                {
                    k.removeprefix(_LAYERS): t[layer]
                    for k, t in megatron.items()
                    if k.startswith(_LAYERS)
                },
                tensors,
            )

    def _layer_rule(
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

        gate, up = megatron["mlp.linear_fc1.weight"].chunk(2)
        hf["mlp.gate_proj.weight"].copy_(gate)
        hf["mlp.up_proj.weight"].copy_(up)
        hf["mlp.down_proj.weight"].copy_(megatron["mlp.linear_fc2.weight"])

        # The local spec's norms carry the keys of the fused (Transformer Engine) ones.
        hf["input_layernorm.weight"].copy_(megatron["self_attention.linear_qkv.layer_norm_weight"])
        hf["post_attention_layernorm.weight"].copy_(megatron["mlp.linear_fc1.layer_norm_weight"])

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
