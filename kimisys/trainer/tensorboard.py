"""The metrics of a run for TensorBoard, beside metrics.jsonl, which stays the truth."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from kimisys.errors import KimisysError
from kimisys.trainer.metrics import StepMetrics


class TensorBoardMissingError(KimisysError):
    """TensorBoard is asked for and not installed."""


class TensorBoardLog:
    """Writes each step's numbers as scalars into `folder`/tensorboard, for `tensorboard --logdir`.

    first_step: the step that comes next. What an interrupted run has written of that step and of
    later ones is struck out, so that a resumed curve has no step twice.
    """

    def __init__(self, folder: Path, first_step: int = 1) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise TensorBoardMissingError(
                f"TensorBoard cannot be written: {error}; pip install kimisys[tensorboard]"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def step(self, metrics: StepMetrics) -> None:
        """Add one step: every number that is known, under the name it has in metrics.jsonl."""
        for name, value in asdict(metrics).items():
            if name != "step" and value is not None:
                group = "seconds" if name.endswith("_seconds") else "metrics"
                self._writer.add_scalar(f"{group}/{name}", value, metrics.step)
        self._writer.flush()  # to be looked at while the run goes on

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()
