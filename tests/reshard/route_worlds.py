"""Random clusters and demands, and what simulated messages look like as rows."""

from __future__ import annotations

from hypothesis import strategies as st

from kimisys.reshard import Demand, Place, Route, Simulation, route_demands


@st.composite
def places(draw: st.DrawFn, ranks: int, nodes: int) -> list[Place]:
    """Ranks on any of the nodes, some of them on one device or NIC; both sides may share nodes."""
    return [
        Place(
            rank,
            draw(st.integers(0, nodes - 1)),
            draw(st.integers(0, 1)),
            draw(st.integers(0, 1)),
        )
        for rank in range(ranks)
    ]


@st.composite
def demands(draw: st.DrawFn, sources: int, destinations: int, count: int) -> list[Demand]:
    made = []
    for _ in range(draw(st.integers(0, count))):
        owners = draw(st.sets(st.integers(0, sources - 1), min_size=1))
        receivers = draw(st.sets(st.integers(0, destinations - 1), min_size=1))
        pieces = draw(
            st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=3)
        )
        made.append(Demand(sorted(owners), sorted(receivers), sorted(pieces)))
    return made


@st.composite
def routes(draw: st.DrawFn, ranks: int = 5, count: int = 5, relay: bool | None = None) -> Route:
    """Times are powers of two, so that sums of them are exact."""
    sources, destinations = draw(st.integers(1, ranks)), draw(st.integers(1, ranks))
    nodes = draw(st.integers(1, 6))
    return route_demands(
        draw(demands(sources, destinations, count)),
        draw(places(sources, nodes)),
        draw(places(destinations, nodes)),
        nic_bandwidth=4.0,
        message_seconds=draw(st.sampled_from([0.0, 0.5])),
        chunk=draw(st.sampled_from([1, 5, 16, 100])),
        relay=draw(st.booleans()) if relay is None else relay,
    )


def rows(simulation: Simulation) -> list[tuple[float, float, int, int, int, tuple[int, ...]]]:
    table = simulation.messages()
    items = simulation.items().tolist()
    ends = [*table["first_item"].tolist(), len(items)][1:]
    return [
        (start, end, sender, receiver, size, tuple(items[first:last]))
        for start, end, sender, receiver, size, first, last in zip(
            *(table[k].tolist() for k in ("start", "end", "sender", "receiver", "bytes")),
            table["first_item"].tolist(),
            ends,
            strict=True,
        )
    ]
