"""The processes of a run: Megatron ranks and one engine, Ray actors that end together."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimisys.adapters.ray import kill, share, signals_deferred, spawn, wait
from kimisys.adapters.vllm.engine import EngineConfig
from kimisys.adapters.vllm.environment import environment
from kimisys.broadcast import Subscriber, connect
from kimisys.reshard.safetensors import create_checkpoint
from kimisys.trainer.config import TrainConfig
from kimisys.trainer.engine_actor import EngineActor
from kimisys.trainer.megatron_rank import MegatronRank

_CLOSE_SECONDS = 20.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sync:
    """One publication that the engine serves: the bytes that it pulled, the tensors whose digests
    were compared."""

    version: int
    nbytes: int
    digests: int


class Fleet:
    """The actors of a run. Use as a context manager: leaving it ends every process and removes
    every socket."""

    def __init__(
        self, config: TrainConfig, hf_config: Mapping[str, Any], model_folder: Path
    ) -> None:
        self._config, self._hf_config, self._folder = config, hf_config, model_folder
        self._timeout = config.ready_timeout
        self._sockets = (
            Path(tempfile.gettempdir()) / f"kimisys-{os.getpid()}-{secrets.token_hex(4)}"
        )
        self._ranks: list[Any] = []
        self._engine: Any = None
        self._starting: Any = None

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        with signals_deferred():
            self.close()

    def start_engine(self) -> None:
        """Begin to start the engine; `connect` waits for it."""
        config = EngineConfig(
            self._folder,
            dtype=self._config.wire_dtype,
            max_length=int(self._hf_config["max_position_embeddings"]),
            seed=self._config.seed,
            timeout_seconds=self._timeout,
        )
        self._engine = spawn(EngineActor, environment(), config, concurrent_calls=8)
        self._starting = self._engine.start.remote()

    def start_ranks(self) -> None:
        """Start the Megatron ranks and load the model folder into them through a plan."""
        world, port = self._config.tensor_parallel, _free_port()
        self._ranks = [
            spawn(
                MegatronRank,
                {"OMP_NUM_THREADS": "1"},
                *(rank, world, port, dict(self._hf_config), self._config.seed, self._timeout),
            )
            for rank in range(world)
        ]
        self.on_ranks("load", str(self._folder))

    def connect(self) -> None:
        """Open a publisher at every rank and let the engine, once started, plan its pull."""
        self._sockets.mkdir(mode=0o700)
        snapshots = self.on_ranks("snapshot", self._config.wire_dtype)
        self.on_ranks("open_publisher", snapshots, str(self._sockets))
        addresses = [str(address) for address in self._addresses]
        self._wait({"the engine": self._starting})
        self._wait({"the engine": self._engine.connect.remote(addresses)})

    @property
    def _addresses(self) -> list[Path]:
        return [self._sockets / f"rank{rank}" for rank in range(len(self._ranks))]

    def on_ranks(self, method: str, *args: Any) -> list[Any]:
        """Call `method` on every rank; their results in rank order."""
        shared = [share(argument) for argument in args]
        calls = {
            f"Megatron rank {r}": getattr(actor, method).remote(*shared)
            for r, actor in enumerate(self._ranks)
        }
        return list(self._wait(calls).values())

    def on_engine(self, method: str, *args: Any) -> Any:
        """Call `method` on the engine."""
        return self._wait({"the engine": getattr(self._engine, method).remote(*args)})["the engine"]

    def publish(self, version: int) -> None:
        """Publish the ranks' live weights as `version`, without telling the engine."""
        self.on_ranks("publish", version)

    def update_engine(self, version: int) -> Sync:
        """Let the engine pull, verify and commit the published `version`."""
        report: dict[str, Any] = self.on_engine("update", version)
        return Sync(version, report["nbytes"], report["digests"])

    def save(self, folder: Path, version: int) -> None:
        """Write the published `version` as a checkpoint folder: pulled like an engine's, verified
        by digest."""
        hf_config = {**self._hf_config, "torch_dtype": self._config.wire_dtype}
        files = {"config.json": json.dumps(hf_config, indent=2) + "\n"}
        with (
            connect(self._addresses, timeout_seconds=self._timeout) as peers,
            create_checkpoint(folder, peers.layout.tensors, files) as checkpoint,
        ):
            Subscriber(peers, checkpoint.layout, rank=0).pull(version, checkpoint.buffers)

    def close(self) -> None:
        """End the actors: asked first, killed when they do not answer in time."""
        actors = {f"Megatron rank {r}": actor for r, actor in enumerate(self._ranks)}
        if self._engine is not None:
            actors["the engine"] = self._engine
        self._ranks, self._engine = [], None
        closing = {name: actor.close.remote() for name, actor in actors.items()}
        deadline = time.monotonic() + _CLOSE_SECONDS
        for name, actor in actors.items():
            try:
                wait({name: closing[name]}, max(0.1, deadline - time.monotonic()))
            except Exception as error:  # whatever it is, the process has to end all the same
                _log.warning("%s did not close by itself: %s", name, error)
            finally:
                kill(actor)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _wait(self, calls: Mapping[str, Any]) -> dict[str, Any]:
        return wait(calls, self._timeout)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
