"""Timing for shared machines: the answer checked first, then ours and the peer in turn."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One measured case. value: the median; low, high: the extremes; ratio: ours against the peer,
    larger is better.

    With `correct` false there is no time and no ratio. parts: median milliseconds of what the two
    sides are made of, where the case can tell.
    """

    bench: str
    case: str
    metric: str
    unit: str
    value: float | None
    low: float | None
    high: float | None
    peer: str
    peer_value: float | None
    ratio: float | None
    correct: bool
    machine: str
    parts: dict[str, float] | None = None


@dataclass(frozen=True)
class Case:
    """Something to time. `ours` and `peer` do the same work, and `correct` looks at what `ours`
    made."""

    name: str
    ours: Callable[[], object]
    peer_name: str
    peer: Callable[[], object]
    correct: Callable[[], bool]
    nbytes: int | None = None
    """Bytes moved by one call: the metric is then GB/s, otherwise milliseconds."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds, read before and after each call; one of a case's own leaves out what is not its."""
    parts: Callable[[], dict[str, float]] | None = None
    """Asked after the last call: median milliseconds of what the calls are made of."""


def measure(bench: str, case: Case, repeats: int) -> Record:
    """Check the answer, then time `ours` and `peer` alternately, `repeats` times each after a
    warm-up."""
    metric, unit = ("throughput", "GB/s") if case.nbytes is not None else ("time", "ms")
    case.ours()
    if not case.correct():
        return Record(
            bench,
            case.name,
            metric,
            unit,
            None,
            None,
            None,
            case.peer_name,
            None,
            None,
            False,
            machine(),
        )
    case.peer()
    ours, peers = [], []
    for _ in range(repeats):
        ours.append(_seconds(case.ours, case.clock))
        peers.append(_seconds(case.peer, case.clock))
    ratio = statistics.median(peer / own for own, peer in zip(ours, peers, strict=True))

    def figure(seconds: float) -> float:
        return seconds * 1e3 if case.nbytes is None else case.nbytes / seconds / 1e9

    figures = [figure(seconds) for seconds in ours]
    return Record(
        bench,
        case.name,
        metric,
        unit,
        statistics.median(figures),
        min(figures),
        max(figures),
        case.peer_name,
        statistics.median(map(figure, peers)),
        ratio,
        True,
        machine(),
        case.parts() if case.parts is not None else None,
    )


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


@cache
def machine() -> str:
    """The processor's model, how many of it this process may use, and the memory."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
