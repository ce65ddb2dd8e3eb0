"""vLLM without an engine of kimisys around it: it, too, serves whole published weights or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import vllm_stock_process
from tiny_checkpoints import memory_buffers, memory_layout, random_model, reference, weights
from transformers import PreTrainedModel

from kimisys.adapters.vllm.environment import environment
from kimisys.broadcast import Publisher, snapshot_layout


def test_random_or_half_packed_weights_are_not_served(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = random_model(folders["llama-tied"], seed=1)
    live, answers = memory_layout(weights(model)), tmp_path / "answers.json"
    prompt = vllm_stock_process.PROMPT
    with Publisher(live, snapshot_layout(live, None), 0, tmp_path / "rank0") as publisher:
        publisher.publish(1, memory_buffers(weights(model)))
        script, folder = vllm_stock_process.__file__, str(folders["llama-tied"])
        process = subprocess.Popen(
            [sys.executable, script, folder, str(publisher.address), str(answers)],
            env=os.environ | environment(threads=1),
            stdin=subprocess.PIPE,
        )
        try:
            wait_for(answers.with_suffix(".1"), process)
            before = reference(model, prompt)
            changed = change(model)
            assert np.abs(reference(model, prompt) - before).max() > 0.1
            published = publisher.publish(2, memory_buffers(weights(model)))
            assert published.base == 1 and published.changed == changed
            process.communicate(b"go on\n", timeout=240)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0
    found = json.loads(answers.read_text())
    kind, message = found["random"]
    assert kind == "EngineError" and "started with random weights" in message

    first = random_model(folders["llama-tied"], seed=1)
    assert found["updated"] == continued(first, prompt, found["updated"])
    assert (found["base"], found["changed"]) == (1, changed)
    assert found["by deltas"] == continued(model, prompt, found["by deltas"])

    assert found["update"] == "no memory for packing"
    kind, message = found["broken"]
    assert kind == "EngineError" and "packing version 2 failed: no memory for packing" in message


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, "no version 1 is served"
        time.sleep(0.1)


def change(model: PreTrainedModel) -> int:
    """Some elements of every parameter, as a delta has them; returns how many."""
    count = 0
    with torch.no_grad():
        for parameter in weights(model).values():
            some = parameter.view(-1)[::7]
            some += 0.5
            count += some.numel()
    return count


def continued(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> list[int]:
    """What transformers finds likeliest at each of these tokens."""
    rows = reference(model, prompt + tokens)
    likeliest: list[int] = rows[len(prompt) - 1 :].argmax(-1).tolist()
    return likeliest
