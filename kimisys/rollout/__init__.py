"""No idle engine, no lost trajectory: rollouts as a deterministic scheduler.

``Scheduler`` (C++) is told events and answers actions; it has no clock, no thread and no I/O.
``Driver`` runs one against engines from an asyncio loop; ``ReplayBuffer`` holds what they made,
``replay`` runs a recorded trace again. Needs numpy alone; docs/rollout.md explains it.
"""

from kimisys._core.rollout import Config, RepetitionConfig
from kimisys.rollout.batch import Batch, Dropped
from kimisys.rollout.buffer import Group, Prompt, Segment, Trajectory
from kimisys.rollout.driver import Driver
from kimisys.rollout.engine import EngineStats, SegmentOutput, SegmentRequest
from kimisys.rollout.spans import Span

__all__ = [
    "Batch",
    "Config",
    "Driver",
    "Dropped",
    "EngineStats",
    "Group",
    "Prompt",
    "RepetitionConfig",
    "Segment",
    "SegmentOutput",
    "SegmentRequest",
    "Span",
    "Trajectory",
]
