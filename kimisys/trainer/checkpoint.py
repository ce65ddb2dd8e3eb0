"""Checkpoints of a run: weights and optimizer state as safetensors in Hugging Face coordinates, and
how far the run had come as JSON.

    checkpoints/sft-000100.optimizer/ AdamW's moments, and the steps that they are old: in SFT
    checkpoints/sft-000100/           a Hugging Face folder: config.json, tokenizer,
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

from kimisys.errors import CheckpointError, LayoutError
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
        lonely = [p for p in self._folder.glob("*.optimizer") if not p.with_suffix("").exists()]
        for stale in (folder, *lonely, *self._folder.glob(".*")):
            shutil.rmtree(stale, ignore_errors=True)
        weights = _described(ranks, "describe")
        if progress.phase == "sft":  # k1.5 forgets the optimizer's state at every iteration
            steps = json.dumps({"steps": ranks.one("optimizer_steps")}) + "\n"
            moments = _described(ranks, "describe_moments")
            files = {MOMENTS: moments.tensors}
            with new_checkpoint(_optimizer(folder), files, {STATE: steps}) as made:
                _fill(ranks, "fill_moments", moments, made / MOMENTS)
        texts = {**self._model.files("float32"), STATE: progress.to_json()}
        with new_checkpoint(folder, {WEIGHTS: weights.tensors}, texts) as made:
            _fill(ranks, "fill_weights", weights, made / WEIGHTS)
        for old in _checkpoints(self._folder)[:-KEPT]:
            shutil.rmtree(old)
            shutil.rmtree(_optimizer(old), ignore_errors=True)
        return folder

    def load_optimizer(self, ranks: Ranks, folder: Path) -> None:
        """Give the ranks the optimizer state of a checkpoint of SFT. Raises CheckpointError."""
        path = _optimizer(folder) / STATE
        try:
            steps = int(json.loads(path.read_text())["steps"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} does not say how old the optimizer's state is ({error}); remove {folder} "
                "to resume from the checkpoint before it"
            ) from error
        ranks.call("load_optimizer", str(path.parent), steps)


def _described(ranks: Ranks, method: str) -> Layout:
    """What each rank says that it holds, together."""
    return Layout.merge([Layout.from_json(text) for text in ranks.call(method)])


def _fill(ranks: Ranks, method: str, layout: Layout, file: Path) -> None:
    """Let each rank write its share; LayoutError unless the shares are the whole file."""
    written = sum(ranks.call(method, layout.to_json(), str(file)))
    if written != (whole := sum(tensor.nbytes for tensor in layout.tensors)):
        raise LayoutError(
            f"the ranks wrote {written} of the {whole} bytes of {file}: they do not agree on the "
            "layout"
        )


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
