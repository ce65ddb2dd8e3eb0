"""Demands of a Kimi-K2-shaped model, by arithmetic: what moves from a trainer's ranks to an
engine's, without layouts. bfloat16; layers are turns."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from kimisys.reshard import Demand

HIDDEN, EXPERTS, WIDTH, DENSE_WIDTH = 7168, 384, 2048, 18432
HEADS, VOCABULARY, LAYERS = 64, 163840, 61
Q_RANK, KV_RANK, ROPE, NOPE, VALUE = 1536, 512, 64, 128, 128


@dataclass(frozen=True)
class Trainer:
    """Ranks by pipeline stage, data, tensor; experts over all ranks of a stage."""

    stages: tuple[int, ...] = (7, 8, 8, 8, 8, 8, 8, 6)  # layers of each
    data: int = 4
    tensor: int = 8

    @property
    def ranks(self) -> int:
        return len(self.stages) * self.data * self.tensor


@dataclass(frozen=True)
class Engine:
    """`copies` groups of `tensor` ranks, each with the whole attention; how experts lie: "whole"
    (over all ranks), "sliced" (every expert over all ranks), "replicas" (over each group)."""

    experts: str = "whole"
    tensor: int = 16
    copies: int = 8

    @property
    def ranks(self) -> int:
        return self.tensor * self.copies


class Collector:
    def __init__(self) -> None:
        self.pieces: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[int, int]] = {}
        self.copies: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = defaultdict(int)

    def add(
        self, owners: tuple[int, ...], receivers: tuple[int, ...], turn: int, elements: int
    ) -> None:
        key = (owners, receivers)
        by_turn = self.pieces.setdefault(key, defaultdict(int))
        by_turn[turn] += 2 * elements
        self.copies[key] += 1

    def demands(self) -> list[Demand]:
        return [
            Demand(owners, receivers, sorted(by_turn.items()), self.copies[owners, receivers])
            for (owners, receivers), by_turn in self.pieces.items()
        ]


def demands(trainer: Trainer, engine: Engine) -> list[Demand]:
    """Turns are layer * 1000 + the number of the expert, or 0 for what comes before the experts."""
    made = Collector()
    width = trainer.data * trainer.tensor
    owner_of_layer = [stage for stage, count in enumerate(trainer.stages) for _ in range(count)]

    def shard(stage: int, layer: int, elements: int) -> None:
        """A parameter that both sides cut over their tensor ranks, the engine finer or alike."""
        for t in range(engine.tensor):
            holder = t * trainer.tensor // engine.tensor
            owners = tuple(stage * width + d * trainer.tensor + holder for d in range(trainer.data))
            receivers = tuple(c * engine.tensor + t for c in range(engine.copies))
            made.add(owners, receivers, layer * 1000, elements // engine.tensor)

    everyone = tuple(range(engine.ranks))
    for layer, stage in enumerate(owner_of_layer):
        stage_ranks = tuple(range(stage * width, (stage + 1) * width))
        replicated = HIDDEN * (Q_RANK + KV_RANK + ROPE + 2) + (EXPERTS * HIDDEN if layer else 0)
        made.add(stage_ranks, everyone, layer * 1000, replicated)
        attention = HEADS * ((NOPE + ROPE) * Q_RANK + (NOPE + VALUE) * KV_RANK + VALUE * HIDDEN)
        dense = 3 * HIDDEN * (WIDTH if layer else DENSE_WIDTH)
        shard(stage, layer, attention + dense)
        if layer:
            experts(made, trainer, engine, layer, stage)
    shard(0, 0, VOCABULARY * HIDDEN)
    shard(len(trainer.stages) - 1, LAYERS, VOCABULARY * HIDDEN)
    return made.demands()


def experts(made: Collector, trainer: Trainer, engine: Engine, layer: int, stage: int) -> None:
    width = trainer.data * trainer.tensor
    held = EXPERTS // width
    elements = 3 * HIDDEN * WIDTH
    for place in range(width):
        owners = (stage * width + place,)
        turn = layer * 1000 + 1 + place * held
        if engine.experts == "whole":
            for expert in range(place * held, (place + 1) * held):
                receiver = expert * engine.ranks // EXPERTS
                made.add(owners, (receiver,), layer * 1000 + 1 + expert, elements)
        elif engine.experts == "sliced":
            for receiver in range(engine.ranks):
                made.add(owners, (receiver,), turn, held * elements // engine.ranks)
        else:
            for t in range(engine.tensor):
                receivers = tuple(c * engine.tensor + t for c in range(engine.copies))
                made.add(owners, receivers, turn, held * elements // engine.tensor)
