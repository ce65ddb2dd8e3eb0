"""Timing for shared machines: the answer checked first, then ours and its peers in turn."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Peer:
    """What one peer reached beside ours. value: its median, in the record's unit; ratio: ours
    against it, the median over its rounds, larger is better."""

    name: str
    value: float
    ratio: float
    rounds: int


@dataclass(frozen=True)
class Record:
    """One measured case. value: the median; low, high: the extremes.

    With `correct` false there is no time and no peer. parts: median milliseconds of what the sides
    are made of, where the case can tell. figures: what else the case measured, with the unit in
    each name. rounds: timed runs of ours.
    """

    bench: str
    case: str
    metric: str
    unit: str
    value: float | None
    low: float | None
    high: float | None
    peers: tuple[Peer, ...]
    correct: bool
    machine: str
    parts: dict[str, float] | None = None
    figures: dict[str, float] | None = None
    rounds: int = 0


@dataclass(frozen=True)
class Case:
    """Something to time. `ours` and each of `peers` do the same work, and `correct` looks at what
    `ours` made."""

    name: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    correct: Callable[[], bool]
    nbytes: int | None = None
    """Bytes moved by one call: the metric is then GB/s, otherwise milliseconds."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds, read before and after each call; one of a case's own leaves out what is not its."""
    parts: Callable[[], dict[str, float]] | None = None
    """Asked after the last call: median milliseconds of what the calls are made of."""
    figures: Callable[[], dict[str, float]] | None = None
    """Asked after the last call: what else was measured."""
    peer_rounds: Mapping[str, int] = field(default_factory=dict)
    """Peers too slow for as many rounds as ours gets: how many each may have, without warm-up."""
    agree: Callable[[], bool] = lambda: True
    """Looks, after the last call, at what the peers made: whether it is what ours made."""
    before: Callable[[], object] = lambda: None
    """Called, untimed, before each timed call of ours: brings what there is to do anew."""
    also: Mapping[str, Callable[[], float]] = field(default_factory=dict)
    """Further clocks that are read at the same calls: each makes a record, of the name given."""


def measure(
    bench: str, case: Case, repeats: int, tell: Callable[[str], object] = lambda what: None
) -> Record:
    """Check the answer, then time `ours` and the peers in turn, `repeats` times each after a
    warm-up; the rare rounds of a slow peer come first. tell: hears what comes next, untimed."""
    return measure_all(bench, case, repeats, tell)[0]


def measure_all(
    bench: str, case: Case, repeats: int, tell: Callable[[str], object] = lambda what: None
) -> list[Record]:
    """As `measure`: the record by the case's own clock, then one for each of `also`."""
    metric, unit = ("throughput", "GB/s") if case.nbytes is not None else ("time", "ms")
    wrong = [Record(bench, case.name, metric, unit, None, None, None, (), False, machine())]
    tell("the answer is checked")
    case.before()
    case.ours()
    if not case.correct():
        return wrong
    for name, peer in case.peers.items():
        if name not in case.peer_rounds:
            tell(f"warm-up, {name}")
            peer()
    clocks = [case.clock, *case.also.values()]
    ours: list[list[float]] = []  # of each call, by clock
    peers: dict[str, list[list[float]]] = {name: [] for name in case.peers}
    for turn in range(repeats):
        tell(f"round {turn + 1} of {repeats}, kimisys")
        case.before()
        ours.append(_seconds(case.ours, clocks))
        for name, peer in case.peers.items():
            if turn < case.peer_rounds.get(name, repeats):
                tell(f"round {turn + 1} of {case.peer_rounds.get(name, repeats)}, {name}")
                peers[name].append(_seconds(peer, clocks))
    tell("the peers' answers and other figures")
    if not case.agree():
        return wrong
    records = []
    for number, name in enumerate([case.name, *case.also]):
        own = [times[number] for times in ours]
        theirs = {name: [times[number] for times in all_] for name, all_ in peers.items()}
        records.append(_record(bench, replace(case, name=name), own, theirs))
    extra = replace(
        records[0],
        parts=case.parts() if case.parts is not None else None,
        figures=case.figures() if case.figures is not None else None,
    )
    return [extra, *records[1:]]


def _record(bench: str, case: Case, ours: list[float], peers: dict[str, list[float]]) -> Record:
    """Of seconds by one clock."""
    metric, unit = ("throughput", "GB/s") if case.nbytes is not None else ("time", "ms")

    def figure(seconds: float) -> float:
        return seconds * 1e3 if case.nbytes is None else case.nbytes / seconds / 1e9

    def against(name: str, times: list[float]) -> Peer:
        # not strict: a slow peer sat out the later turns
        ratios = (theirs / own for own, theirs in zip(ours, times, strict=False))
        median = statistics.median(map(figure, times))
        return Peer(name, median, statistics.median(ratios), len(times))

    figures = [figure(seconds) for seconds in ours]
    return Record(
        bench,
        case.name,
        metric,
        unit,
        statistics.median(figures),
        min(figures),
        max(figures),
        tuple(against(name, times) for name, times in peers.items()),
        True,
        machine(),
        rounds=len(ours),
    )


def _seconds(call: Callable[[], object], clocks: list[Callable[[], float]]) -> list[float]:
    starts = [clock() for clock in clocks]
    call()
    return [clock() - start for clock, start in zip(clocks, starts, strict=True)]


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
