"""The random weights a run starts from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import FAMILIES, tiny_config

from kimisys.adapters.megatron.families import family_of
from kimisys.trainer.initial import write_initial_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_norms_are_one_and_all_else_is_random(family: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config(family, tied=tied, initializer_range=0.5)
    write_initial_checkpoint(tmp_path / "model", config, seed=3)
    found = load_file(tmp_path / "model" / "model.safetensors")
    table = {t.name: tuple(t.shape) for t in family_of(config).hf_tensors("float32")}
    assert {name: array.shape for name, array in found.items()} == table
    assert ("lm_head.weight" in found) == (not tied)
    assert sum(name.endswith("bias") for name in found) == (6 if family == "qwen2" else 0)
    for name, array in found.items():
        if "norm" in name:
            assert (array == 1.0).all(), name
        else:  # five standard errors of 64 samples, the fewest there are
            assert array.std() == pytest.approx(0.5, abs=0.25), name
            assert abs(array.mean()) < 0.35 and np.unique(array).size > 60, name


def test_one_seed_is_one_model(tmp_path: Path) -> None:
    for folder, seed in (("one", 3), ("same", 3), ("other", 4)):
        write_initial_checkpoint(tmp_path / folder, tiny_config("qwen2"), seed)
    one, same, other = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "same", "other")
    )
    for name, array in one.items():
        np.testing.assert_array_equal(array, same[name], err_msg=name)
        assert "norm" in name or not np.array_equal(array, other[name]), name
