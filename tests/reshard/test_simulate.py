from __future__ import annotations

import naive_simulation
import numpy as np
import pytest
from hypothesis import given
from route_worlds import routes, rows

from kimisys.errors import PlanError
from kimisys.reshard import Demand, Place, Route, route_demands


@given(routes())
def test_the_planned_order_is_that_of_the_naive_simulation(route: Route) -> None:
    made = rows(route.simulate("planned"))
    assert made == naive_simulation.planned(route)


@given(routes())
def test_the_natural_order_is_that_of_the_naive_simulation(route: Route) -> None:
    made = rows(route.simulate("natural"))
    assert made == naive_simulation.natural(route)


@pytest.mark.parametrize("order", ["planned", "natural"])
@given(route=routes())
def test_nobody_does_two_things_at_once_or_sends_what_he_lacks(order: str, route: Route) -> None:
    simulation = route.simulate(order)
    hops, nic = route.hops(), route.endpoints()["nic"].tolist()
    made = rows(simulation)
    for end in (2, 3):
        busy: dict[int, float] = {}
        total: dict[int, float] = {}
        for row in sorted(made):
            assert row[0] >= busy.get(nic[row[end]], 0.0)
            busy[nic[row[end]]] = row[1]
            total[nic[row[end]]] = total.get(nic[row[end]], 0.0) + row[1] - row[0]
        seconds = simulation.send_seconds if end == 2 else simulation.receive_seconds
        assert {n: s for n, s in enumerate(seconds.tolist()) if s} == {
            n: s for n, s in total.items() if s
        }
    finished: dict[tuple[int, int], float] = {}
    for row in made:
        assert 0 < row[4] <= route.chunk
        assert row[1] - row[0] == route.message_seconds + row[4] / route.nic_bandwidth
        for hop in row[5]:
            finished[int(hops["part"][hop]), row[3]] = row[1]
    carried = {hop for row in made for hop in row[5]}
    assert carried == {h for h in range(len(hops["local"])) if not hops["local"][h]}
    assert sum(row[4] for row in made) == route.remote_bytes
    assert simulation.seconds == max((row[1] for row in made), default=0.0)
    assert simulation.message_count == len(made)
    if order == "planned":  # in the natural order a part may be passed on piece by piece
        for row in made:
            for hop in row[5]:
                assert finished.get((int(hops["part"][hop]), row[2]), 0.0) <= row[0]


def chain(sizes: list[int], chunk: int, relay: bool = True, seconds: float = 0.0) -> Route:
    """One owner, two receivers, each on a node of its own; one byte takes one second."""
    return route_demands(
        [Demand([0], [0, 1], [(i, size)]) for i, size in enumerate(sizes)],
        [Place(0, 0, 0, 0)],
        [Place(0, 1, 0, 0), Place(1, 2, 0, 0)],
        nic_bandwidth=1.0,
        message_seconds=seconds,
        chunk=chunk,
        relay=relay,
    )


def test_a_relay_passes_on_message_by_message() -> None:
    # Two receivers of 100 bytes from one NIC: 200 seconds. Each message that one gets, it passes on
    # while the next comes.
    assert chain([100], 10, relay=False).simulate().seconds == 200
    assert chain([100], 10).simulate().seconds == pytest.approx(110, abs=10)
    # A message costs its time whatever its size, and packs what fits.
    assert chain([4, 4], 8, relay=False, seconds=3.0).simulate().seconds == 2 * (3 + 8)
    assert chain([4, 4], 4, relay=False, seconds=3.0).simulate().seconds == 4 * (3 + 4)


def test_staging_is_the_window() -> None:
    route = chain([100], 10, relay=False)
    assert route.simulate(window=1).staging_bytes.tolist() == [10, 10, 10]
    assert route.simulate().staging_bytes.tolist() == [20, 20, 20]
    assert route.simulate(window=50).staging_bytes.tolist() == [200, 100, 100]
    assert chain([100], 1000, relay=False).simulate(window=3).staging_bytes.tolist() == [
        200, 100, 100,
    ]  # fmt: skip


def test_what_it_prints_and_refuses() -> None:
    route = chain([100], 10, relay=False)
    assert repr(route.simulate()) == (
        "Simulation(200 s, 20 messages; a NIC is busy for at most 200 s sending and 100 s "
        "receiving; staging at most 20 bytes on a rank)"
    )
    with pytest.raises(PlanError, match=r"unknown order 'random'; .* 'planned' and 'natural'"):
        route.simulate("random")
    with pytest.raises(PlanError, match="window is 0 messages"):
        route.simulate(window=0)
    empty = route_demands([], [], [])
    assert empty.simulate().seconds == empty.simulate("natural").seconds == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_rounds_of_many_messages_are_those_of_the_naive_simulation(seed: int) -> None:
    # Parts of one size: twenty NICs come free together, again and again.
    random = np.random.default_rng(seed)
    ranks = 20
    wanted = [
        Demand(
            sorted(random.choice(ranks, 3, replace=False).tolist()),
            sorted(random.choice(ranks, 4, replace=False).tolist()),
            [(0, 8)],
        )
        for _ in range(30)
    ]
    source = [Place(r, r, 0, 0) for r in range(ranks)]
    destination = [Place(r, ranks + r, 0, 0) for r in range(ranks)]
    made = route_demands(wanted, source, destination, 1.0, 0.5, 8, relay=seed % 2 == 0)
    assert rows(made.simulate()) == naive_simulation.planned(made)
    assert rows(made.simulate("natural")) == naive_simulation.natural(made)
