from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from route_worlds import demands, places, routes, rows
from sample_layouts import (
    CASTS,
    ITEMSIZE,
    Buffers,
    allocate,
    cast_bits,
    elements,
    expected,
    layouts,
    random_bits,
    shapes,
    sharded,
    unsigned,
)
from symbolic_worlds import worlds

from kimisys.errors import LayoutError, PlanError
from kimisys.reshard import (
    Demand,
    Layout,
    Place,
    Route,
    SymbolicLayout,
    Tensor,
    plan,
    route,
    route_demands,
    symbolic_plan,
)

Key = tuple[tuple[int, ...], tuple[int, ...]]
Element = tuple[str, tuple[int, ...]]


@st.composite
def replicated_pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """Both sides may hold elements several times, on ranks of three nodes that they share."""
    table = draw(st.lists(st.tuples(shapes, st.sampled_from(CASTS)), min_size=1, max_size=2))
    sides = []
    for side in (0, 1):
        tensors = [Tensor(f"t{i}", casts[side], shape) for i, (shape, casts) in enumerate(table)]
        made = draw(layouts(tensors, True))
        where = draw(places(3, 3))
        sides.append(Layout(made.tensors, made.buffers, made.fragments, made.padding, where))
    return sides[0], sides[1]


def held(layout: Layout) -> dict[Element, dict[int, list[tuple[str, int]]]]:
    """For each element the ranks that store it, and there each (buffer, byte)."""
    found: dict[Element, dict[int, list[tuple[str, int]]]] = defaultdict(lambda: defaultdict(list))
    for fragment in layout.fragments:
        for place, byte in elements(fragment):
            found[fragment.tensor, place][fragment.rank].append((fragment.buffer, byte))
    return found


def wanted_by(source: Layout, destination: Layout) -> dict[Key, list[Element]]:
    """The elements of each demand: tensors as they come at the destination, then flat index."""
    order: dict[str, int] = {}
    for number, fragment in enumerate(destination.fragments):
        order.setdefault(fragment.tensor, number)
    owners, receivers = held(source), held(destination)
    found: dict[Key, list[Element]] = defaultdict(list)
    for element in sorted(receivers, key=lambda e: (order[e[0]], e[1])):
        key = (tuple(sorted(owners[element])), tuple(sorted(receivers[element])))
        found[key].append(element)
    return found


@settings(deadline=None)
@given(replicated_pairs())
def test_demands_are_those_of_the_elements(pair: tuple[Layout, Layout]) -> None:
    source, destination = pair
    size = {tensor.name: ITEMSIZE[tensor.dtype] for tensor in destination.tensors}
    made = route(plan(source, destination)).demands
    naive = {
        key: sum(size[name] for name, _ in found)
        for key, found in wanted_by(source, destination).items()
    }
    assert {(d.owners, d.receivers): d.bytes for d in made} == naive
    assert len(made) == len(naive)


@settings(deadline=None)
@given(worlds())
def test_a_symbolic_plan_has_the_demands_of_the_concrete_one(
    world: tuple[SymbolicLayout, SymbolicLayout],
) -> None:
    symbolic = route(symbolic_plan(*world))
    concrete = route(plan(world[0].concrete(), world[1].concrete()))
    sums = [
        {(d.owners, d.receivers): (d.bytes, d.copies) for d in r.demands}
        for r in (symbolic, concrete)
    ]
    assert sums[0] == sums[1]
    assert standing(concrete) <= standing(symbolic)  # which may have ranks without buffers


def standing(made: Route) -> set[tuple[int, ...]]:
    """(side, rank, node, device, NIC of the node) of each endpoint."""
    ends, card = made.endpoints(), made.nics()["nic"]
    columns = [ends[k].tolist() for k in ("destination", "rank", "node", "device")]
    return set(zip(*columns, card[ends["nic"]].tolist(), strict=True))


def run_routed(made: Route, source: Layout, destination: Layout, sources: Buffers) -> Buffers:
    """Hop by hop in the planned order: an element is read when its message starts, from a rank that
    must have it by then, and written when the message ends."""
    filled = allocate(destination, 7)
    owners, receivers = held(source), held(destination)
    dtypes = [{t.name: t.dtype for t in side.tensors} for side in (source, destination)]
    parts: dict[int, list[Element]] = defaultdict(list)
    hops, ends = made.hops(), made.endpoints()
    by_key = wanted_by(source, destination)
    for number, demand in enumerate(made.demands):
        mine = np.flatnonzero(hops["demand"] == number)
        begins = {int(hops["begin"][h]): int(hops["part"][h]) for h in mine}
        byte = 0
        for element in by_key[demand.owners, demand.receivers]:
            first = max(begin for begin in begins if begin <= byte)
            parts[begins[first]].append(element)
            byte += ITEMSIZE[dtypes[1][element[0]]]
    has: set[tuple[Element, int]] = set()

    def read(hop: int) -> list[bytes]:
        server = int(hops["server"][hop])
        rank = int(ends["rank"][server])
        values = []
        for element in parts[int(hops["part"][hop])]:
            to_peer = bool(ends["destination"][server])
            assert not to_peer or (element, rank) in has, "a peer sends what it does not have"
            buffer, byte = (receivers if to_peer else owners)[element][rank][0]
            dtype = dtypes[to_peer][element[0]]
            raw = (filled if to_peer else sources)[rank, buffer][byte : byte + ITEMSIZE[dtype]]
            bits = raw.view(unsigned(dtype))
            values.append(cast_bits(bits, dtype, dtypes[1][element[0]]).tobytes())
        return values

    def write(hop: int, values: list[bytes]) -> None:
        rank = int(ends["rank"][hops["receiver"][hop]])
        for element, raw in zip(parts[int(hops["part"][hop])], values, strict=True):
            for buffer, byte in receivers[element][rank]:
                filled[rank, buffer][byte : byte + len(raw)] = np.frombuffer(raw, np.uint8)
            has.add((element, rank))
        same_part = np.flatnonzero((hops["part"] == hops["part"][hop]) & hops["local"])
        for other in same_part:
            if hops["server"][other] == hops["receiver"][hop]:
                write(int(other), read(int(other)))

    for hop in np.flatnonzero(hops["local"]):
        if not ends["destination"][hops["server"][hop]]:
            write(int(hop), read(int(hop)))
    events: list[tuple[float, int, int]] = []
    messages = rows(made.simulate())
    for number, row in enumerate(messages):
        events += [(row[0], 1, number), (row[1], 0, number)]
    flying: dict[int, list[list[bytes]]] = {}
    for _, starts, number in sorted(events):
        carried = messages[number][5]
        if starts:
            flying[number] = [read(hop) for hop in carried]
            continue
        for hop, values in zip(carried, flying.pop(number), strict=True):
            write(hop, values)
    for padding in destination.padding:
        start = padding.byte_offset
        filled[padding.rank, padding.buffer][start : start + padding.nbytes] = 0
    return filled


@settings(deadline=None)
@given(replicated_pairs(), st.sampled_from([1, 4, 30]), st.booleans())
def test_hops_in_their_order_fill_the_destination_like_the_plan(
    pair: tuple[Layout, Layout], chunk: int, relay: bool
) -> None:
    source, destination = pair
    sources = expected(source, random_bits(list(source.tensors), 0))
    direct = allocate(destination, 3)
    made = plan(source, destination)
    made.execute(sources, direct, threads=1)
    routed = run_routed(route(made, chunk=chunk, relay=relay), source, destination, sources)
    for key, bytes_ in direct.items():
        np.testing.assert_array_equal(routed[key], bytes_, str(key))


@settings(deadline=None)
@given(routes(ranks=6))
def test_parts_tile_demands_and_come_from_an_owner(made: Route) -> None:
    hops, ends = made.hops(), made.endpoints()
    end_of = {
        (bool(ends["destination"][e]), int(ends["rank"][e])): e for e in range(len(ends["rank"]))
    }
    egress, ingress = np.zeros((2, len(made.nics()["nic"])), np.int64)
    numbers = np.arange(len(hops["part"]))
    for number, demand in enumerate(made.demands):
        mine = numbers[hops["demand"] == number]
        owners = {end_of[False, r] for r in demand.owners}
        receivers = [end_of[True, r] for r in demand.receivers]
        position = 0
        for part in dict.fromkeys(hops["part"][mine].tolist()):
            of_part = mine[hops["part"][mine] == part]
            assert hops["receiver"][of_part].tolist() == receivers
            [begin], [size] = (
                set(hops["begin"][of_part].tolist()),
                set(hops["bytes"][of_part].tolist()),
            )
            assert begin == position and 0 < size <= made.chunk
            position += size
            server = dict(zip(receivers, hops["server"][of_part].tolist(), strict=True))
            for receiver in receivers:
                seen = [receiver]
                while seen[-1] not in owners:
                    assert made.relay or len(seen) == 1
                    seen.append(server[seen[-1]])
                    assert len(seen) <= len(receivers) + 1, "a part runs in a circle"
        assert position == demand.bytes
    local = ends["node"][hops["server"]] == ends["node"][hops["receiver"]]
    np.testing.assert_array_equal(hops["local"], local)
    np.add.at(egress, ends["nic"][hops["server"][~local]], hops["bytes"][~local])
    np.add.at(ingress, ends["nic"][hops["receiver"][~local]], hops["bytes"][~local])
    np.testing.assert_array_equal(egress, made.nics()["egress_bytes"])
    np.testing.assert_array_equal(ingress, made.nics()["ingress_bytes"])
    assert made.remote_bytes == egress.sum() and made.local_bytes == hops["bytes"][local].sum()
    by_peers = ~local & ends["destination"][hops["server"]]
    assert made.relayed_bytes == hops["bytes"][by_peers].sum()
    traffic = made.traffic()
    pairs = defaultdict(int)
    for server, receiver, size in zip(hops["server"], hops["receiver"], hops["bytes"], strict=True):
        pairs[int(server), int(receiver)] += int(size)
    rows_of = zip(*(traffic[k].tolist() for k in ("server", "receiver", "bytes")), strict=True)
    assert [(a, b, size) for a, b, size in rows_of] == [(*k, v) for k, v in sorted(pairs.items())]


@given(st.data())
def test_a_node_that_an_owner_is_on_uses_no_nic_and_others_take_in_once(
    data: st.DataObject,
) -> None:
    wanted = data.draw(demands(4, 4, 4))
    source, destination = data.draw(places(4, 3)), data.draw(places(4, 3))
    made = route_demands(wanted, source, destination)
    node = [{p.rank: p.node for p in side} for side in (source, destination)]
    needed = 0
    for demand in wanted:
        homes = {node[0][r] for r in demand.owners}
        needed += demand.bytes * len({node[1][r] for r in demand.receivers} - homes)
    assert made.remote_bytes == needed


def test_the_same_device_comes_first_then_the_same_node() -> None:
    source = [Place(0, 0, 0, 0), Place(1, 0, 1, 1), Place(2, 5, 0, 0)]
    destination = [Place(0, 0, 1, 1), Place(1, 0, 2, 2), Place(2, 6, 0, 0)]
    made = route_demands([Demand([0, 1, 2], [0, 1, 2], [(0, 60)])], source, destination, chunk=20)
    hops = made.hops()
    assert hops["server"][hops["receiver"] == 3].tolist() == [1, 1, 1]  # its own device
    assert hops["server"][hops["receiver"] == 4].tolist() == [0, 0, 0]  # the node's first
    # Owners' NICs (two of node 0, one of node 5) share what leaves them.
    assert sorted(hops["server"][hops["receiver"] == 5].tolist()) == [0, 1, 2]
    assert (made.local_bytes, made.remote_bytes, made.relayed_bytes) == (120, 60, 0)


def test_relay_takes_the_load_from_a_single_owner() -> None:
    source = [Place(0, 0, 0, 0)]
    destination = [Place(r, 1 + r, 0, 0) for r in range(8)]
    demand = Demand([0], list(range(8)), [(0, 8000)])
    alone = route_demands([demand], source, destination, chunk=100, relay=False)
    shared = route_demands([demand], source, destination, chunk=100)
    assert alone.nics()["egress_bytes"].max() == 64000
    # 9 NICs send 64000 bytes, each of the eight takes in 8000: nobody need send more than that.
    assert shared.nics()["egress_bytes"].max() <= 8000
    assert shared.nics()["ingress_bytes"].max() == 8000
    assert repr(shared).startswith("Route(1 demands in 80 parts over 9 NICs: 64000 remote bytes")
    assert repr(demand) == (
        "Demand(8000 bytes in 1 copies: owners [0] -> receivers [0, 1, 2, 3, 4, 5, 6, 7])"
    )


def test_what_it_refuses() -> None:
    place = [Place(0, 0, 0, 0)]

    def refuse(match: str, *given: Demand, **options: float) -> None:
        with pytest.raises(PlanError, match=match):
            route_demands(list(given), place, place, **options)  # type: ignore[arg-type]

    refuse("0 owners", Demand([], [0], [(0, 1)]))
    refuse("0 receivers", Demand([0], [], [(0, 1)]))
    refuse("source rank 3 that has no place", Demand([3], [0], [(0, 1)]))
    refuse("destination rank 3 that has no place", Demand([0], [3], [(0, 1)]))
    refuse("not ascending", Demand([0, 0], [0], [(0, 1)]))
    refuse("piece of -1 bytes", Demand([0], [0], [(0, -1)]))
    refuse("piece of", Demand([0], [0], [(0, 2**50), (1, 2**50)]))
    refuse("not by turn", Demand([0], [0], [(1, 1), (0, 1)]))
    refuse("bandwidth is 0", nic_bandwidth=0)
    refuse("bandwidth is nan", nic_bandwidth=float("nan"))
    refuse("message takes -1", message_seconds=-1)
    refuse("largest message has 0 bytes", chunk=0)
    with pytest.raises(LayoutError, match="source rank 0 has two places"):
        route_demands([], place * 2, place)
    whole = plan(sharded("w", "int8", (4,), 0, 2), sharded("w", "int8", (4,), 0, 1))
    with pytest.raises(PlanError, match="share of source rank 1"):
        route(whole.of_source(1))
