"""Megatron-core GPT models from a Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kimisys.adapters.megatron import cpu
from kimisys.adapters.megatron.core import (
    GPTModel,
    MLATransformerConfig,
    ProcessGroupCollection,
    TransformerConfig,
    parallel_state,
)
from kimisys.adapters.megatron.families import Family, check_model, family_of, padded_vocab_size
from kimisys.adapters.megatron.layer_specs import grouped_layout_only, layer_specs
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.adapters.megatron.stages import Chunk, pipeline_arguments, stage_chunks
from kimisys.errors import LayoutError


class Model(GPTModel):  # type: ignore[misc]
    """One rank's shard of a GPT model, or of one chunk of it, and the family that its configuration
    belongs to."""

    family: Family
    chunk: Chunk


def build_model(
    hf_config: Mapping[str, Any],
    dtype: torch.dtype,
    device: str | None = None,
    parallel: Parallel | None = None,
) -> Model:
    """This rank's shard of its pipeline stage, with parameters in `dtype`, initialised from torch's
    generator.

    `runtime.initialize` (or `offline`) comes first. hf_config: the contents of config.json. device:
    "meta" for a model without memory, that knows its layout alone. parallel: as given to
    `runtime.join`; left out, what the process groups tell, which do not know of uneven stages. The
    first stage holds the embedding, the last one the final norm and the output layer: its own copy
    of the embedding where the two are tied. Raises LayoutError when the architecture is not
    supported, or cannot be split over these process groups, and where CUDA is available: we compute
    on the CPU.
    """
    chunks = build_chunks(hf_config, dtype, device, parallel)
    if len(chunks) > 1:
        raise LayoutError(
            f"this stage has {len(chunks)} chunks (virtual pipeline): call build_chunks"
        )
    return chunks[0]


def build_chunks(
    hf_config: Mapping[str, Any],
    dtype: torch.dtype,
    device: str | None = None,
    parallel: Parallel | None = None,
    grouped_experts: bool = False,
) -> list[Model]:
    """As `build_model`, for a stage of one chunk or of several.

    grouped_experts: a layer's experts in two parameters (megatron-core's GroupedMLP) instead of one
    by one; on the meta device alone, because computing with them takes the grouped_gemm package.
    """
    if torch.cuda.is_available():
        raise LayoutError(
            "this Megatron adapter computes on the CPU, but CUDA is available here and parts of "
            "Megatron would use it: start the Megatron ranks with CUDA_VISIBLE_DEVICES= (empty)"
        )
    if grouped_experts and device != "meta":
        raise LayoutError(
            "grouped_experts needs the grouped_gemm package to compute: build on the meta device, "
            "for the layout alone"
        )
    family = family_of(hf_config)
    parallel = _groups_as(parallel)
    check_model(family, parallel)
    cpu.apply()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    config = transformer_config(family, parallel, dtype, grouped_experts)
    return [
        build_chunk(family, config, chunk, device or "cpu") for chunk in stage_chunks(config, stage)
    ]


def transformer_config(
    family: Family,
    parallel: Parallel,
    dtype: torch.dtype,
    grouped_experts: bool = False,
    layers: Sequence[int] | None = None,
) -> TransformerConfig:
    """Megatron's configuration of the family's model, for this layout and the CPU. layers: of a
    model that has these of the family's layers alone."""
    arguments = family.transformer_config()
    if layers is not None:
        arguments["num_layers"] = len(layers)
        if isinstance(arguments.get("moe_layer_freq"), list):
            arguments["moe_layer_freq"] = [arguments["moe_layer_freq"][n] for n in layers]
    kind = MLATransformerConfig if arguments.get("multi_latent_attention") else TransformerConfig
    if arguments.get("num_moe_experts") is not None:
        arguments["moe_grouped_gemm"] = grouped_experts
    return kind(
        **arguments,
        **pipeline_arguments(parallel),
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


def build_chunk(family: Family, config: TransformerConfig, chunk: Chunk, device: str) -> Model:
    """This rank's shard of `chunk`; the process groups are those of `config`."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device(device), grouped_layout_only():
        model = Model(
            config,
            layer_specs(config, chunk.layers),
            vocab_size=padded_vocab_size(family.vocab_size, config.tensor_model_parallel_size),
            pre_process=chunk.first,
            post_process=chunk.last,
            pg_collection=groups,
            vp_stage=chunk.number,
            **family.model_arguments(),
        )
    model.family, model.chunk = family, chunk
    return model


def _groups_as(parallel: Parallel | None) -> Parallel:
    """What the process groups tell, which must be what `parallel` says."""
    if not parallel_state.is_initialized():
        raise LayoutError("there are no Megatron process groups: call runtime.initialize first")
    found = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }
    if parallel is None:
        return Parallel(**found)
    asked = {name: getattr(parallel, name) for name in found}
    asked["expert_tensor"] = parallel.expert_tensor_size
    different = [f"{name} {asked[name]}, not {found[name]}" for name in found if
                 asked[name] != found[name]]  # fmt: skip
    if different:
        raise LayoutError(
            f"the process groups are not those of {parallel}: it asks for {'; '.join(different)}; "
            "give the same layout to runtime.join"
        )
    return parallel
