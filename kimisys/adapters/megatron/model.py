"""A megatron-core GPT model from a Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kimisys.adapters.megatron import cpu
from kimisys.adapters.megatron.core import (
    GPTModel,
    ModuleSpec,
    ProcessGroupCollection,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    parallel_state,
)
from kimisys.adapters.megatron.families import Family, check_model, family_of, padded_vocab_size
from kimisys.adapters.megatron.layers import CausalAttention, RMSNorm
from kimisys.errors import LayoutError


class Model(GPTModel):  # type: ignore[misc]
    """One rank's shard of a GPT model, and the family that its configuration belongs to."""

    family: Family


def build_model(
    hf_config: Mapping[str, Any], dtype: torch.dtype, device: str | None = None
) -> Model:
    """This rank's shard of its pipeline stage, with parameters in `dtype`, initialised from torch's
    generator.

    `runtime.initialize` (or `offline`) comes first. hf_config: the contents of config.json. device:
    "meta" for a model without memory, that knows its layout alone. The first stage holds the
    embedding, the last one the final norm and the output layer: its own copy of the embedding where
    the two are tied. Raises LayoutError when the architecture is not supported, or cannot be split
    over these process groups, and where CUDA is available: we compute on the CPU.
    """
    if torch.cuda.is_available():
        raise LayoutError(
            "this Megatron adapter computes on the CPU, but CUDA is available here and parts of "
            "Megatron would use it: start the Megatron ranks with CUDA_VISIBLE_DEVICES= (empty)"
        )
    family = family_of(hf_config)
    if not parallel_state.is_initialized():
        raise LayoutError("there are no Megatron process groups: call runtime.initialize first")
    check_model(
        family,
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    cpu.apply()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return _build(family, dtype, device or "cpu", groups)


def whole_pipeline(model: Model) -> Model:
    """All stages of `model` as one, on the meta device, for this rank's tensor-parallel shard: it
    knows what Megatron would say of the tensors that other stages hold."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.pp = parallel_state.get_context_parallel_group()  # this rank alone
    return _build(model.family, model.config.params_dtype, "meta", groups)


def _build(
    family: Family, dtype: torch.dtype, device: str, groups: ProcessGroupCollection
) -> Model:
    stage, stages = groups.pp.rank(), groups.pp.size()
    config = TransformerConfig(
        **family.transformer_config(),
        tensor_model_parallel_size=groups.tp.size(),
        pipeline_model_parallel_size=stages,
        pipeline_dtype=dtype,
        variable_seq_lengths=True,  # micro-batches differ in rows and length
        moe_token_dispatcher_type="alltoall",  # the default refuses that, even without experts
        calculate_per_token_loss=True,  # a schedule then leaves the loss as we scaled it
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        # fusions below are CUDA extensions, or compile at run time
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        cuda_graph_scope=[],  # the default, "full", is deprecated and says so
    )
    with torch.device(device):
        model = Model(
            config,
            _layer_specs(config, config.num_layers // stages),
            vocab_size=padded_vocab_size(family.vocab_size, groups.tp.size()),
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            pg_collection=groups,
            **family.model_arguments(),
        )
    model.family = family
    return model


def _layer_specs(config: TransformerConfig, layers: int) -> TransformerBlockSubmodules:
    """Megatron's local layer spec with our attention and norms in it, for a stage of `layers`."""
    spec: ModuleSpec = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    attention = spec.submodules.self_attention.submodules
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    attention.core_attention = CausalAttention
    # left out, Megatron takes the same number from the configuration, and warns
    spec.submodules.mlp.params["ffn_hidden_size"] = config.ffn_hidden_size
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)
