"""From the tensors of a transformers model in memory to those of its checkpoints.

transformers 5 keeps some models otherwise in memory than on disk: other names, experts stacked.
What ``save_pretrained`` does about it is asked of transformers itself, and traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from kimisys.adapters.dtensor.layout import Converter


def checkpoint_converter(model: PreTrainedModel) -> Converter:
    """For ``dtensor_layout`` of a transformers model, sharded or not: to the names and shapes that
    its ``save_pretrained`` would write."""

    def convert(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        converted = revert_weight_conversion(model, dict(tensors))
        return cast(Mapping[str, torch.Tensor], converted)

    return convert
