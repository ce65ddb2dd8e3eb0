"""No idle engine, no lost trajectory: rollouts as a deterministic scheduler.

``Scheduler`` (C++) is told events and answers actions; it has no clock, no thread and no I/O.
``Driver`` runs one against engines from an asyncio loop; ``ReplayBuffer`` holds what they made,
``replay`` runs a recorded trace again. Needs numpy alone; docs/rollout.md explains it.
"""

from kimisys._core.rollout import (
    ACTION,
    EVENT,
    Action,
    ActionKind,
    Blocker,
    Config,
    Counts,
    DropReason,
    EndReason,
    EventKind,
    Ledger,
    Lengths,
    Repetition,
    RepetitionConfig,
    RepetitionDetector,
    Scheduler,
    as_actions,
)
from kimisys.rollout.batch import Batch, Dropped
from kimisys.rollout.buffer import Group, Prompt, ReplayBuffer, Segment, Trajectory
from kimisys.rollout.driver import Driver
from kimisys.rollout.engine import Engine, EngineStats, SegmentOutput, SegmentRequest
from kimisys.rollout.spans import Span
from kimisys.rollout.trace import Difference, Recording, Replay, Trace, read_trace, replay

__all__ = [
    "ACTION",
    "EVENT",
    "Action",
    "ActionKind",
    "Batch",
    "Blocker",
    "Config",
    "Counts",
    "Difference",
    "Driver",
    "DropReason",
    "Dropped",
    "EndReason",
    "Engine",
    "EngineStats",
    "EventKind",
    "Group",
    "Ledger",
    "Lengths",
    "Prompt",
    "Recording",
    "Repetition",
    "RepetitionConfig",
    "RepetitionDetector",
    "Replay",
    "ReplayBuffer",
    "Scheduler",
    "Segment",
    "SegmentOutput",
    "SegmentRequest",
    "Span",
    "Trace",
    "Trajectory",
    "as_actions",
    "read_trace",
    "replay",
]
