"""An engine that was updated computes what one computes that loaded the same weights from disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vllm_probe_process
from tiny_checkpoints import memory_buffers, memory_layout, write_checkpoint, write_config

from kimisys.adapters.vllm.environment import environment
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.broadcast import Publisher, snapshot_layout

LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
"""What vLLM's CPU kernel for MLA takes, and DeepSeek-V3 has."""


def answers(
    family: str, folder: Path, parallel: EngineParallel, stale: bool, **options: Any
) -> dict[str, np.ndarray]:
    """From weights A, loaded by vLLM, to published weights B; and B loaded by vLLM."""
    config = write_config(folder / "config", False, family, **options)
    write_checkpoint(config, 1, folder / "before")
    published = write_checkpoint(config, 2, folder / "after")
    live = memory_layout(published)
    with Publisher(live, snapshot_layout(live, None), 0, folder / "rank0") as publisher:
        publisher.publish(1, memory_buffers(published))
        case = {
            "before": str(folder / "before"),
            "after": str(folder / "after"),
            "address": str(publisher.address),
            "tensor_parallel": parallel.tensor,
            "expert_parallel": parallel.expert,
            "stale": stale,
            "answers": str(folder / "answers.npz"),
        }
        subprocess.run(
            [sys.executable, vllm_probe_process.__file__, json.dumps(case)],
            env=os.environ | environment(threads=1) | binding(parallel.tensor),
            check=True,
            timeout=400,
        )
    return dict(np.load(folder / "answers.npz"))


def binding(ranks: int) -> dict[str, str]:
    """Which cores each rank of an engine may use: all of them, as there are few."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join([cores] * ranks)} if ranks > 1 else {}


@pytest.mark.parametrize(
    ("family", "text", "options"),
    [("deepseek_v3", "tp=1", LATENT), ("qwen3_moe", "tp=1", {})],
)
def test_probes_agree_to_the_bit(
    tmp_path: Path, family: str, text: str, options: dict[str, Any]
) -> None:
    absorbed = family == "deepseek_v3"
    found = answers(family, tmp_path, EngineParallel.parse(text), absorbed, **options)
    assert np.array_equal(found["after"], found["after again"]), "vLLM does not repeat itself"
    assert np.array_equal(found["updated"], found["after"])
    assert np.abs(found["before"] - found["after"]).max() > 0.1
    derived = json.loads(str(found["derived"]))[0]
    assert any(name.endswith("moe_kernel") for name in derived)
    assert any(name.endswith("W_UK_T") for name in derived) == absorbed
    assert any(name.endswith("W_UV") for name in derived) == absorbed
    if absorbed:
        stale = np.abs(found["stale"] - found["after"]).max()
        assert stale > 1e-2, "the probe would not notice what MLA absorbed before the update"
