"""vLLM without an engine of kimisys around it: it, too, serves whole published weights or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import vllm_stock_process
from tiny_checkpoints import memory_buffers, memory_layout, random_model, reference, weights

from kimisys.adapters.vllm.environment import environment
from kimisys.broadcast import Publisher, snapshot_layout


def test_random_or_half_packed_weights_are_not_served(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = random_model(folders["llama-tied"], seed=1)
    live, answers = memory_layout(weights(model)), tmp_path / "answers.json"
    with Publisher(live, snapshot_layout(live, None), 0, tmp_path / "rank0") as publisher:
        publisher.publish(1, memory_buffers(weights(model)))
        script = vllm_stock_process.__file__
        subprocess.run(
            [
                sys.executable,
                script,
                str(folders["llama-tied"]),
                str(publisher.address),
                str(answers),
            ],
            env=os.environ | environment(threads=1),
            check=True,
            timeout=240,
        )
    found = json.loads(answers.read_text())
    kind, message = found["random"]
    assert kind == "EngineError" and "started with random weights" in message

    prompt = vllm_stock_process.PROMPT
    rows = reference(model, prompt + found["updated"])
    assert found["updated"] == rows[len(prompt) - 1 :].argmax(-1).tolist()

    assert found["update"] == "no memory for packing"
    kind, message = found["broken"]
    assert kind == "EngineError" and "packing version 1 failed: no memory for packing" in message
