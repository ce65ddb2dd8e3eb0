"""What a run writes down about its rollouts, in OUT/rollouts:

trace              every event and decision of the scheduler, to be replayed; that of a run that
                   was resumed after step N is trace-N
segments.jsonl     the segments as they ran: engine, start and end in seconds of the run
groups.jsonl       the groups that were trained or dropped: lengths, versions, rewards
steps-engineN.npy  the timed steps of engine N
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kimisys.rollout import Dropped, Group, Span
from kimisys.trainer.learning import Experience
from kimisys.trainer.metrics import append_record, open_records


class RolloutLog:
    """The files of one life of a run, in `folder`.

    done, seconds: RL steps and seconds before it; what a killed life wrote of later ones is
    dropped. began: when it began, in seconds of time.monotonic. first: the number of the first
    prompt that it offers.
    """

    def __init__(self, folder: Path, done: int, seconds: float, began: float, first: int) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._first = folder, first
        self._before, self._zero = seconds, began - seconds
        self.trace = folder / (f"trace-{done}" if done else "trace")
        """Where the driver records."""
        self.trace.unlink(missing_ok=True)
        self._segments = open_records(folder / "segments.jsonl", done)
        self._groups = open_records(folder / "groups.jsonl", done)
        self._steps: dict[int, list[np.ndarray]] = {}

    def __enter__(self) -> RolloutLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._segments.close()
        self._groups.close()

    def batch(
        self,
        step: int,
        learned: Experience,
        dropped: Sequence[Dropped],
        spans: Sequence[Span],
        places: Mapping[int, int],
    ) -> None:
        """What step `step` trained, what was dropped since the step before, what has run. places:
        of the problems in the task, by the numbers of the prompts."""
        rewards = learned.answers.outcomes
        row = 0
        for group in learned.groups:
            earned = rewards[row : row + len(group.trajectories)].tolist()
            self._group(step, group, places, {"rewards": earned})
            row += len(group.trajectories)
        for one in dropped:
            self._group(step, one.group, places, {"dropped": one.reason})
        for span in spans:
            append_record(self._segments, {"step": step, **self._span(span)})

    def engine_steps(self, engines: Sequence[np.ndarray]) -> None:
        """The timed steps of each engine since the last call: structured arrays with a `start` in
        seconds of time.monotonic."""
        for number, steps in enumerate(engines):
            path = self._folder / f"steps-engine{number}.npy"
            if number not in self._steps:
                known = np.load(path) if path.exists() else steps[:0]
                self._steps[number] = [known[known["start"] < self._before]]
            shifted = steps.copy()
            shifted["start"] -= self._zero
            self._steps[number].append(shifted)
            # whole or not at all: a run that is killed here must be able to go on
            fresh = path.with_suffix(".partial")
            with open(fresh, "wb") as file:
                np.save(file, np.concatenate(self._steps[number]))
            os.replace(fresh, path)

    def _span(self, span: Span) -> dict[str, Any]:
        return {
            "engine": span.engine,
            "group": self._first + span.group,
            "sample": span.sample,
            "start": round(span.start - self._zero, 6),
            "end": round(span.end - self._zero, 6),
            "tokens": span.tokens,
            "version": span.version,
            "reason": span.reason,
        }

    def _group(
        self, step: int, group: Group, places: Mapping[int, int], more: dict[str, Any]
    ) -> None:
        begun = [one for one in group.trajectories if one.segments]
        record = {
            "step": step,
            "group": group.prompt.key,
            "problem": places[group.prompt.key],
            "prompt_tokens": len(group.prompt.token_ids),
            "lengths": [len(one) for one in group.trajectories],
            "versions": [[one.segments[0].version, one.segments[-1].version] for one in begun],
            "reasons": [one.reason for one in group.trajectories],
        }
        append_record(self._groups, {**record, **more})
