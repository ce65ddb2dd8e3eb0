"""Sees to it that time passes for the scheduler when a deadline of it does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


def clock() -> int:
    """Microseconds of the event loop's clock, which is `time.monotonic` and does not go back."""
    return int(asyncio.get_running_loop().time() * 1e6)


class Alarm:
    """Calls `ring` when the time has come that was set."""

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
        self._due = due
        # One more: a clock in whole microseconds must not find that it is not yet time.
        self._timer = asyncio.get_running_loop().call_at((due + 1) / 1e6, self._fire)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self._ring()
