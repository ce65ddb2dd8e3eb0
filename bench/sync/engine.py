"""The vLLM engine of the sync benchmark, in a process of its own."""

from __future__ import annotations

import asyncio
import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.sync.child import serve
from kimisys.adapters.vllm.engine import Engine, EngineConfig

Table = list[tuple[str, int, list[int]]]
"""Name, byte offset in the shared memory and shape of each gathered tensor."""


class Server:
    """A running engine that takes weights either way.

    memory: descriptor of the shared memory that rank 0 fills, in the usual way.
    """

    def __init__(self, model: str, threads: int, memory: int) -> None:
        self._runner = asyncio.Runner()
        config = EngineConfig(
            Path(model),
            dtype="bfloat16",
            max_length=64,
            max_sequences=8,
            max_batched_tokens=256,
            kv_cache_bytes=64 << 20,
            threads=threads,
        )
        self._engine = self._runner.run(Engine.start(config))
        self._shared = torch.frombuffer(mmap.mmap(memory, 0), dtype=torch.uint8)
        self._weights: list[tuple[str, torch.Tensor]] = []

    def connect(self, addresses: list[str]) -> None:
        self._runner.run(self._engine.connect(addresses))

    def update(self, version: int) -> dict[str, float]:
        """Our way. Returns seconds by phase, and in `digests` how many tensors were compared."""
        with _timed_packing() as packing:
            report = self._runner.run(self._engine.update(version))
        return {
            "pull copy": report["pull_seconds"],
            "pull digest": report["digest_seconds"],
            "in place": report["pack_seconds"] - sum(packing),
            "repack": sum(packing),
            "digests": report["digests"],
        }

    def know(self, table: Table) -> None:
        """Where each tensor lies in the shared memory, for `load`."""
        self._weights = []
        for name, offset, shape in table:
            count = torch.Size(shape).numel() * torch.bfloat16.itemsize
            place = self._shared[offset : offset + count].view(torch.bfloat16)
            self._weights.append((name, place.view(shape)))

    def load(self) -> dict[str, float]:
        """The usual way: vLLM's own reload, straight from the shared memory."""

        def run(llm: Any) -> dict[str, float]:
            return llm.collective_rpc(_reload, args=(self._weights,))[0]

        return self._runner.run(self._engine._exclusive("load", run))

    def probe(self, tokens: list[int]) -> list[list[float]]:
        """What the engine computes: log-softmax after each token but the last."""
        return self._runner.run(self._engine.probe(tokens)).tolist()

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()


@torch.no_grad()
def _reload(worker: Any, weights: list[tuple[str, torch.Tensor]]) -> dict[str, float]:
    """In the worker: `load_weights` inside vLLM's bracket. Returns seconds by phase.

    The bracket (as in vLLM's reload_weights) gives the loader unpacked parameters and packs each
    layer once it is complete. It forgets a tied output head, which would go on with its old packed
    copy: that is packed here, as the weights would not be served otherwise.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    runner = worker.model_runner
    model, config = runner.model, runner.vllm_config.model_config
    began = time.perf_counter()
    with _timed_packing() as packing:
        initialize_layerwise_reload(model)
        model.load_weights(iter(weights))
        finalize_layerwise_reload(model, config)
        if config.hf_config.tie_word_embeddings:
            started = time.perf_counter()
            dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)
            packing.append(time.perf_counter() - started)
    whole = time.perf_counter() - began
    return {"load": whole - sum(packing), "repack": sum(packing)}


@contextmanager
def _timed_packing() -> Iterator[list[float]]:
    """Collects the seconds of every call of vLLM's packing inside the block."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    seconds: list[float] = []

    def timed(method: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            started = time.perf_counter()
            method(*arguments)
            seconds.append(time.perf_counter() - started)

        return run

    kinds: list[Any] = [UnquantizedLinearMethod, UnquantizedEmbeddingMethod]
    saved = [kind.process_weights_after_loading for kind in kinds]
    try:
        for kind, method in zip(kinds, saved, strict=True):
            kind.process_weights_after_loading = timed(method)
        yield seconds
    finally:
        for kind, method in zip(kinds, saved, strict=True):
            kind.process_weights_after_loading = method


if __name__ == "__main__":
    serve(Server)
