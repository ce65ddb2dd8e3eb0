"""What we use of megatron-core, imported once and without the noise that it makes on import.

megatron-core 0.16.1 warns, from each of a dozen modules, that Apex and Transformer Engine are
absent. We use neither: the local layer spec is chosen on purpose.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import __version__ as version
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import random as random_states
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.moe import grouped_gemm_util, moe_utils, token_dispatcher
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

__all__ = [
    "GPTModel",
    "LayerType",
    "MLATransformerConfig",
    "ModuleSpec",
    "PipelineParallelLayerLayout",
    "ProcessGroupCollection",
    "ShardedTensor",
    "ShardedTensorFactory",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_num_layers_to_build",
    "get_transformer_layer_offset",
    "grouped_gemm_util",
    "make_sharded_tensors_for_checkpoint",
    "moe_utils",
    "multi_latent_attention",
    "parallel_state",
    "random_states",
    "schedules",
    "token_dispatcher",
    "version",
]
