"""The time model of routes, as plainly as its definition reads: no index, no queue is kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from kimisys.reshard import Route

Row = tuple[
    float, float, int, int, int, tuple[int, ...]
]  # start, end, sender, receiver, bytes, hops


@dataclass
class World:
    """A route's tables as lists, and what both simulations need of them."""

    route: Route
    server: list[int] = field(init=False)
    receiver: list[int] = field(init=False)
    size: list[int] = field(init=False)
    part: list[int] = field(init=False)
    local: list[bool] = field(init=False)
    nic: list[int] = field(init=False)

    def __post_init__(self) -> None:
        hops = self.route.hops()
        self.server, self.receiver = hops["server"].tolist(), hops["receiver"].tolist()
        self.size, self.part = hops["bytes"].tolist(), hops["part"].tolist()
        self.local = hops["local"].tolist()
        self.nic = self.route.endpoints()["nic"].tolist()

    def parent(self, hop: int) -> int | None:
        """The hop that brings the part to this hop's server."""
        same = [
            h
            for h in range(len(self.part))
            if self.part[h] == self.part[hop] and self.receiver[h] == self.server[hop]
        ]
        return same[0] if same else None

    def duration(self, size: int) -> float:
        return self.route.message_seconds + size / self.route.nic_bandwidth


def planned(route: Route) -> list[Row]:
    world = World(route)
    hops = range(len(world.part))
    parents = [world.parent(h) for h in hops]
    children = [[c for c in hops if parents[c] == h] for h in hops]
    pairs = list(
        dict.fromkeys((world.server[h], world.receiver[h]) for h in hops if not world.local[h])
    )
    ready: list[int] = []  # in the order in which they became so
    begun: set[int] = set()
    done: list[Row] = []
    now = 0.0

    def begin(hop: int) -> None:
        if not world.local[hop]:
            ready.append(hop)
            return
        for child in children[hop]:
            begin(child)

    def end_key(nic: int, receiving: bool) -> tuple[int, bool, int]:
        who = world.receiver if receiving else world.server
        left = sum(
            world.size[h]
            for h in hops
            if not world.local[h] and h not in begun and world.nic[who[h]] == nic
        )
        return (-left, receiving, nic)

    def free(nic: int, receiving: bool) -> bool:
        column = 3 if receiving else 2
        return all(row[1] <= now or world.nic[row[column]] != nic for row in done)

    def start_one() -> bool:
        candidates = []
        for number, (sender, receiver) in enumerate(pairs):
            waiting = [
                h for h in ready if (world.server[h], world.receiver[h]) == (sender, receiver)
            ]
            out, into = world.nic[sender], world.nic[receiver]
            if waiting and free(out, False) and free(into, True):
                keys = sorted([end_key(out, False), end_key(into, True)])
                candidates.append((keys, number, waiting))
        if not candidates:
            return False
        _, number, waiting = min(candidates)
        taken: list[int] = []
        for group in (
            [h for h in waiting if children[h]],
            [h for h in waiting if not children[h]],
        ):
            for hop in group:
                if sum(world.size[h] for h in [*taken, hop]) > route.chunk:
                    break
                taken.append(hop)
        for hop in taken:
            ready.remove(hop)
            begun.add(hop)
        size = sum(world.size[h] for h in taken)
        done.append((now, now + world.duration(size), *pairs[number], size, tuple(taken)))
        return True

    for hop in hops:
        if parents[hop] is None:
            begin(hop)
    while True:
        while start_one():
            pass
        later = [row[1] for row in done if row[1] > now]
        if not later:
            return done
        now = min(later)
        for row in done:
            if row[1] == now:
                for hop in row[5]:
                    for child in children[hop]:
                        begin(child)


def natural(route: Route) -> list[Row]:
    world = World(route)
    parents = [world.parent(h) for h in range(len(world.part))]
    wanted: dict[int, list[tuple[int, int, int, int, int]]] = {}
    begins, demands = route.hops()["begin"].tolist(), route.hops()["demand"].tolist()
    for hop in range(len(world.part)):
        position, slice_ = 0, 0
        for turn, size in route.demands[demands[hop]].pieces:
            first = max(position, begins[hop])
            last = min(position + size, begins[hop] + world.size[hop])
            position += size
            if first < last:
                if not world.local[hop]:
                    item = (turn, world.part[hop], slice_, hop, last - first)
                    wanted.setdefault(world.nic[world.receiver[hop]], []).append(item)
                slice_ += 1
    for items in wanted.values():
        items.sort()
    arrived = dict.fromkeys(range(len(world.part)), 0)
    queue: list[tuple[float, int]] = []  # when asked, by which receiving NIC
    idle = set(wanted)
    done: list[Row] = []
    now = 0.0

    def available(item: tuple[int, int, int, int, int]) -> bool:
        origin = parents[item[3]]
        while origin is not None and world.local[origin]:
            origin = parents[origin]
        return origin is None or arrived[origin] > item[2]

    def sender_nic(receiver: int) -> int:
        return world.nic[world.server[wanted[receiver][0][3]]]

    while True:
        for receiver in sorted(idle):
            if wanted[receiver] and available(wanted[receiver][0]):
                queue.append((now, receiver))
                idle.remove(receiver)
        order = sorted(queue, key=lambda entry: (sender_nic(entry[1]), entry))
        for asked, receiver in order:
            sender = sender_nic(receiver)
            if any(row[1] > now and world.nic[row[2]] == sender for row in done):
                continue
            queue.remove((asked, receiver))
            head = wanted[receiver][0][3]
            taken: list[int] = []
            size = 0
            while wanted[receiver]:
                item = wanted[receiver][0]
                ends = (world.server[item[3]], world.receiver[item[3]])
                if (
                    size + item[4] > route.chunk
                    or ends != (world.server[head], world.receiver[head])
                    or not available(item)
                ):
                    break
                taken.append(wanted[receiver].pop(0)[3])
                size += item[4]
            ends = (world.server[head], world.receiver[head])
            done.append((now, now + world.duration(size), *ends, size, tuple(taken)))
        later = [row[1] for row in done if row[1] > now]
        if not later:
            return done
        now = min(later)
        for row in done:
            if row[1] == now:
                for hop in row[5]:
                    arrived[hop] += 1
                idle.add(world.nic[row[3]])
