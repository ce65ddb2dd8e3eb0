"""The training side of a run: Megatron ranks, actors that train, score and publish together."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimisys.adapters.ray import Actors, share
from kimisys.broadcast import Publication, Subscriber, connect
from kimisys.reshard.safetensors import create_checkpoint
from kimisys.trainer.config import RunConfig
from kimisys.trainer.megatron_rank import MegatronRank, Place


@dataclass(frozen=True)
class Published:
    """One version, over all ranks. base: the version that its deltas change, None when a rank
    published everything anew. changed: of the elements."""

    version: int
    base: int | None
    elements: int
    changed: int

    @property
    def density(self) -> float | None:
        """The share of the elements that changed; None without a base."""
        return self.changed / self.elements if self.base is not None else None


class Ranks:
    """The ranks of `config`'s layout, actors among `actors`. sockets: a folder of mode 0700 for
    their publishers."""

    def __init__(
        self, actors: Actors, config: RunConfig, hf_config: Mapping[str, Any], sockets: Path
    ) -> None:
        self._actors, self._config, self._hf_config = actors, config, hf_config
        self._sockets = sockets
        self._names: list[str] = []

    @property
    def addresses(self) -> list[Path]:
        """Where the publishers listen, in rank order."""
        return [self._sockets / f"rank{rank}" for rank in range(len(self._names))]

    def start(self, folder: Path) -> None:
        """Start the ranks and load the weights of a Hugging Face folder into them by plan."""
        config = self._config
        address = ("127.0.0.1", _free_port())
        for rank in range(config.ranks):
            name = f"Megatron rank {rank}"
            place = Place(rank, config.tensor_parallel, config.pipeline_parallel, *address)
            self._actors.spawn(
                name,
                MegatronRank,
                {"OMP_NUM_THREADS": "1"},
                *(place, dict(self._hf_config), config.seed, config.ready_timeout),
                config.micro_batch_tokens,
            )
            self._names.append(name)
        self.call("load", str(folder))

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call `method` on every rank; their results in rank order."""
        shared = [share(argument) for argument in args]
        calls = {name: self._actors.begin(name, method, *shared) for name in self._names}
        return list(self._actors.wait(calls).values())

    def one(self, method: str, *args: Any) -> Any:
        """Call a `method` that has the same result on every rank; that result."""
        return self.call(method, *args)[0]

    def open_publishers(self) -> None:
        """Serve each rank's snapshot, in the wire dtype, at `addresses`."""
        snapshots = self.call("snapshot", self._config.wire_dtype)
        self.call("open_publisher", snapshots, str(self._sockets))

    def publish(self, version: int, full: bool = False) -> Published:
        """Publish the ranks' live weights as `version`, by deltas unless `full`."""
        parts: list[Publication] = self.call("publish", version, full)
        bases = {part.base for part in parts}
        return Published(
            version,
            bases.pop() if len(bases) == 1 else None,
            sum(part.elements for part in parts),
            sum(part.changed for part in parts),
        )

    def save_published(self, folder: Path, version: int, files: Mapping[str, str]) -> None:
        """Write the published `version` as a checkpoint folder, with the other `files`: pulled like
        an engine's, verified by digest."""
        timeout = self._config.ready_timeout
        with (
            connect(self.addresses, timeout_seconds=timeout) as peers,
            create_checkpoint(folder, peers.layout.tensors, files) as checkpoint,
        ):
            Subscriber(peers, checkpoint.layout, rank=0).pull(version, checkpoint.buffers)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
