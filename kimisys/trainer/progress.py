"""How far a run has come: what a checkpoint holds beside weights and optimizer state."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from kimisys.errors import CheckpointError
from kimisys.trainer.watch import Watch

Phase = Literal["sft", "rl"]


@dataclass(frozen=True)
class Evaluation:
    """Of held-out problems. pass_rate, length, correct_length (mean tokens of all and of the right
    completions): sampled at temperature 1. greedy: pass rate at temperature 0."""

    pass_rate: float
    greedy: float
    length: float
    correct_length: float | None


@dataclass
class Progress:
    """The state of a run between two steps. With the weights and the seed it decides all that
    comes.

    task: its fingerprint. step: steps done in `phase`. version: last published. success_rates: of
    the task's problems. draws, offered: how often problems were drawn, and how many prompts were
    offered to the rollouts. waiting: places of the problems that were drawn and neither trained nor
    dropped, in the order in which they are offered again.
    before: the evaluation before RL. resumed_at: RL steps after which the run was resumed.
    seconds: spent before the last resume.
    """

    watch: Watch
    task: str
    phase: Phase = "sft"
    step: int = 0
    version: int = 0
    success_rates: list[float] = field(default_factory=list)
    draws: int = 0
    offered: int = 0
    waiting: list[int] = field(default_factory=list)
    before: Evaluation | None = None
    resumed_at: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> str:
        """The text of a checkpoint's state.json."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Progress:
        """Read a state.json; CheckpointError when it is not one."""
        try:
            record = json.loads(path.read_text())
            before = record.pop("before")
            return cls(
                watch=_build(Watch, record.pop("watch")),
                before=None if before is None else _build(Evaluation, before),
                **record,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} does not hold the state of a run ({error}); remove its folder to resume "
                "from the checkpoint before it"
            ) from error


def _build(kind: type, record: dict[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    if unknown := set(record) - known:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    return kind(**record)
