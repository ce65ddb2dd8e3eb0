"""How fast a sync can be at best, whatever the route and the order.

The model is that of ``Route.simulate``: a network card (NIC) sends and receives at its bandwidth,
both at once; within a node bytes move for nothing; a rank sends what it owns or has received, and
takes in what it wants, through its own NIC. In any schedule at all, count for each demand how many
bytes each NIC sent, and how many each NIC took in of what its node did not have. Then

- each receiving node without an owner took in all of the demand, through NICs of its receivers;
- every byte taken in was sent by a NIC of an owner or of a receiver;
- every byte's first journey started on a node where an owner is;
- no NIC sent or received more than bandwidth x time.

So the counts of every schedule satisfy the linear programme below, and its smallest time is a lower
bound: times of messages, store and forward, and conflicts only add to it. Demands may be cut into
fractions, and relayed, at will.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kimisys._core.reshard import Demand, Route
from kimisys.errors import PlanError

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bound:
    """seconds: the linear programme's; simple_seconds: what sums alone show, never more than it.
    variables: of the programme before and after demands and NICs that are alike were merged."""

    seconds: float
    simple_seconds: float
    variables: tuple[int, int]


class _Flow(NamedTuple):
    """One demand on the network: NICs by number, a column for each choice."""

    bytes: int
    starts: tuple[int, ...]  # NICs on nodes where an owner is, of owners and receivers
    relays: tuple[int, ...]  # NICs of the other receivers
    entries: tuple[tuple[int, ...], ...]  # for each receiving node without an owner, its NICs


class _Program(NamedTuple):
    """minimise T: rows of sum(value x column) >= needed, or <= bandwidth x T where `capacity`."""

    rows: Integers
    columns: Integers
    values: Floats
    needed: Floats
    capacity: npt.NDArray[np.bool_]
    width: int  # columns, without T


def bound(route: Route) -> Bound:
    """A lower bound on the seconds that any schedule needs to satisfy the route's demands.

    It depends on demands, places and bandwidth alone, not on what the route chose; the relays of
    the programme are allowed even where the route has none. Solved with scipy's HiGHS.

    Raises PlanError if scipy is missing, or its solver gives up.
    """
    flows = list(_flows(route))
    program = _program(flows, len(route.nics()["nic"]))
    merged = _merge_alike(program)
    solved = _solve(merged) if flows else 0.0
    return Bound(
        seconds=solved / route.nic_bandwidth,
        simple_seconds=_simple_bytes(flows, len(route.nics()["nic"])) / route.nic_bandwidth,
        variables=(program.width, merged.width),
    )


def _flows(route: Route) -> Iterable[_Flow]:
    ends = route.endpoints()
    node, nic, rank = ends["node"], ends["nic"], ends["rank"]
    sides = [
        {int(rank[i]): int(i) for i in np.flatnonzero(ends["destination"] == side)}
        for side in (False, True)
    ]
    # Several demands between the same NICs are one.
    sums: dict[tuple[Any, ...], int] = {}
    for demand in route.demands:
        shape = _shape(demand, sides, node, nic)
        if shape[2]:
            sums[shape] = sums.get(shape, 0) + demand.bytes
    return (_Flow(total, *shape) for shape, total in sums.items() if total)


def _shape(
    demand: Demand, sides: list[dict[int, int]], node: Integers, nic: Integers
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    owners = [sides[0][r] for r in demand.owners]
    receivers = [sides[1][r] for r in demand.receivers]
    homes = {int(node[o]) for o in owners}
    starts = {int(nic[o]) for o in owners}
    entries: dict[int, set[int]] = {}
    for receiver in receivers:
        if int(node[receiver]) in homes:
            starts.add(int(nic[receiver]))
        else:
            entries.setdefault(int(node[receiver]), set()).add(int(nic[receiver]))
    relays = set().union(*entries.values()) if len(entries) > 1 else set()
    return (
        tuple(sorted(starts)),
        tuple(sorted(relays)),
        tuple(sorted(tuple(sorted(e)) for e in entries.values())),
    )


def _simple_bytes(flows: Iterable[_Flow], nics: int) -> float:
    """The most bytes that some NIC must send or receive, from sums: what has no other NIC to go
    through, and the average over all NICs that can take part."""
    receives = np.zeros(nics)
    sends = np.zeros(nics)
    total = 0.0
    senders: set[int] = set()
    for flow in flows:
        for entry in flow.entries:
            if len(entry) == 1:
                receives[entry[0]] += flow.bytes
        if len(flow.starts) == 1:
            sends[flow.starts[0]] += flow.bytes
        total += flow.bytes * len(flow.entries)
        senders.update(flow.starts, flow.relays)
    average = total / len(senders) if senders else 0.0
    return float(max(receives.max(initial=0), sends.max(initial=0), average))


def _program(flows: list[_Flow], nics: int) -> _Program:
    """Rows 0..nics-1: what each NIC sends; then what each receives; then the flows' needs. Columns:
    bytes that a NIC sends, or takes in, for a flow. What leaves no choice is a constant."""
    cells: list[tuple[int, int]] = []
    needed = [0.0] * (2 * nics)
    column = 0
    for flow in flows:
        if len(flow.starts) == len(flow.entries) == 1:
            needed[flow.starts[0]] -= flow.bytes
        else:
            first_row, every_row = len(needed), len(needed) + 1
            needed += [flow.bytes, flow.bytes * len(flow.entries)]
            for nic in flow.starts:
                cells += [(nic, column), (first_row, column), (every_row, column)]
                column += 1
            for nic in flow.relays:
                cells += [(nic, column), (every_row, column)]
                column += 1
        for entry in flow.entries:
            if len(entry) == 1:
                needed[nics + entry[0]] -= flow.bytes
                continue
            for nic in entry:
                cells += [(nics + nic, column), (len(needed), column)]
                column += 1
            needed.append(flow.bytes)
    rows = np.array([cell[0] for cell in cells], dtype=np.int64)
    columns = np.array([cell[1] for cell in cells], dtype=np.int64)
    values = np.ones(len(cells))
    capacity = np.arange(len(needed)) < 2 * nics
    return _Program(rows, columns, values, np.array(needed), capacity, column)


def _merge_alike(program: _Program) -> _Program:
    """The same optimum with one row and one column for each class of rows and columns that are
    alike: equal needs, and equally many cells with each class of the other kind (the coarsest
    equitable partition: Grohe, Kersting, Mladenov, Selman, "Dimension Reduction via Colour
    Refinement", 2014). The average over a class of any solution is again a solution."""
    _, row_class = np.unique(
        np.stack([program.needed, program.capacity]), axis=1, return_inverse=True
    )
    column_class = np.zeros(program.width, dtype=np.int64)
    seen = (0, 0)
    while seen != (seen := (len(np.unique(row_class)), len(np.unique(column_class)))):
        column_class = _refine(column_class, program.columns, row_class[program.rows])
        row_class = _refine(row_class, program.rows, column_class[program.columns])
    # One row stands for its class; in it the columns of a class add up to one.
    leader = np.unique(row_class, return_index=True)[1]
    kept = np.isin(program.rows, leader)
    cells = np.stack([row_class[program.rows[kept]], column_class[program.columns[kept]]])
    pairs, which = np.unique(cells, axis=1, return_inverse=True)
    values = np.bincount(which, weights=program.values[kept]).astype(np.float64)
    return _Program(
        pairs[0], pairs[1], values, program.needed[leader], program.capacity[leader], seen[1]
    )


def _refine(classes: Integers, items: Integers, neighbours: Integers) -> Integers:
    """New classes: the old, split by the multiset of the neighbours' classes."""
    # A multiset is told by the sum of random words, one for each class: 2 x 64 bits of them.
    random = np.random.default_rng(neighbours.size)
    words = random.integers(1 << 63, size=(2, int(neighbours.max(initial=0)) + 1), dtype=np.uint64)
    sums = np.zeros((2, classes.size), dtype=np.uint64)
    for row in (0, 1):
        np.add.at(sums[row], items, words[row][neighbours])
    keys = np.stack([classes.astype(np.uint64), *sums])
    return np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _solve(program: _Program) -> float:
    """The smallest T, in bytes through one NIC."""
    try:
        from scipy.optimize import linprog
        from scipy.sparse import coo_array
    except ImportError as error:
        raise PlanError(
            "the bound of a route needs scipy (its linear-programme solver); pip install scipy"
        ) from error
    scale = float(np.abs(program.needed).max(initial=1.0)) or 1.0
    # As rows of A x <= b with T as the last column: needs are negated.
    sign = np.where(program.capacity, 1.0, -1.0)
    limits = np.flatnonzero(program.capacity)
    rows = np.concatenate([program.rows, limits])
    columns = np.concatenate([program.columns, np.full(limits.size, program.width)])
    values = np.concatenate([program.values * sign[program.rows], np.full(limits.size, -1.0)])
    shape = (program.needed.size, program.width + 1)
    limit = np.where(program.capacity, program.needed, -program.needed) / scale
    cost = np.zeros(program.width + 1)
    cost[-1] = 1.0
    solution = linprog(
        cost, A_ub=coo_array((values, (rows, columns)), shape=shape).tocsr(), b_ub=limit,
        bounds=(0, None), method="highs",
    )  # fmt: skip
    if solution.status != 0:
        raise PlanError(
            f"the linear programme of the bound, {program.width} variables over demands of "
            f"{scale:.3g} bytes, was not solved: {solution.message}. Look at the demands' sizes"
        )
    return float(solution.fun) * scale


__all__ = ["Bound", "bound"]
