"""A recorded run, as the simulator needs it: its lengths, its engines, the times of its batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kimisys.rollout import ActionKind, Config, EndReason, EventKind, Lots
from kimisys.rollout.trace import read_trace
from kimisys.trainer.metrics import RunFolderError

# Of a simulated engine; a run without a token budget tells the scheduler of no bounds.
_MOST_SEQUENCES, _MOST_KV = 1 << 20, 1 << 24
_LAST = frozenset({int(EndReason.STOP), int(EndReason.REPETITION)})
_STARTS = frozenset({int(ActionKind.START), int(ActionKind.CONTINUE)})
_DEATHS = frozenset({int(ActionKind.ABORT), int(ActionKind.REQUEUE)})  # what still comes is late


@dataclass(frozen=True)
class RecordedRun:
    """What a trace tells. engines: KV tokens and most sequences of each, as it joined. lots: the
    groups in the order of the offers; lengths of trajectories that the run did not finish are drawn
    from those that became longer still. unfinished: how many these are, of all that began. Seconds:
    rollouts by batch, from the trainer's readiness to the batch; training and publishing between;
    what taking a version took."""

    config: Config
    engines: list[tuple[int, int]]
    lots: Lots
    unfinished: int
    begun: int
    rollout_seconds: list[float]
    between_seconds: list[float]
    update_seconds: float


def traces(folder: Path) -> list[Path]:
    """The traces of a run, of each of its lives. Raises RunFolderError if there is none."""
    found = sorted((folder / "rollouts").glob("trace*"))
    if not found:
        raise RunFolderError(
            f"{folder} holds no rollouts/trace: name the folder of a run of kimisys train"
        )
    return found


def steps_of(folder: Path) -> list[npt.NDArray[Any]]:
    """The timed steps of each engine of a run. Raises RunFolderError if there are none."""
    found = []
    for path in sorted((folder / "rollouts").glob("steps-engine*.npy")):
        try:
            found.append(np.load(path, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path} cannot be read: {error}") from error
    if not found:
        raise RunFolderError(
            f"{folder} holds no rollouts/steps-engine*.npy: it has not come to its first batch, or "
            "an older version of kimisys ran it"
        )
    return found


def recorded_run(path: Path) -> RecordedRun:
    """Read a trace. Raises SchedulerError for what is none, RunFolderError for one without a
    batch."""
    # what was decided then, which the scheduler of another release need not decide again
    whole = read_trace(path, partial=True)
    told, events, actions = _Told(), whole.events, whole.actions
    ends = np.searchsorted(whole.answers, np.arange(len(events)), side="right").tolist()
    for event, first, end in zip(events, [0, *ends], ends, strict=False):
        told.event(event)
        for action in actions[first:end]:
            told.action(int(event["time"]), action)
    if not told.batches or not told.prompts:
        raise RunFolderError(f"{path} records no batch: let the run come to its first step")
    ready = np.array(told.ready[: len(told.batches)]) / 1e6
    batches = np.array(told.batches) / 1e6
    lots, unfinished = told.lots(whole.config)
    return RecordedRun(
        config=whole.config,
        engines=[
            (min(kv, _MOST_KV), min(most, _MOST_SEQUENCES)) for kv, most in told.engines.values()
        ],
        lots=lots,
        unfinished=unfinished,
        begun=len(told.tokens),
        rollout_seconds=(batches - ready).tolist(),
        between_seconds=(ready[1:] - batches[:-1]).tolist(),
        update_seconds=float(np.median(told.updates)) / 1e6 if told.updates else 0.0,
    )


@dataclass
class _Told:
    """What is known after some events and actions; times in microseconds."""

    prompts: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    engines: dict[int, tuple[int, int]] = field(default_factory=dict)
    leases: dict[int, tuple[int, int]] = field(default_factory=dict)
    tokens: dict[tuple[int, int], int] = field(default_factory=dict)
    finished: set[tuple[int, int]] = field(default_factory=set)
    ready: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    updating: dict[int, int] = field(default_factory=dict)
    updates: list[int] = field(default_factory=list)

    def event(self, event: np.void) -> None:
        kind, time, engine = EventKind(int(event["kind"])), int(event["time"]), int(event["engine"])
        if kind == EventKind.OFFERED:
            shape = (int(event[name]) for name in ("tokens", "count", "limit"))
            prompt, samples, limit = shape
            self.prompts[int(event["id"])] = (prompt, samples, limit)
        elif kind == EventKind.ENGINE_JOINED:
            self.engines[engine] = (int(event["tokens"]), int(event["count"]))
        elif kind == EventKind.TRAINER_READY:
            self.ready.append(time)
        elif kind == EventKind.ENGINE_UPDATED and engine in self.updating:
            self.updates.append(time - self.updating.pop(engine))
        elif kind in {EventKind.TOKENS, EventKind.SEGMENT_ENDED}:
            who = self.leases.get(int(event["id"]))
            if who is not None:  # else the lease is dead
                self._made(who, event, kind == EventKind.SEGMENT_ENDED)

    def _made(self, who: tuple[int, int], event: np.void, ended: bool) -> None:
        self.tokens[who] += int(event["tokens"])
        limit = self.prompts[who[0]][2]
        if ended:
            del self.leases[int(event["id"])]
            if int(event["reason"]) in _LAST or self.tokens[who] >= limit:
                self.finished.add(who)

    def action(self, time: int, action: np.void) -> None:
        kind = int(action["kind"])
        if kind in _STARTS:
            who = (int(action["group"]), int(action["sample"]))
            self.leases[int(action["lease"])] = who
            self.tokens.setdefault(who, 0)
        elif kind in _DEATHS:
            self.leases.pop(int(action["lease"]), None)
        elif kind == int(ActionKind.BATCH):
            self.batches.append(time)
        elif kind == int(ActionKind.UPDATE):
            self.updating[int(action["engine"])] = time

    def lots(self, config: Config) -> tuple[Lots, int]:
        """The groups that were offered, and how many trajectories that began have no length yet."""
        random = np.random.default_rng(1)
        known = np.sort(np.array([self.tokens[who] for who in self.finished], np.int64))
        samples = next(iter(self.prompts.values()))[1]
        limit = max(limit for _, _, limit in self.prompts.values())
        lengths, unfinished = [], 0
        for group in self.prompts:
            for sample in range(samples):
                who = (group, sample)
                made = self.tokens.get(who, 0)
                if who in self.finished:
                    lengths.append(made)
                    continue
                unfinished += who in self.tokens
                longer = known[np.searchsorted(known, made, side="right") :]
                lengths.append(int(random.choice(longer)) if len(longer) else limit)
        prompts = np.array([prompt for prompt, _, _ in self.prompts.values()], np.int64)
        table = np.maximum(1, np.array(lengths, np.int64))
        return Lots(prompt_tokens=prompts, lengths=table, samples=samples, limit=limit), unfinished
