"""Checkpoints of a run: weights and optimizer state as safetensors in Hugging Face coordinates, and
how far the run had come as JSON.

    checkpoints/rl-000010.optimizer/  AdamW's moments, and the steps that they are old
    checkpoints/rl-000010/            a Hugging Face folder: config.json, tokenizer,
        model.safetensors             the float32 masters,
        state.json                    and `Progress`

Each rank writes the share of the files that it holds, by plan, so a checkpoint knows nothing of the
layout that wrote it. A folder appears under its name when all of it is on the disk; the second one
makes the checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from kimisys.adapters.megatron.optimizer_state import optimizer_layout
from kimisys.reshard import Layout
from kimisys.reshard.safetensors import new_checkpoint
from kimisys.trainer.model_folder import ModelFolder
from kimisys.trainer.progress import Progress
from kimisys.trainer.ranks import Ranks

WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
KEPT = 2


class Checkpoints:
    """The checkpoints in `folder`, of a run that trains `model`."""

    def __init__(self, folder: Path, model: ModelFolder) -> None:
        self._folder, self._model = folder.resolve(), model

    def last(self) -> Path | None:
        """The newest whole checkpoint."""
        return last_checkpoint(self._folder)

    def progress(self) -> Progress | None:
        """How far the run had come at the newest one."""
        last = self.last()
        return None if last is None else Progress.from_json(last / STATE)

    def write(self, ranks: Ranks, progress: Progress) -> Path:
        """Write what the ranks hold, and `progress`; of the older ones `KEPT` - 1 are kept."""
        folder = self._folder / f"{progress.phase}-{progress.step:06d}"
        # what an interrupted run has left: an unfinished folder, moments without their weights
        for stale in (folder, _optimizer(folder), *self._folder.glob(".*")):
            shutil.rmtree(stale, ignore_errors=True)
        weights = Layout.merge([Layout.from_json(text) for text in ranks.call("describe")])
        steps = json.dumps({"steps": ranks.one("optimizer_steps")}) + "\n"
        moments = optimizer_layout(weights)
        with new_checkpoint(_optimizer(folder), {MOMENTS: moments.tensors}, {STATE: steps}) as made:
            ranks.call("fill_moments", weights.to_json(), str(made / MOMENTS))
        files = {**self._model.files("float32"), STATE: progress.to_json()}
        with new_checkpoint(folder, {WEIGHTS: weights.tensors}, files) as made:
            ranks.call("fill_weights", weights.to_json(), str(made / WEIGHTS))
        for old in _checkpoints(self._folder)[:-KEPT]:
            shutil.rmtree(old)
            shutil.rmtree(_optimizer(old), ignore_errors=True)
        return folder

    def load_optimizer(self, ranks: Ranks, folder: Path) -> None:
        """Give the ranks the optimizer state of a checkpoint."""
        state = json.loads((_optimizer(folder) / STATE).read_text())
        ranks.call("load_optimizer", str(_optimizer(folder)), state["steps"])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, if there is one."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first: those of SFT come before those of RL. What a crash left unfinished is
    hidden."""
    phases = ("sft", "rl")
    return [path for phase in phases for path in sorted(folder.glob(f"{phase}-" + "[0-9]" * 6))]


def _optimizer(folder: Path) -> Path:
    return folder.with_name(folder.name + ".optimizer")
