"""The two sides as runs of `kimisys train`, and what their folders say of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASK = "bench/hybrid/task.py:task"


@dataclass(frozen=True)
class Side:
    """One way to roll out. options: of `kimisys train`."""

    name: str
    options: Sequence[str]


@dataclass(frozen=True)
class Measured:
    """A run. seconds: of its RL steps. tokens: trained in them. rollout_seconds: of `seconds`,
    those from asking for a batch to having it. pass_rate: on the held-out problems, after."""

    side: str
    seed: int
    seconds: float
    rollout_seconds: float
    tokens: int
    steps: int
    pass_rate: float
    folder: Path

    @property
    def microseconds_per_token(self) -> float:
        """Wall time per trained token."""
        return 1e6 * self.seconds / self.tokens


def warm_up(folder: Path, steps: int) -> Path:
    """The model that both sides start from, after supervised steps; made once."""
    model = folder / "sft" / "model"
    if not model.exists():
        sft = ["--sft.steps", str(steps), "--sft.batch-size", "32", "--seed", "1"]
        _kimisys(folder / "sft.txt", "sft", "--task", TASK, "--out", str(folder / "sft"), *sft)
    return model


def run(side: Side, seed: int, model: Path, folder: Path, options: Sequence[str]) -> Measured:
    """Train in `folder`/SIDE-SEED; a run that is there already is only read."""
    out = folder / f"{side.name}-{seed}"
    if not (out / "summary.json").exists():
        arguments = ["--model", str(model), "--task", TASK, "--out", str(out), "--seed", str(seed)]
        _kimisys(folder / f"{out.name}.txt", "train", *arguments, *options, *side.options)
    return read(side.name, seed, out)


def read(side: str, seed: int, out: Path, warm_steps: int = 1) -> Measured:
    """What a run's files say; its first `warm_steps` steps pay for first use and do not count."""
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    if summary["status"] != "completed":
        raise RuntimeError(f"the run in {out} ended with {summary['status']}: see {out}.txt")
    counted = steps[warm_steps:]
    return Measured(
        side,
        seed,
        sum(step["step_seconds"] for step in counted),
        sum(step["rollout_seconds"] for step in counted),
        sum(step["trained_tokens"] for step in counted),
        len(counted),
        summary["pass_rate_after"],
        out,
    )


def _kimisys(log: Path, *arguments: str) -> None:
    """Runs the command to its end; what it prints goes to `log`."""
    entry = "from kimisys.trainer.entry import main; main()"
    with open(log, "w") as file:
        ended = subprocess.run([sys.executable, "-c", entry, *arguments], stdout=file, stderr=file)
    if ended.returncode:
        raise RuntimeError(f"kimisys {arguments[0]} ended with {ended.returncode}: see {log}")
