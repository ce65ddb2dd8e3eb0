"""The replay buffer: groups and their segments, from the offer to the trainer's hand, in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kimisys.errors import SchedulerError


@dataclass(frozen=True)
class Prompt:
    """What is offered: `samples` trajectories of at most `limit` output tokens each.

    key: the caller's own number. Seeds are derived from it, so that prompts that shall be sampled
        independently have different keys.
    """

    key: int
    token_ids: Sequence[int]
    samples: int
    limit: int

    def __post_init__(self) -> None:
        if not len(self.token_ids) or self.samples < 1 or self.limit < 1:
            raise SchedulerError(
                f"prompt {self.key} has {len(self.token_ids)} tokens, {self.samples} samples and a "
                f"limit of {self.limit} output tokens; each must be at least 1"
            )


@dataclass(frozen=True, eq=False)
class Segment:
    """A piece of a trajectory, made by one engine under one weight version.

    token_ids: int32[n]. log_probs: float32[n], of the distributions sampled from.
    start, end: seconds of `time.monotonic`.
    """

    version: int
    token_ids: np.ndarray
    log_probs: np.ndarray
    engine: int
    start: float
    end: float


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One sample of a group. reason: "stop", "length", "repetition"; "" while it is unfinished."""

    segments: tuple[Segment, ...]
    reason: str = ""

    @property
    def token_ids(self) -> np.ndarray:
        """int32[tokens]"""
        return np.concatenate([np.zeros(0, np.int32), *(s.token_ids for s in self.segments)])

    @property
    def log_probs(self) -> np.ndarray:
        """float32[tokens]"""
        return np.concatenate([np.zeros(0, np.float32), *(s.log_probs for s in self.segments)])

    @property
    def versions(self) -> np.ndarray:
        """int64[tokens]: of the weights that made each token."""
        sizes = [len(s.token_ids) for s in self.segments]
        return np.repeat(np.array([s.version for s in self.segments], np.int64), sizes)

    def __len__(self) -> int:
        """Tokens."""
        return sum(len(s.token_ids) for s in self.segments)


@dataclass(frozen=True, eq=False)
class Group:
    """A prompt and its trajectories, by sample. id: in the order of the offers, from 0."""

    id: int
    prompt: Prompt
    trajectories: tuple[Trajectory, ...]

    @property
    def complete(self) -> bool:
        return all(t.reason for t in self.trajectories)

    @property
    def tokens(self) -> int:
        """Of output."""
        return sum(len(t) for t in self.trajectories)


@dataclass
class _Open:
    """The segment that is being made."""

    engine: int
    version: int
    start: float
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


@dataclass
class _Growing:
    """A trajectory that is not with the trainer yet."""

    output: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    open: _Open | None = None
    reason: str = ""
    begun: bool = False


class ReplayBuffer:
    """What was offered and is not trained: the driver fills it, the trainer looks at it.

    Views are taken at the moment of the call and do not change afterwards; a segment that is being
    made shows in them when it has ended.
    """

    def __init__(self) -> None:
        self._prompts: dict[int, Prompt] = {}  # by group, in the order of the offers
        self._growing: dict[int, list[_Growing]] = {}
        self._handed_over: list[Group] = []
        self._offered = 0

    def unfinished(self) -> list[Prompt]:
        """Prompts neither handed over nor dropped, in the order of the offers: what to offer again
        in a run that goes on elsewhere."""
        return list(self._prompts.values())

    def begun(self) -> list[Group]:
        """Groups that have begun and are not complete."""
        return [
            self.group(number)
            for number, samples in self._growing.items()
            if any(s.begun for s in samples) and not all(s.reason for s in samples)
        ]

    def complete(self) -> list[Group]:
        """Groups that are complete and wait for the trainer."""
        finished = (n for n, samples in self._growing.items() if all(s.reason for s in samples))
        return [self.group(number) for number in finished]

    def handed_over(self) -> list[Group]:
        """The groups of the last batch."""
        return list(self._handed_over)

    def group(self, number: int) -> Group:
        """A group neither handed over nor dropped; KeyError for others."""
        samples = self._growing[number]
        return Group(
            number,
            self._prompts[number],
            tuple(Trajectory(tuple(s.segments), s.reason) for s in samples),
        )

    def __len__(self) -> int:
        """Groups neither handed over nor dropped."""
        return len(self._prompts)

    # What follows is the driver's: it tells the buffer what happens.

    def offer(self, prompt: Prompt) -> int:
        """The group's id."""
        number = self._offered
        self._offered += 1
        self._prompts[number] = prompt
        self._growing[number] = [_Growing() for _ in range(prompt.samples)]
        return number

    def prompt(self, group: int) -> Prompt:
        return self._prompts[group]

    def output(self, group: int, sample: int) -> list[int]:
        """The output tokens so far, of all segments. Not a copy."""
        return self._growing[group][sample].output

    def begin(self, group: int, sample: int, engine: int, version: int, start: float) -> None:
        """A segment begins."""
        trajectory = self._growing[group][sample]
        if trajectory.open is not None or trajectory.reason:
            raise SchedulerError(
                f"sample {sample} of group {group} begins a segment on engine {engine} while "
                f"{trajectory.open or trajectory.reason}: a defect of the scheduler, please report"
            )
        trajectory.begun = True
        trajectory.open = _Open(engine, version, start)

    def extend(
        self, group: int, sample: int, token_ids: Iterable[int], log_probs: Iterable[float]
    ) -> None:
        trajectory = self._growing[group][sample]
        assert trajectory.open is not None
        trajectory.open.token_ids.extend(token_ids)
        trajectory.open.log_probs.extend(log_probs)

    def end(self, group: int, sample: int, end: float, reason: str = "") -> int:
        """The segment ends with what it has, and with a reason the trajectory; returns its
        tokens."""
        trajectory = self._growing[group][sample]
        made, trajectory.open = trajectory.open, None
        trajectory.reason = reason
        if made is None or not made.token_ids:
            return 0
        trajectory.segments.append(
            Segment(
                made.version,
                np.array(made.token_ids, np.int32),
                np.array(made.log_probs, np.float32),
                made.engine,
                made.start,
                end,
            )
        )
        trajectory.output.extend(made.token_ids)
        return len(made.token_ids)

    def take(self, group: int) -> Group:
        """A group leaves: it was handed over or dropped."""
        whole = self.group(group)
        del self._prompts[group], self._growing[group]
        return whole

    def batch(self, groups: Sequence[Group]) -> None:
        """`groups` are with the trainer now; those of the batch before are forgotten."""
        self._handed_over = list(groups)
