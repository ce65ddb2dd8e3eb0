"""Events as the records that traces hold."""

from __future__ import annotations

import struct

from kimisys._core.rollout import EndReason, EventKind

_NO_ENGINE = 0xFFFFFFFF
_RECORD = struct.Struct("=qIIQqqqqII")  # an EVENT


def record(
    time: int,
    kind: EventKind,
    *,
    engine: int = _NO_ENGINE,
    id: int = 0,
    tokens: int = 0,
    limit: int = 0,
    count: int = 0,
    version: int = -1,
    reason: int = EndReason.NONE,
) -> bytes:
    """One EVENT. time: microseconds; csrc/rollout/types.h says which kind takes what."""
    return _RECORD.pack(time, kind, engine, id, tokens, limit, count, version, reason, 0)
