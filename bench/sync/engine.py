"""The vLLM engine of the sync benchmark, in a process of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.sync import worker
from bench.sync.child import serve
from kimisys.adapters.vllm.engine import Engine, EngineConfig

_PULLING = ("read", "measure", "apply", "land")
"""Phases of a pull; what is left of it, the ranks spend to look for versions and to agree."""


class Server:
    """A running engine that takes weights any way.

    ranks: of the engine. threads: of each. memory: descriptor of the shared memory that rank 0 of
    the trainer fills, in the usual way.
    """

    def __init__(self, model: str, ranks: int, threads: int, memory: int) -> None:
        self._runner = asyncio.Runner()
        config = EngineConfig(
            Path(model),
            dtype="bfloat16",
            tensor_parallel=ranks,
            max_length=64,
            max_sequences=8,
            max_batched_tokens=256,
            kv_cache_bytes=64 << 20,
            threads=threads,
        )
        self._engine = self._runner.run(Engine.start(config))
        self._memory = f"/proc/{os.getpid()}/fd/{memory}"
        self._ask(worker.time_packing)

    def connect(self, addresses: list[str]) -> None:
        self._runner.run(self._engine.connect(addresses))

    def update(self, version: int, full: bool) -> dict[str, Any]:
        """Our way. Returns `seconds` by phase, and what the engine reports of the update."""
        self._ask(worker.packing_seconds)
        report = self._runner.run(self._engine.update(version, full=full))
        packing = max(self._ask(worker.packing_seconds))
        pulling = {phase: report.get(f"{phase}_seconds", 0.0) for phase in _PULLING}
        seconds = {
            **{phase: spent for phase, spent in pulling.items() if spent},
            "agree": max(0.0, report["pull_seconds"] - sum(pulling.values())),
            "verify": report["digest_seconds"],
            "in place": report["pack_seconds"] - packing,
            "repack": packing,
        }
        return {**report, "seconds": seconds}

    def know(self, table: worker.Table) -> None:
        """Where each tensor lies in the shared memory, for `load`."""
        self._ask(worker.know, self._memory, table)

    def load(self) -> dict[str, float]:
        """vLLM's own reload, straight from the shared memory. Returns seconds by phase."""
        return _slowest(self._ask(worker.load))

    def load_file(self, folder: str) -> dict[str, float]:
        """vLLM's own reload, from a folder with safetensors. Returns seconds by phase."""
        return _slowest(self._ask(worker.load_file, folder))

    def probe(self, tokens: list[int]) -> list[list[float]]:
        """What the engine computes: log-softmax after each token but the last."""
        return self._runner.run(self._engine.probe(tokens)).tolist()

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Runs a function of bench.sync.worker in every worker; their answers."""
        return self._runner.run(
            self._engine._exclusive(
                function.__name__, lambda llm: llm.collective_rpc(function, args=arguments)
            )
        )


def _slowest(ranks: list[Mapping[str, float]]) -> dict[str, float]:
    """The phases of the rank whose phases take longest together."""
    return dict(max(ranks, key=lambda rank: sum(rank.values())))


if __name__ == "__main__":
    serve(Server)
