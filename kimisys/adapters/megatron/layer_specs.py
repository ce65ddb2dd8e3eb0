"""Megatron's local layer specs with our attention and norms in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kimisys.adapters.megatron.core import (
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    grouped_gemm_util,
)
from kimisys.adapters.megatron.layers import CausalAttention, DuplicatedLinear, RMSNorm


def layer_specs(config: TransformerConfig, layers: Sequence[int]) -> TransformerBlockSubmodules:
    """The specs of `layers`, by their numbers in the whole model: with experts or without, as
    `config.moe_layer_freq` says."""
    kinds = {experts: _layer_spec(config, experts) for experts in (False, True)}
    return TransformerBlockSubmodules(
        layer_specs=[kinds[has_experts(config, layer)] for layer in layers], layer_norm=RMSNorm
    )


def has_experts(config: TransformerConfig, layer: int) -> bool:
    """Whether the layer of this number has experts."""
    return config.num_moe_experts is not None and bool(config.moe_layer_freq[layer])


def _layer_spec(config: TransformerConfig, experts: bool) -> ModuleSpec:
    spec: ModuleSpec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization="RMSNorm",
    )
    attention = spec.submodules.self_attention.submodules
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    if config.multi_latent_attention:
        attention.linear_q_down_proj = attention.linear_kv_down_proj = DuplicatedLinear
        attention.q_layernorm = attention.kv_layernorm = RMSNorm
    elif config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = CausalAttention
    if not experts:
        # left out, Megatron takes the same number from the configuration, and warns
        spec.submodules.mlp.params["ffn_hidden_size"] = config.ffn_hidden_size
    return spec


@contextmanager
def grouped_layout_only() -> Iterator[None]:
    """Inside, GroupedMLP may be built without the package that computes it."""
    check = grouped_gemm_util.assert_grouped_gemm_is_available
    grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None
    try:
        yield
    finally:
        grouped_gemm_util.assert_grouped_gemm_is_available = check
