"""vLLM as others run it, AsyncLLM over two ranks and the HTTP server, both from one publisher.

They are updated by deltas and in full, serve what transformers computes, label their completions,
and empty or keep their prefix caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import memory_buffers, memory_layout, random_model, reference, weights
from vllm_served_process import AsyncProcess, HttpProcess

from kimisys.broadcast import Publisher, snapshot_layout

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 128,
    "kv_cache_memory_bytes": 16 << 20,
    "block_size": 32,
    "enable_prefix_caching": True,
    "weight_transfer_config": {"backend": "kimisys"},
    "worker_extension_cls": "kimisys.adapters.vllm.weight_transfer.WorkerReport",
}
PROMPT = [(7 * i * i + 3 * i) % 29 for i in range(70)]
"""Two blocks of the prefix cache, and a part of a third."""
BLOCKS = 64


class World:
    """A model that is published version after version, and the engines that follow it."""

    def __init__(self, folder: Path, publisher: Publisher, engines: dict[str, Any]) -> None:
        self.model = random_model(folder, seed=1)
        self.publisher, self.engines, self.version = publisher, engines, 0

    def publish(self, density: float = 0.02) -> None:
        """The next version: this part of the elements of every matrix has changed."""
        self.version += 1
        generator = torch.Generator().manual_seed(self.version)
        for tensor in weights(self.model).values():
            if self.version > 1 and tensor.dim() > 1:
                chosen = torch.rand(tensor.shape, generator=generator) < density
                tensor[chosen] += torch.randn(int(chosen.sum()), generator=generator) * 0.2
        self.publisher.publish(self.version, memory_buffers(weights(self.model)))

    def update(self, full: bool = False, keep_prefix_cache: bool = False) -> dict[str, Any]:
        """Both engines at once. Returns each one's ranks."""
        with ThreadPoolExecutor(2) as pool:
            started = {
                name: pool.submit(engine.update, self.version, full, keep_prefix_cache)
                for name, engine in self.engines.items()
            }
            ranks = {name: future.result() for name, future in started.items()}
        assert [len(each) for each in ranks.values()] == [2, 1]
        assert {rank["version"] for each in ranks.values() for rank in each} == {self.version}
        return ranks

    def gap(self, found: dict[str, Any]) -> float:
        """How far a greedy answer's log-probabilities are from transformers', at most."""
        rows = reference(self.model, PROMPT + found["token_ids"])[len(PROMPT) - 1 :]
        taken = np.take_along_axis(rows, np.array(found["token_ids"])[:, None], axis=1)[:, 0]
        return float(np.abs(taken - np.array(found["log_probs"])).max())

    def check_served(self, cached: int | None = 0) -> None:
        for name, engine in self.engines.items():
            found = engine.generate(PROMPT, 6)
            assert self.gap(found) < 1e-4, name
            assert found["versions"] == [[str(self.version), 0, 6]], name
            assert cached is None or found["cached"] == cached, name


@pytest.fixture(scope="module")
def world(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = folders["tied"]
    live = memory_layout(weights(random_model(folder, seed=1)))
    address = tmp_path_factory.mktemp("served") / "rank0"
    with ExitStack() as stack:
        publisher = stack.enter_context(Publisher(live, snapshot_layout(live, None), 0, address))
        kinds = {"AsyncLLM": (AsyncProcess, 2), "HTTP": (HttpProcess, 1)}
        engines = {
            name: stack.enter_context(
                kind({"model": str(folder), "tensor_parallel_size": size} | OPTIONS)
            )
            for name, (kind, size) in kinds.items()
        }
        for engine in engines.values():
            engine.connect([str(address)])
        world = World(folder, publisher, engines)
        world.publish()
        world.update()
        yield world


def test_two_engines_follow_one_publisher(world: World) -> None:
    world.check_served()
    for full in (False, False, True, False):
        world.publish()
        served = world.version - 1
        for ranks in world.update(full).values():
            for rank in ranks:
                assert rank["base"] == (None if full else served)
                assert (rank["wire_nbytes"] < rank["full_nbytes"] / 4) == (not full)
        world.check_served()


def test_the_prefix_cache_is_emptied_or_kept(world: World) -> None:
    world.check_served(cached=None)
    world.publish()
    world.update()
    world.check_served()
    world.check_served(cached=BLOCKS)

    world.publish(density=0.5)
    world.update(keep_prefix_cache=True)
    for engine in world.engines.values():
        found = engine.generate(PROMPT, 6)
        assert found["cached"] == BLOCKS
        assert world.gap(found) > 1e-3, "the cached blocks were computed by the version before"
    world.publish(density=0.0)  # nothing changes, and the cache goes
    for ranks in world.update().values():
        assert {rank["changed"] for rank in ranks} == {0}
    world.check_served()


def test_an_update_that_is_refused_leaves_the_old_version_served(world: World) -> None:
    """And the engine goes on: what was published next is pulled as if nothing had been."""
    engine = world.engines["HTTP"]
    world.check_served(cached=None)
    with pytest.raises(AssertionError, match="version"):
        engine.update(world.version + 7, False, False)
    world.check_served(cached=BLOCKS)
    world.publish()
    world.update()
    world.check_served()
