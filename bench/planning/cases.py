"""The cases: routed experts beside two peers, and the whole model by itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.harness import Case
from bench.planning import megatron_peer, mooncake_peer
from bench.planning.experts import ExpertPlacement, Traffic, traffic_of
from bench.planning.whole import whole
from kimisys.reshard import plan

MOONCAKE = "mooncake.reshard"  # over a minute for each plan of 69,120 copies: one round
MEGATRON = "megatron.core (no proof)"


class Kept:
    """What the last call of something made."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.made: Any = None

    def __call__(self) -> None:
        self.made = self.make()


def experts(placement: ExpertPlacement, name: str = "Kimi-K2's experts") -> Iterator[Case]:
    """Plan and proof of expert layers, from layouts that are there, and with making them."""
    form = "stacked, " if placement.stacked else ""
    title = (
        f"{name}, {form}EP{placement.source_expert_ranks} x PP{placement.source_stages} → "
        f"EP{placement.destination_ranks}, {placement.copies:,} copies"
    )
    rounds = {} if placement.stacked else {MOONCAKE: 1}
    expected = placement.traffic()
    sides, manifests = placement.layouts(), mooncake_peer.manifests(placement)
    ours = Kept(lambda: plan(*sides))
    peers = {MOONCAKE: Kept(lambda: mooncake_peer.planned(*manifests))}

    def of_mooncake(plan: Any) -> Traffic:
        return mooncake_peer.traffic_of(plan, placement.source_expert_ranks)

    def right() -> bool:
        return ours.made.proof.copies == placement.copies and traffic_of(ours.made) == expected

    def agree() -> bool:
        if MEGATRON in peers:
            theirs = megatron_peer.traffic_of(peers[MEGATRON].made, given)
            return of_mooncake(peers[MOONCAKE].made) == expected == theirs
        return of_mooncake(peers[MOONCAKE].made) == expected

    if not placement.stacked:  # megatron-core knows an expert by its parameter's name alone
        given = megatron_peer.setting(placement)
        peers[MEGATRON] = Kept(lambda: megatron_peer.planned(given))
    yield Case(f"{title}: plan + proof", ours, {**peers}, right, agree=agree, peer_rounds=rounds)
    both = Kept(lambda: plan(*placement.layouts()))
    theirs = Kept(lambda: mooncake_peer.planned(*mooncake_peer.manifests(placement)))
    yield Case(
        f"{title}: layouts + plan + proof",
        both,
        {MOONCAKE: theirs},
        lambda: traffic_of(both.made) == expected,
        agree=lambda: of_mooncake(theirs.made) == expected,
        peer_rounds=rounds,
    )


def whole_model() -> Iterator[Case]:
    """All of Kimi-K2 from 256 ranks to 128, and at twice and four times as many."""
    layout = "tp=8,pp=8,ep=32,etp=1,first=7,last=6"
    with tempfile.TemporaryDirectory() as folder:
        for i, infer in enumerate(("tp=16,dp=8,ep=on", "tp=16,dp=8,ep=off", "tp=16,replicas=8")):
            yield whole(Path(folder) / str(i), "kimi-k2", layout, infer)
        for times in (2, 4):
            train, infer = f"{layout},world={256 * times}", f"tp=16,dp=8,ep=on,replicas={times}"
            yield whole(Path(folder) / f"x{times}", "kimi-k2", train, infer, routed=False)


def cases() -> Iterator[Case]:
    """What `python -m bench reshard` runs beside the copies."""
    yield from experts(ExpertPlacement())
    yield from experts(ExpertPlacement(stacked=True))
    yield from whole_model()
