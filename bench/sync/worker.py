"""What the sync benchmark runs inside vLLM's workers, with `collective_rpc`.

A module of its own: workers in other processes import it by name.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from typing import Any

import torch

Table = list[tuple[str, int, list[int]]]
"""Name, byte offset in the shared memory and shape of each gathered tensor."""

_packing: list[float] = []  # seconds of each call of vLLM's packing since it was last asked


def time_packing(worker: Any) -> None:
    """Once in each worker: from now on every call of vLLM's packing is timed, and so is the turning
    of weights with which kimisys prepares it."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    from kimisys.adapters.vllm.scratch import Scratch

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = method(*arguments)
            _packing.append(time.perf_counter() - started)
            return result

        return run

    kinds: list[Any] = [UnquantizedLinearMethod, UnquantizedEmbeddingMethod]
    for kind in kinds:
        kind.process_weights_after_loading = timed(kind.process_weights_after_loading)
    Scratch.turned = timed(Scratch.turned)  # type: ignore[method-assign]


def packing_seconds(worker: Any) -> float:
    """What packing took since this was last asked."""
    seconds = sum(_packing)
    _packing.clear()
    return seconds


def know(worker: Any, memory: str, table: Table) -> None:
    """Maps the shared memory (a path under /proc) that rank 0 fills; `load` takes it from there."""
    descriptor = os.open(memory, os.O_RDWR)
    try:
        mapped = mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
    shared = torch.frombuffer(mapped, dtype=torch.uint8)
    worker.gathered = []
    for name, offset, shape in table:
        count = torch.Size(shape).numel() * torch.bfloat16.itemsize
        place = shared[offset : offset + count].view(torch.bfloat16)
        worker.gathered.append((name, place.view(shape)))


@torch.no_grad()
def load(worker: Any) -> dict[str, float]:
    """vLLM's own `reload_weights` from tensors in memory. Returns seconds by phase."""
    return _reload(worker, weights_iterator=iter(worker.gathered))


@torch.no_grad()
def load_file(worker: Any, folder: str) -> dict[str, float]:
    """vLLM's own `reload_weights` from a folder. Returns seconds by phase."""
    # The engine started from random weights, by a loader that cannot read files.
    worker.model_runner.vllm_config.load_config.load_format = "safetensors"
    return _reload(worker, weights_path=folder)


def _reload(worker: Any, **source: Any) -> dict[str, float]:
    """vLLM's bracket gives the loader unpacked parameters and packs each layer once it is complete.
    It forgets a tied output head, which would go on with its old packed copy: that is packed here,
    as the weights would not be served otherwise."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    packing_seconds(worker)
    began = time.perf_counter()
    worker.reload_weights(**source)
    model, config = worker.model_runner.model, worker.model_runner.vllm_config.model_config
    if config.hf_config.tie_word_embeddings:
        started = time.perf_counter()
        dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)
        _packing.append(time.perf_counter() - started)
    whole = time.perf_counter() - began
    packing = packing_seconds(worker)
    return {"load": whole - packing, "repack": packing}
