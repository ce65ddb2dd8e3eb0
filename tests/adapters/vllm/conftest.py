"""What the tests of this folder share: above all one started engine."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_checkpoints import write_config
from tiny_models import LLAMA3_ROPE
from vllm_engine_process import EngineProcess

if importlib.util.find_spec("torchvision") is None:
    # vLLM looks at its models in processes of their own, which read this variable.
    stand_in = str(Path(__file__).parent / "without_torchvision")
    sys.path.append(stand_in)
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [given, stand_in]))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a config.json alone: "tied" and "untied" are Qwen3, others say what they are."""
    base = tmp_path_factory.mktemp("models")
    qwen3 = {name: write_config(base / name, name == "tied") for name in ("tied", "untied")}
    return qwen3 | {
        "qwen2-tied": write_config(base / "qwen2-tied", True, "qwen2"),
        "qwen2-untied": write_config(base / "qwen2-untied", False, "qwen2"),
        "llama-tied": write_config(base / "llama-tied", True, "llama", rope_parameters=LLAMA3_ROPE),
        "llama-untied": write_config(base / "llama-untied", False, "llama"),
        **{
            family: write_config(base / family, False, family)
            for family in ("mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "qwen2_5_vl")
        },
    }


@pytest.fixture(scope="session")
def engine(folders: dict[str, Path]) -> Iterator[EngineProcess]:
    """One engine of the tied model in float32, started once."""
    process = EngineProcess(folders["tied"], max_length=128)
    try:
        yield process
    finally:
        assert process.end() == 0, "the engine's process ended badly"
