"""The weights a run starts from: a checkpoint folder of random weights, made from the seed.

Made before any layout is chosen, so the same seed is the same model at every parallel size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from kimisys.adapters.megatron.families import family_of
from kimisys.reshard.safetensors import create_checkpoint


def write_initial_checkpoint(
    folder: Path,
    hf_config: Mapping[str, Any],
    seed: int,
    more: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """A float32 checkpoint: norms at one, all else normal with deviation
    `initializer_range`. Biases too: at zero, one that is lost on the way would not be missed.

    more: further text files, by name; those of a tokenizer.
    """
    tensors = family_of(hf_config).hf_tensors("float32")
    spread = float(hf_config["initializer_range"])
    files = {"config.json": json.dumps(dict(hf_config), indent=2) + "\n", **more}
    with create_checkpoint(folder, tensors, files) as checkpoint:
        data = checkpoint.buffers[0, "model.safetensors"]
        for position, fragment in enumerate(checkpoint.layout.fragments):
            generator = np.random.default_rng([seed, position])
            shape = tuple(fragment.region.extent)
            count = int(np.prod(shape))
            view = np.frombuffer(data, np.float32, count, fragment.byte_offset).reshape(shape)
            if fragment.tensor.endswith("norm.weight"):
                view[:] = 1.0
            else:
                view[:] = generator.standard_normal(shape, np.float32) * spread
