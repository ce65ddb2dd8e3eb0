"""Sees to it that time passes for the scheduler when a deadline of it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


def clock() -> int:
    """Microseconds of a clock that does not go back."""
    return time.monotonic_ns() // 1000


class Alarm:
    """Calls `ring` when the time has come that was set last."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0

    def set(self, due: int | None) -> None:
        """due: microseconds; None: never. An alarm that is set for earlier stays: deadlines move
        with every token, and it is cheaper to look once in vain than to set it each time."""
        if due is None or (self._timer is not None and self._due <= due):
            return
        self.stop()
        loop = asyncio.get_running_loop()
        self._due = due
        self._timer = loop.call_later(max(0, due - clock()) / 1e6, self._fire)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self._ring()
