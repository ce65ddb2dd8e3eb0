"""A real engine that follows a publisher: what it computes, refuses and leaves behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import memory_buffers, memory_layout, random_model, reference, weights
from transformers import PreTrainedModel
from vllm_engine_process import EngineProcess

from kimisys.adapters.vllm.engine import Engine, EngineConfig
from kimisys.broadcast import Publisher, snapshot_layout
from kimisys.errors import CheckpointError, DigestError, SnapshotError, VersionError

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 28, 0, 17]


@dataclass
class Trainer:
    """Publishes whole models from the test's process, and has the engine follow."""

    folder: Path
    engine: EngineProcess
    publisher: Publisher
    version: int = 0
    model: PreTrainedModel = field(init=False)

    def publish(self, full: bool = False) -> int:
        """New random weights, under the next version."""
        self.version += 1
        self.model = random_model(self.folder, seed=self.version)
        self.publisher.publish(self.version, memory_buffers(weights(self.model)), full=full)
        return self.version

    def nudge(self, density: float) -> int:
        """This part of the elements of every weight changed, under the next version."""
        self.version += 1
        generator = torch.Generator().manual_seed(self.version)
        for tensor in weights(self.model).values():
            chosen = torch.rand(tensor.shape, generator=generator) < density
            tensor[chosen] += torch.randn(int(chosen.sum()), generator=generator) * 0.2
        self.publisher.publish(self.version, memory_buffers(weights(self.model)))
        return self.version

    def sync(self, full: bool = False) -> dict[str, Any]:
        report: dict[str, Any] = self.engine.call("update", self.publish(full))
        return report

    def generate(self, prompts: list[list[int]], **options: Any) -> list[list[dict[str, Any]]]:
        options = {"version": self.version} | options
        found: list[list[dict[str, Any]]] = self.engine.call("generate", prompts, **options)
        return found


_versions = iter(
    range(0, 1_000_000, 1000)
)  # the engine outlives the trainers, and versions only increase


@pytest.fixture(scope="module")
def trainer(
    engine: EngineProcess, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trainer]:
    with publishing(folders["tied"], tmp_path_factory.mktemp("publisher")) as publisher:
        trainer = Trainer(folders["tied"], engine, publisher)
        with pytest.raises(VersionError, match="no version is served yet"):
            engine.probe(PROMPT)
        with pytest.raises(SnapshotError, match="no publisher is known"):
            engine.call("update", 1)
        engine.call("connect", [str(publisher.address)])
        trainer.sync()
        yield trainer


def publishing(folder: Path, socket_folder: Path) -> Publisher:
    """A publisher of the folder's model, held whole by one rank."""
    live = memory_layout(weights(random_model(folder, seed=0)))
    return Publisher(live, snapshot_layout(live, None), 0, socket_folder / "rank0")


def test_the_engine_computes_what_transformers_computes(trainer: Trainer) -> None:
    """Twice: the second set of weights finds the packed copies of the first, tied head included."""
    for _ in range(2):
        report = trainer.sync()
        probed = trainer.engine.probe(PROMPT, trainer.version)
        np.testing.assert_allclose(probed, reference(trainer.model, PROMPT), atol=1e-4, rtol=0)
        tensors = weights(trainer.model)
        assert report["version"] == trainer.version
        assert report["digests"] == len(tensors)
        assert report["nbytes"] == sum(tensor.nbytes for tensor in tensors.values())


def test_changes_alone_give_what_a_full_pull_gives(trainer: Trainer) -> None:
    """To the bit: the second version has the weights of the first, and brings all of them."""
    trainer.sync()
    for density in (0.01, 0.0, 0.2):
        served = trainer.version
        report = trainer.engine.call("update", trainer.nudge(density))
        assert report["base"] == served
        assert (report["changed"] > 0) == (density > 0)
        assert report["wire_nbytes"] < report["full_nbytes"] / (2 if density > 0.1 else 4)
        near = trainer.engine.probe(PROMPT)
        np.testing.assert_allclose(near, reference(trainer.model, PROMPT), atol=1e-4, rtol=0)
    report = trainer.engine.call("update", trainer.nudge(0.0), full=True)
    assert report["base"] is None and report["wire_nbytes"] >= report["full_nbytes"]
    assert np.array_equal(trainer.engine.probe(PROMPT), near)


def test_a_flipped_byte_is_refused_and_the_old_version_served(trainer: Trainer) -> None:
    before = trainer.engine.probe(PROMPT)
    served = trainer.version
    flipped = trainer.publish(full=True)
    trainer.publisher.memory[1234] ^= 1
    with pytest.raises(DigestError, match=r"model\.embed_tokens\.weight"):
        trainer.engine.call("update", flipped)
    assert np.array_equal(trainer.engine.probe(PROMPT, served), before)
    with pytest.raises(VersionError):
        trainer.engine.probe(PROMPT, flipped)
    trainer.sync(full=True)  # changes to what was flipped would be changes to something else
    np.testing.assert_allclose(
        trainer.engine.probe(PROMPT), reference(trainer.model, PROMPT), atol=1e-4, rtol=0
    )


def test_versions_that_are_not_served_are_refused(trainer: Trainer) -> None:
    served = trainer.version
    for wrong in (served - 1, served + 1):
        with pytest.raises(VersionError, match=f"version {served} is served, asked was {wrong}"):
            trainer.generate([PROMPT], version=wrong)
    with pytest.raises(VersionError, match="only increase"):
        trainer.engine.call("update", served)
    with pytest.raises(VersionError, match=f"asked was {served + 5}"):
        trainer.engine.call("update", served + 5)
    assert trainer.generate([PROMPT])[0][0]["version"] == served


def test_log_probs_are_those_of_the_tokens_sampled(trainer: Trainer) -> None:
    groups = trainer.generate(
        [PROMPT, PROMPT[:4]], samples=3, max_tokens=20, temperature=1.0, seed=7
    )
    for prompt, group in zip((PROMPT, PROMPT[:4]), groups, strict=True):
        assert len(group) == 3 and len({tuple(one["token_ids"]) for one in group}) == 3
        for one in group:
            ids = one["token_ids"]
            rows = reference(trainer.model, prompt + ids)[len(prompt) - 1 :]
            expected = rows[np.arange(len(ids)), ids]
            np.testing.assert_allclose(one["log_probs"], expected, atol=1e-4, rtol=0)
            assert (one["finish_reason"], len(ids)) == ("length", 20)


def test_sampling_follows_the_distribution(trainer: Trainer) -> None:
    """Four thousand first tokens: each frequency within five standard errors of its probability."""
    (group,) = trainer.generate([PROMPT], samples=4000, max_tokens=1, seed=3)
    counts = np.bincount([one["token_ids"][0] for one in group], minlength=29)
    p = np.exp(reference(trainer.model, [*PROMPT, 0])[-1].astype(np.float64))
    assert np.all(np.abs(counts / 4000 - p) < 5 * np.sqrt(p * (1 - p) / 4000) + 1e-3)


def test_stop_tokens_end_a_sample_and_belong_to_it(trainer: Trainer) -> None:
    """Only those that the caller names: config.json's eos_token_id is 2."""
    stop = list(range(5, 29))
    (group,) = trainer.generate([PROMPT], samples=20, max_tokens=30, stop_token_ids=stop, seed=1)
    for one in group:
        *others, last = one["token_ids"]
        assert one["finish_reason"] == "stop" and last in stop and not set(others) & set(stop)
        assert len(one["log_probs"]) == len(one["token_ids"])
    (group,) = trainer.generate([PROMPT], samples=20, max_tokens=60, seed=1)
    assert {(one["finish_reason"], len(one["token_ids"])) for one in group} == {("length", 60)}
    assert any(2 in one["token_ids"][:-1] for one in group)


def test_a_seed_repeats_a_call(trainer: Trainer) -> None:
    options = {"samples": 4, "max_tokens": 12}
    first = trainer.generate([PROMPT, [1, 2]], seed=11, **options)
    assert trainer.generate([PROMPT, [1, 2]], seed=11, **options) == first
    assert trainer.generate([PROMPT, [1, 2]], seed=12, **options) != first


def test_temperature_zero_takes_the_likeliest(trainer: Trainer) -> None:
    ((one,),) = trainer.generate([PROMPT], max_tokens=6, temperature=0.0)
    rows = reference(trainer.model, PROMPT + one["token_ids"])
    assert one["token_ids"] == rows[len(PROMPT) - 1 :].argmax(-1).tolist()


def test_an_update_waits_for_samples_and_later_samples_for_it(trainer: Trainer) -> None:
    old, engine = trainer.version, trainer.engine
    old_model = trainer.model
    running = engine.begin("generate", [PROMPT] * 8, samples=8, max_tokens=100, version=old)
    new = trainer.publish()
    update = engine.begin("update", new)
    after = engine.begin("generate", [PROMPT], max_tokens=10, version=new)
    samples = [one for group in engine.wait(running) for one in group]
    assert engine.wait(update)["version"] == new
    assert {one["version"] for one in samples} == {old}
    last = samples[-1]["token_ids"]
    rows = reference(old_model, PROMPT + last)[len(PROMPT) - 1 :]
    expected = rows[np.arange(len(last)), last]
    np.testing.assert_allclose(samples[-1]["log_probs"], expected, atol=1e-4, rtol=0)
    assert engine.wait(after)[0][0]["version"] == new


def test_requests_that_cannot_be_served_are_refused(trainer: Trainer) -> None:
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        trainer.generate([PROMPT, []])
    with pytest.raises(ValueError, match="may have 1 to 28"):
        trainer.generate([[1] * 29], max_tokens=100)
    with pytest.raises(ValueError, match="at least two tokens"):
        trainer.engine.probe([1])
    assert trainer.generate([]) == []


def test_a_lost_publisher_is_named_and_the_engine_serves_on(
    trainer: Trainer, tmp_path: Path
) -> None:
    before = trainer.engine.probe(PROMPT)
    with pytest.raises(SnapshotError, match="nobody"):
        trainer.engine.call("connect", [str(tmp_path / "nobody")], 0.2)
    assert np.array_equal(trainer.engine.probe(PROMPT, trainer.version), before)
    trainer.engine.call("connect", [str(trainer.publisher.address)])
    trainer.sync()


def test_two_ranks_follow_together_or_not_at_all(folders: dict[str, Path], tmp_path: Path) -> None:
    """Digests are summed over both ranks; a refusal leaves neither half-way, nor their RPC.
    A Qwen2: the biases of its packed layers, too, are whole on both ranks."""
    engine = EngineProcess(folders["qwen2-untied"], max_length=128, tensor_parallel=2)
    workers = children(engine.pid)
    try:
        with publishing(folders["qwen2-untied"], tmp_path) as publisher:
            trainer = Trainer(folders["qwen2-untied"], engine, publisher)
            engine.call("connect", [str(publisher.address)])
            tensors = weights(random_model(folders["qwen2-untied"], seed=0))
            for _ in range(2):
                assert trainer.sync(full=True)["base"] is None
                report = engine.call("update", trainer.nudge(0.01))
                assert (report["base"], report["digests"]) == (trainer.version - 1, len(tensors))
                before = engine.probe(PROMPT, trainer.version)
                expected = reference(trainer.model, PROMPT)
                np.testing.assert_allclose(before, expected, atol=1e-4, rtol=0)
                flipped = trainer.publish(full=True)
                publisher.memory[-1] ^= 1
                with pytest.raises(DigestError):
                    engine.call("update", flipped)
                with pytest.raises(VersionError, match=f"asked was {flipped + 3}"):
                    engine.call("update", flipped + 3)
                assert np.array_equal(engine.probe(PROMPT), before)
    finally:
        assert engine.end() == 0
    assert len(workers) >= 2
    assert gone(workers), "the engine left processes behind"


def gone(pids: list[str], seconds: float = 20.0) -> bool:
    """Whether the processes end within that time: some notice only that their parent has."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def children(pid: int) -> list[str]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return " ".join(path.read_text() for path in found).split()


def test_the_engine_is_one_process(trainer: Trainer) -> None:
    assert children(trainer.engine.pid) == []


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        asyncio.run(Engine.start(EngineConfig(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="architectures"):
        asyncio.run(Engine.start(EngineConfig(tmp_path)))
