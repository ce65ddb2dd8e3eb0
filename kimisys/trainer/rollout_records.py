"""What a run writes down about its rollouts, read again: segments as they ran, and the groups that
were trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kimisys.trainer.metrics import read_lines

FINISHED = frozenset({"stop", "length", "repetition"})


@dataclass(frozen=True)
class SegmentRecord:
    """A line of rollouts/segments.jsonl: one lease. start, end: seconds of the run."""

    step: int
    engine: int
    group: int
    sample: int
    start: float
    end: float
    tokens: int
    version: int
    reason: str


@dataclass(frozen=True)
class GroupRecord:
    """A line of rollouts/groups.jsonl: how long the samples of a group were. dropped: why it was
    not trained; "": it was."""

    step: int
    group: int
    lengths: list[int]
    dropped: str = ""


@dataclass(frozen=True)
class Rollouts:
    """segments: a structured array with the fields of SegmentRecord, reason as text, in order of
    their starts. dispatched, trained: output tokens of trajectories, of all that finished and of
    those whose group was trained."""

    segments: npt.NDArray[Any]
    dispatched: npt.NDArray[np.int64]
    trained: npt.NDArray[np.int64]


def read_rollouts(folder: Path) -> Rollouts | None:
    """Of the run in `folder`; None where it has not run a segment yet. Raises RunFolderError,
    naming file and line."""
    path = folder / "rollouts" / "segments.jsonl"
    records = read_lines(path, SegmentRecord) if path.exists() else []
    if not records:
        return None
    columns = {name: [getattr(one, name) for one in records] for name in _FIELDS.names or ()}
    segments = np.empty(len(records), _FIELDS)
    for name, column in columns.items():
        segments[name] = column
    segments = segments[np.argsort(segments["start"], kind="stable")]
    groups = folder / "rollouts" / "groups.jsonl"
    known = read_lines(groups, GroupRecord) if groups.exists() else []
    lengths = [length for group in known if not group.dropped for length in group.lengths]
    return Rollouts(segments, _finished(segments), np.array(lengths, np.int64))


_FIELDS = np.dtype(
    [
        ("step", "i8"),
        ("engine", "i8"),
        ("group", "i8"),
        ("sample", "i8"),
        ("start", "f8"),
        ("end", "f8"),
        ("tokens", "i8"),
        ("version", "i8"),
        ("reason", "U16"),
    ]
)


def _finished(segments: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Output tokens of each trajectory that came to its end, in all its segments."""
    tokens: dict[tuple[int, int], int] = {}
    ended: list[int] = []
    for one in segments:
        who = (int(one["group"]), int(one["sample"]))
        tokens[who] = tokens.get(who, 0) + int(one["tokens"])
        if one["reason"] in FINISHED:
            ended.append(tokens.pop(who))
    return np.array(ended, np.int64)
