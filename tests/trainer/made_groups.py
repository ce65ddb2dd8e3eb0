"""Groups made up for tests: trajectories of given segments, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kimisys.rollout import Group, Prompt, Segment, Trajectory

Piece = tuple[int, Sequence[int]]
"""A version and the tokens that it made."""


def trajectory(*pieces: Piece, reason: str = "stop") -> Trajectory:
    """A finished trajectory; token t of version v has the log-probability -v - t / 100."""
    return Trajectory(
        tuple(
            Segment(
                version,
                np.array(ids, np.int32),
                np.array([-version - token / 100 for token in ids], np.float32),
                engine=0,
                start=float(version),
                end=version + 0.5,
            )
            for version, ids in pieces
        ),
        reason,
    )


def group(key: int, prompt: Sequence[int], *trajectories: Trajectory) -> Group:
    """A group of these, whose prompt has the number `key`."""
    made = Prompt(key, prompt, len(trajectories), 64)
    return Group(key, made, trajectories)
