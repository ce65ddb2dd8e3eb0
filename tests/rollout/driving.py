"""A driver over toy engines, and what must be true of whatever it did."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from toy_engine import ToyEngine, log_prob, long_tailed, prompt, whole
from virtual_time import run

from kimisys.rollout import Batch, Config, Driver, Group, Prompt, replay

BUDGET = Config(token_budget=500)


class Prompts:
    """Offers prompts with keys 0, 1, 2, …, `most` at all, and remembers them."""

    def __init__(self, most: int = 1 << 30, samples: int = 2, limit: int = 64) -> None:
        self.offered: list[Prompt] = []
        self.most, self.samples, self.limit = most, samples, limit

    def __call__(self, count: int) -> Sequence[Prompt]:
        first = len(self.offered)
        keys = range(first, min(first + count, self.most))
        made = [prompt(key, self.samples, self.limit) for key in keys]
        self.offered += made
        return made


def check_group(group: Group, length: Callable[[int], int] = long_tailed) -> None:
    """Every trajectory is what one engine alone would have made, and its log-probs are its own."""
    for trajectory in group.trajectories:
        tokens = trajectory.token_ids.tolist()
        if tokens:
            expected = whole(group.prompt, tokens[0], length)
            assert tokens == (expected if trajectory.reason else expected[: len(tokens)])
        np.testing.assert_allclose(trajectory.log_probs, [log_prob(t) for t in tokens], rtol=1e-6)
        assert (np.diff(trajectory.versions) >= 0).all()
        assert len(trajectory.versions) == len(tokens) == len(trajectory)
        if trajectory.reason == "length":
            assert len(tokens) == group.prompt.limit


def check_all(driver: Driver, prompts: Prompts, batches: Iterable[Batch], trace: Path) -> None:
    """Nothing lost, nothing twice, and the recorded events lead to the same decisions."""
    batches = list(batches)
    handed_over = [g.prompt.key for b in batches for g in b.groups]
    dropped = [d.group.prompt.key for b in batches for d in b.dropped]
    left = [p.key for p in driver.buffer.unfinished()]
    known = sorted(handed_over + dropped + left)
    # What was dropped since the last batch is in none yet.
    missing = len(prompts.offered) - len(known)
    ledger = driver.ledger
    assert missing == ledger.dropped_groups - len(dropped)
    assert len(set(known)) == len(known)
    assert ledger.trained_groups == len(handed_over)
    assert ledger.trained.tokens == sum(g.tokens for b in batches for g in b.groups)
    driver.scheduler.audit()
    again = replay(trace)
    assert again.equal and again.first_difference is None and again.unread == 0


def drive(
    tmp_path: Path,
    engines: Sequence[ToyEngine],
    work: Callable[[Driver], Awaitable[Iterable[Batch]]],
    *,
    config: Config = BUDGET,
    prompts: Prompts | None = None,
    **options: Any,
) -> Driver:
    """Runs `work`, in virtual time; it returns the batches that it got. Checks them, and that no
    task is left."""
    offers = Prompts() if prompts is None else prompts
    trace = tmp_path / "trace"

    async def main() -> Driver:
        driver = Driver(config, engines, offers, trace=trace, **options)
        async with asyncio.timeout(600), driver:
            batches = list(await work(driver))
            number = [b.number for b in batches]
            assert number == sorted(set(number))
        for batch in batches:
            for group in batch.groups:
                assert group.complete
                check_group(group, engines[0].length)
        check_all(driver, offers, batches, trace)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return driver

    return run(main())


async def iterate(driver: Driver, iterations: int, first_version: int = 1) -> list[Batch]:
    """Batches, with a new version after each."""
    batches = []
    for version in range(first_version, first_version + iterations):
        batches.append(await driver.batch())
        await driver.publish(version)
    return batches
