"""Segments of an engine that has too little memory, fails, or is closed; engines on given CPUs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_segments import PROMPTS, request
from tiny_checkpoints import memory_buffers, memory_layout, random_model, weights
from vllm_segments_process import SegmentsProcess

from kimisys.adapters.vllm.engine import Engine, EngineConfig, EngineError
from kimisys.broadcast import Publisher, snapshot_layout

CPU = min(os.sched_getaffinity(0))
TOKENS = 21 * 32  # of the key-value cache, in blocks, one of which holds nothing
TOKEN_BYTES = 1024


@pytest.fixture
def engine(folders: dict[str, Path], tmp_path: Path) -> Iterator[SegmentsProcess]:
    """With room for five whole sequences, on one CPU, serving version 1."""
    tensors = weights(random_model(folders["tied"], seed=1))
    live = memory_layout(tensors)
    engine = SegmentsProcess(
        folders["tied"],
        max_length=128,
        max_sequences=32,
        max_batched_tokens=1,  # which is raised to 160: not all prompts begin together
        kv_cache_bytes=TOKENS * TOKEN_BYTES,
        cpus=[CPU],
    )
    try:
        with Publisher(live, snapshot_layout(live, None), 0, tmp_path / "rank0") as publisher:
            publisher.publish(1, memory_buffers(tensors))
            engine.call("connect", [str(publisher.address)])
            engine.call("update", 1)
            yield engine
    finally:
        assert engine.end() == 0, "the engine's process ended badly"


def test_sequences_that_lose_their_memory_make_the_same_and_a_failed_step_ends_all(
    engine: SegmentsProcess,
) -> None:
    assert set(map(tuple, engine.call("affinities"))) == {(CPU,)}
    assert engine.stats().kv_capacity == TOKENS - 32
    requests = [
        request(prompt, 80, temperature=temperature, seed=seed)
        for prompt in PROMPTS
        for temperature, seed in ((0.0, None), (1.0, 1), (1.0, 2))
    ]
    alone = [engine.finish(engine.start([one]))[0].token_ids for one in requests]
    engine.call("steps")
    leases = engine.start(requests)
    engine.until(lambda: any(engine.made[lease].token_ids for lease in leases))
    stats = engine.stats()
    assert stats.running + stats.waiting == len(leases)
    made = engine.finish(leases)
    assert [one.token_ids for one in made] == alone
    steps = engine.call("steps")
    assert sum(steps["preempted"]) > 0, "the memory sufficed"
    assert steps["batch"][0] < len(leases), "all prompts began together"
    assert max(steps["prefill_tokens"]) <= 160

    engine.start([request(PROMPTS[0], 100)])
    engine.call("break_model")
    for _ in range(2):  # it goes on telling
        with pytest.raises(EngineError, match="MemoryError: no room for activations"):
            engine.until(lambda: False)
    for method in ("stats", "start"):
        with pytest.raises(EngineError, match="no room for activations"):
            engine.call(method, *([[]] if method == "start" else []))
    engine.call("abort", [0])


def test_the_stream_of_a_closed_engine_ends(engine: SegmentsProcess) -> None:
    """With what was made before."""
    (lease,) = engine.start([request(PROMPTS[0], 5)])
    engine.call("generate", [PROMPTS[0]], max_tokens=20)
    (left,) = engine.call("stream_of_closed")
    assert [output["lease"] for output in left] == [lease]
    assert (len(left[0]["token_ids"]), left[0]["reason"]) == (5, "length")
    assert engine.take() is None
    with pytest.raises(EngineError, match="closed"):
        engine.start([request([1])])


def test_cpus_of_others_are_refused(folders: dict[str, Path]) -> None:
    missing = max(os.sched_getaffinity(0)) + 1
    with pytest.raises(ValueError, match=rf"on CPUs \[{missing}\], and this process may use"):
        asyncio.run(Engine.start(EngineConfig(folders["tied"], cpus=(CPU, missing))))


def test_threads_are_no_more_than_cpus() -> None:
    assert EngineConfig(Path(), threads=4, cpus=(0, 1)).own_threads == 2
    assert EngineConfig(Path(), threads=2, cpus=(0, 1, 2)).own_threads == 2
    assert EngineConfig(Path(), threads=4).own_threads == 4
