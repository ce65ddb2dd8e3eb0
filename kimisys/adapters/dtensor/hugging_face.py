"""From the tensors of a transformers model in memory to those of its checkpoints.

transformers 5 keeps some models otherwise in memory than on disk: other names, experts stacked.
What ``save_pretrained`` does about it is asked of transformers itself, and traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from kimisys.adapters.dtensor.layout import Converter


def checkpoint_converter(model: PreTrainedModel) -> Converter:
    """For ``dtensor_layout`` of a transformers model, before or after ``fully_shard``: to the names
    and shapes that its ``save_pretrained`` would write::

        layout = dtensor_layout(model, rank, checkpoint_converter(model))
    """
    twin = _unsharded(model)

    def convert(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        converted = revert_weight_conversion(twin, dict(tensors))
        return cast(Mapping[str, torch.Tensor], converted)

    return convert


def _unsharded(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without weights, as it was before ``fully_shard``: that gives modules new
    classes, and transformers finds its conversions by the names of classes."""
    kind = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    with torch.device("meta"):
        twin = cast(type[PreTrainedModel], kind)._from_config(model.config)
    if hasattr(model, "_weight_conversions"):  # those it was loaded with
        twin._weight_conversions = model._weight_conversions
    return cast(PreTrainedModel, twin)
