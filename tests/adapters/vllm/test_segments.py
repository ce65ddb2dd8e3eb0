"""Segments on a real engine: what they make, under which version, and how they end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import memory_buffers, memory_layout, random_model, reference, weights
from transformers import PreTrainedModel
from vllm_segments_process import Made, SegmentsProcess

from kimisys.broadcast import Publisher, snapshot_layout

LENGTH = 60
MAX_LENGTH = 128
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 28, 0, 17], [7] * 3, list(range(29)), [11], [5, 3] * 20]


@dataclass
class Rollouts:
    """An engine that serves what `publish` published last."""

    engine: SegmentsProcess
    publisher: Publisher
    folder: Path
    version: int = 0
    models: dict[int, PreTrainedModel] = field(default_factory=dict)

    def publish(self) -> int:
        """New random weights, under the next version."""
        self.version += 1
        self.models[self.version] = random_model(self.folder, seed=self.version)
        self.publisher.publish(self.version, memory_buffers(weights(self.models[self.version])))
        return self.version

    def greedy(self, prompts: list[list[int]], length: int = LENGTH) -> list[list[int]]:
        """What Engine.generate makes of them, without a break."""
        groups = self.engine.call("generate", prompts, max_tokens=length, temperature=0.0)
        return [one["token_ids"] for (one,) in groups]

    def expected(self, prompt: list[int], made: Made) -> np.ndarray:
        """What transformers says of the log-probs, under each token's version."""
        rows = {
            version: reference(self.models[version], prompt + made.token_ids)[len(prompt) - 1 :]
            for version in set(made.versions)
        }
        return np.array(
            [
                rows[version][place, token]
                for place, (version, token) in enumerate(
                    zip(made.versions, made.token_ids, strict=True)
                )
            ]
        )


@pytest.fixture(scope="module")
def rollouts(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rollouts]:
    folder = folders["tied"]
    live = memory_layout(weights(random_model(folder, seed=0)))
    socket = tmp_path_factory.mktemp("segments") / "rank0"
    engine = SegmentsProcess(folder, max_length=MAX_LENGTH)
    try:
        with Publisher(live, snapshot_layout(live, None), 0, socket) as publisher:
            (early,) = engine.finish(engine.start([request(PROMPTS[0])]))
            assert early.reason == "failed" and "no version is served yet" in early.error
            engine.call("connect", [str(publisher.address)])
            rollouts = Rollouts(engine, publisher, folder)
            engine.call("update", rollouts.publish())
            yield rollouts
    finally:
        assert engine.end() == 0, "the engine's process ended badly"


def request(token_ids: list[int], length: int = LENGTH, **options: Any) -> dict[str, Any]:
    """Fields of a SegmentRequest, greedy unless told otherwise."""
    return {"token_ids": token_ids, "max_tokens": length, "temperature": 0.0} | options


def test_a_segment_cut_in_two_goes_on_where_it_was(rollouts: Rollouts) -> None:
    engine, whole = rollouts.engine, rollouts.greedy(PROMPTS)
    leases = engine.start([request(prompt) for prompt in PROMPTS])
    engine.until(lambda: all(engine.made[lease].token_ids for lease in leases))
    engine.call("abort", [*leases, 10**9])
    first = engine.finish(leases)
    assert {made.reason for made in first} == {"paused"}
    assert all(0 < len(made.token_ids) < LENGTH for made in first)
    second = engine.finish(
        engine.start(
            [
                request(prompt + made.token_ids, LENGTH - len(made.token_ids))
                for prompt, made in zip(PROMPTS, first, strict=True)
            ]
        )
    )
    for prompt, begun, ended, expected in zip(PROMPTS, first, second, whole, strict=True):
        assert begun.token_ids + ended.token_ids == expected
        assert (ended.reason, ended.error) == ("length", "")
        for one, before in ((begun, prompt), (ended, prompt + begun.token_ids)):
            np.testing.assert_allclose(one.log_probs, rollouts.expected(before, one), atol=1e-4)


@settings(max_examples=10)
@given(
    cuts=st.lists(st.integers(1, 15), min_size=1, max_size=6),
    prompt=st.sampled_from(PROMPTS),
    crowd=st.integers(0, 4),
)
def test_segments_of_any_lengths_make_the_same(
    rollouts: Rollouts, cuts: list[int], prompt: list[int], crowd: int
) -> None:
    """However a trajectory is cut, and whatever runs beside it."""
    engine = rollouts.engine
    (whole,) = rollouts.greedy([prompt], sum(cuts))
    others = engine.start([request(PROMPTS[each], 40) for each in range(crowd)])
    made: list[int] = []
    for cut in cuts:
        (segment,) = engine.finish(engine.start([request(prompt + made, cut)]))
        assert (len(segment.token_ids), segment.reason) == (cut, "length")
        made += segment.token_ids
    assert made == whole
    engine.call("abort", others)
    engine.finish(others)


def test_log_probs_are_those_that_the_engine_gives_itself(rollouts: Rollouts) -> None:
    """A probe computes the whole at once; tokens are drawn at temperature 1."""
    engine = rollouts.engine
    leases = engine.start([request(prompt, temperature=1.0) for prompt in PROMPTS])
    for prompt, made in zip(PROMPTS, engine.finish(leases), strict=True):
        rows = engine.probe(prompt + made.token_ids)[len(prompt) - 1 :]
        probed = rows[np.arange(len(made.token_ids)), made.token_ids]
        np.testing.assert_allclose(made.log_probs, probed, atol=1e-4)
    assert len({tuple(engine.made[lease].token_ids) for lease in leases}) == len(leases)


def test_tokens_come_while_they_are_made(rollouts: Rollouts) -> None:
    engine = rollouts.engine
    (lease,) = engine.start([request([1], 120)])
    (made,) = engine.finish([lease])
    assert made.outputs > 1 and len(made.token_ids) == 120


def test_an_update_waits_and_each_token_tells_its_version(rollouts: Rollouts) -> None:
    """A trajectory begun under one version goes on under the next."""
    engine, old = rollouts.engine, rollouts.version
    leases = engine.start([request(prompt) for prompt in PROMPTS])
    new = rollouts.publish()
    update = engine.begin("update", new)
    begun = PROMPTS[0]
    (late,) = engine.start([request(begun, 20)])
    first = engine.finish(leases)
    assert engine.wait(update)["version"] == new
    (after,) = engine.finish([late])
    assert {version for made in first for version in made.versions} == {old}
    assert set(after.versions) == {new}
    for prompt, made in [*zip(PROMPTS, first, strict=True), (begun, after)]:
        np.testing.assert_allclose(made.log_probs, rollouts.expected(prompt, made), atol=1e-4)
    assert after.token_ids != first[0].token_ids[:20], "the weights did not change"
    assert engine.stats().version == new


def test_an_abort_reaches_what_an_update_waits_for(rollouts: Rollouts) -> None:
    """And what waits behind the update, which then never begins."""
    engine = rollouts.engine
    running = engine.start([request(prompt) for prompt in PROMPTS])
    engine.until(lambda: all(engine.made[lease].token_ids for lease in running))
    update = engine.begin("update", rollouts.publish())
    behind = engine.start([request(PROMPTS[0])])
    engine.call("abort", running + behind)
    assert engine.wait(update)["version"] == rollouts.version
    made = engine.finish(running + behind)
    assert {one.reason for one in made} == {"paused"} and made[-1].token_ids == []


def test_requests_join_and_leave_at_random(rollouts: Rollouts) -> None:
    """Two hundred; each ends once, with a prefix of what is made without a break."""
    engine, draw = rollouts.engine, random.Random(5)
    wholes = rollouts.greedy(PROMPTS)
    lengths: dict[int, tuple[int, int]] = {}
    aborted: set[int] = set()
    while len(lengths) < 200:
        drawn = [(draw.randrange(len(PROMPTS)), draw.randint(1, LENGTH)) for _ in range(8)]
        leases = engine.start([request(PROMPTS[which], length) for which, length in drawn])
        lengths |= dict(zip(leases, drawn, strict=True))
        for _ in range(draw.randrange(4)):
            engine.take()
        leaving = draw.sample(sorted(lengths), draw.randrange(min(16, len(lengths))))
        aborted |= {lease for lease in leaving if not engine.made[lease].reason}
        engine.call("abort", leaving * draw.randint(1, 2))
    engine.finish(lengths)
    reasons = []
    for lease, (which, length) in lengths.items():
        made = engine.made[lease]
        assert made.token_ids == wholes[which][: len(made.token_ids)]
        assert made.reason == "length" or lease in aborted
        assert (made.reason == "length") == (len(made.token_ids) == length)
        reasons.append(made.reason)
    assert set(reasons) == {"length", "paused"}
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens) == (0, 0, 0)


def test_what_vllm_refuses_fails_and_the_others_go_on(rollouts: Rollouts) -> None:
    engine = rollouts.engine
    (expected,) = rollouts.greedy([PROMPTS[0]])
    requests = [
        request([1] * 70, 60),
        request([]),
        request([10**6]),
        request([1], 0),
        request([1], temperature=-1.0),
        request(PROMPTS[0]),
    ]
    *refused, fine = engine.finish(engine.start(requests))
    assert [(one.reason, one.token_ids) for one in refused] == [("failed", [])] * 5
    causes = ["70 tokens.*max_length is 128", "0 tokens", "vocabulary", "max_tokens is 0", "temper"]
    for one, cause in zip(refused, causes, strict=True):
        with pytest.raises(AssertionError, match=cause):
            raise AssertionError(one.error)
    assert (fine.reason, fine.token_ids) == ("length", expected)


def test_leases_are_new(rollouts: Rollouts) -> None:
    engine = rollouts.engine
    (lease,) = engine.start([request([1], 100)])
    for again in ([lease], [-1, -1]):
        with pytest.raises(ValueError, match=r"leases .* are not new"):
            engine.call("start", [{"lease": each, **request([1])} for each in again])
    engine.call("abort", [lease])
    engine.finish([lease])


def test_each_request_has_its_stop_tokens(rollouts: Rollouts) -> None:
    engine = rollouts.engine
    stops = [list(range(5, 29)), [], [0, 1], [28]]
    requests = [
        request([1, 2], temperature=1.0, stop_token_ids=stop) for stop in stops for _ in range(5)
    ]
    for made, asked in zip(engine.finish(engine.start(requests)), requests, strict=True):
        *others, last = made.token_ids
        stop = set(asked["stop_token_ids"])
        assert not stop & set(others)
        assert made.reason == ("stop" if last in stop else "length")
        assert made.reason == "stop" or len(made.token_ids) == LENGTH
    assert all(engine.made[lease].reason == "stop" for lease in sorted(engine.made)[-20:-15])


def test_seeds_are_of_each_request(rollouts: Rollouts) -> None:
    """The same tokens, whatever else runs; others under another seed, or another's."""
    engine = rollouts.engine
    seeded = [request(PROMPTS[0], 30, temperature=1.0, seed=seed) for seed in (1, 2, 3)]
    alone = [engine.finish(engine.start([one]))[0].token_ids for one in seeded]
    crowd = [request(prompt, 50, temperature=1.0) for prompt in PROMPTS]
    leases = engine.start([*crowd, *seeded])
    together = [made.token_ids for made in engine.finish(leases)]
    assert together[len(crowd) :] == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


def test_steps_account_for_every_token(rollouts: Rollouts) -> None:
    engine = rollouts.engine
    engine.call("steps")
    made = engine.finish(engine.start([request(prompt) for prompt in PROMPTS]))
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]
    steps = engine.call("steps")
    assert sum(steps["new_tokens"]) == sum(len(one.token_ids) for one in made) == 5 * LENGTH
    assert sum(steps["prefill_tokens"]) == sum(map(len, prompts))
    assert steps["batch"] == [5] * LENGTH and sum(steps["preempted"]) == 0
    first = sum(map(len, PROMPTS))
    assert steps["kv_tokens"] == [first + 5 * step for step in range(LENGTH)]
    assert np.all(np.diff(steps["number"]) == 1)
    ends = np.add(steps["start"], steps["seconds"])
    assert np.all(np.array(steps["start"])[1:] >= ends[:-1])
    assert engine.call("steps")["number"] == []


def test_stats_count_what_runs(rollouts: Rollouts) -> None:
    engine = rollouts.engine
    leases = engine.start([request(prompt) for prompt in PROMPTS])
    engine.until(lambda: all(engine.made[lease].token_ids for lease in leases))
    stats = engine.stats()
    tokens = sum(len(prompt) + LENGTH for prompt in PROMPTS)
    assert 0 < stats.kv_tokens < tokens + 32 * len(PROMPTS) and stats.kv_tokens % 32 == 0
    assert (stats.running, stats.waiting, stats.max_sequences) == (5, 0, 512)
    assert stats.kv_capacity > 100_000 and stats.version == rollouts.version
    engine.call("abort", leases)
    engine.finish(leases)


def test_generate_goes_on_beside_segments(rollouts: Rollouts) -> None:
    engine = rollouts.engine
    (whole,) = rollouts.greedy([PROMPTS[1]], 20)
    (lease,) = engine.start([request(PROMPTS[0])])
    assert rollouts.greedy([PROMPTS[1]], 20) == [whole]
    assert engine.finish([lease])[0].reason == "length"
