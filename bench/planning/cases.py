"""The cases: routed experts beside two peers, and the whole model by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.harness import Case
from bench.planning import megatron_peer, mooncake_peer
from bench.planning.experts import ExpertPlacement, Traffic, traffic_of
from kimisys.reshard import plan

MOONCAKE_ROUNDS = 2  # about a minute each


class Kept:
    """What the last call of something made."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.made: Any = None

    def __call__(self) -> None:
        self.made = self.make()


def experts(placement: ExpertPlacement, name: str = "Kimi-K2's experts") -> Iterator[Case]:
    """Plan and proof of expert layers, from layouts that are there, and with making them."""
    copies = placement.layers * placement.experts * 3
    title = (
        f"{name}, EP{placement.source_expert_ranks} x PP{placement.source_stages} → "
        f"EP{placement.destination_ranks}, {copies:,} copies"
    )
    expected = placement.traffic()
    sides = placement.layouts()
    manifests = Kept(lambda: mooncake_peer.manifests(placement))
    manifests()
    given = megatron_peer.setting(placement)
    ours = Kept(lambda: plan(*sides))
    mooncake = Kept(lambda: mooncake_peer.planned(*manifests.made))
    megatron = Kept(lambda: megatron_peer.planned(given))

    def of_mooncake() -> Traffic:
        return mooncake_peer.traffic_of(mooncake.made, placement.source_expert_ranks)

    def of_megatron() -> Traffic:
        return megatron_peer.traffic_of(megatron.made, given)

    yield Case(
        f"{title}: plan + proof",
        ours,
        {"mooncake.reshard": mooncake, "megatron.core (no proof)": megatron},
        lambda: ours.made.proof.copies == copies and traffic_of(ours.made) == expected,
        peer_rounds={"mooncake.reshard": MOONCAKE_ROUNDS},
        agree=lambda: of_mooncake() == expected == of_megatron(),
    )
    ours = Kept(lambda: plan(*placement.layouts()))
    mooncake = Kept(lambda: mooncake_peer.planned(*mooncake_peer.manifests(placement)))
    yield Case(
        f"{title}: layouts + plan + proof",
        ours,
        {"mooncake.reshard": mooncake},
        lambda: traffic_of(ours.made) == expected,
        peer_rounds={"mooncake.reshard": MOONCAKE_ROUNDS},
        agree=lambda: of_mooncake() == expected,
    )


def cases() -> Iterator[Case]:
    """What `python -m bench reshard` runs beside the copies."""
    yield from experts(ExpertPlacement())
