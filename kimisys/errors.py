"""Every exception that kimisys raises on its own account. All derive from ``KimisysError``."""

from kimisys._core import (
    BufferMismatchError,
    DigestError,
    KimisysError,
    LayoutError,
    NotFiniteError,
    PlanError,
    SchedulerError,
    SnapshotError,
    VersionError,
)


class TraceError(KimisysError):
    """A traced loader did something that is not a copy of known elements; the message names it."""


class EngineError(KimisysError):
    """An inference engine failed, said what cannot be, or did not answer before its deadline; the
    message names it."""


class CheckpointError(KimisysError):
    """A checkpoint folder is incomplete, truncated or inconsistent; the message names the file."""


class WorkloadError(KimisysError):
    """Lengths of rollouts that cannot be: of a file (the message names its line) or as described
    by parameters."""


__all__ = [
    "BufferMismatchError",
    "CheckpointError",
    "DigestError",
    "EngineError",
    "KimisysError",
    "LayoutError",
    "NotFiniteError",
    "PlanError",
    "SchedulerError",
    "SnapshotError",
    "TraceError",
    "VersionError",
    "WorkloadError",
]
