"""The rollouts of a run: a driver with its event loop in a thread of its own, so that engines go
on sampling while the ranks train."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, TypeVar

from kimisys.rollout import Batch, Config, Driver, Prompt, RepetitionConfig, Span
from kimisys.trainer.config import TrainConfig
from kimisys.trainer.rollout_engine import RolloutEngine
from kimisys.trainer.rollout_log import RolloutLog

T = TypeVar("T")

CLOSE_SECONDS = 30.0
_LOOK_SECONDS = 1.0  # between two looks at who is alive


class Rollouts:
    """Groups of completions, sampled by `engines` as the scheduler of `config` decides.

    To be entered once the engines serve a version: from then on they may be sampling until it is
    left. What the driver raises is raised by the next call. Between a batch and the next nothing
    runs, with --deployment hybrid. alive: raises the death of anyone that the run needs, so that no
    batch is waited for in vain.
    """

    def __init__(
        self,
        config: TrainConfig,
        token_budget: int,
        engines: Sequence[RolloutEngine],
        prompts: Callable[[int], Sequence[Prompt]],
        stop_token: int,
        log: RolloutLog,
        alive: Callable[[], None],
    ) -> None:
        self._make = lambda: Driver(
            scheduler_config(config, token_budget),
            engines,
            prompts,
            stop_token_ids=(stop_token,),
            # what is sampled together is a matter of time here, so seeds would repeat nothing
            seed=None if config.partial else config.seed,
            repetition=RepetitionConfig() if config.partial and config.early_stop else None,
            trace=log.trace,
            # the engines' clients give up earlier, by name; following a version takes three calls
            command_timeout=4 * config.ready_timeout,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._driver: Driver | None = None
        self._engines, self._alive, self.log = list(engines), alive, log
        self._token_budget = token_budget if config.partial else None
        self._overlap = config.deployment == "disaggregated"
        self._noted = time.monotonic(), 0.0  # when figures were last asked for, how busy till then
        self._batched: float | None = None  # when the last batch came
        self._seconds = self._idle = 0.0  # of sampling, and of nothing to do, for the last batch

    def __enter__(self) -> Rollouts:
        self._thread.start()
        try:
            self._driver = self._call(self._start())
            self._noted = time.monotonic(), self._busy()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._driver is not None:
                closing = self._driver.__aexit__(kind, error, trace)
                # whoever has died by now is no reason not to let go of the others
                asyncio.run_coroutine_threadsafe(closing, self._loop).result(CLOSE_SECONDS)
        finally:
            self._end()

    @property
    def engines(self) -> int:
        """How many."""
        return len(self._engines)

    def batch(self) -> Batch:
        """Wait for the next batch of finished groups, at least one."""
        busy, before = self._busy(), self._batched
        batch = self._call(self._started().batch())
        self.check()
        self._batched = time.monotonic()
        self._idle = max(0.0, batch.seconds * self.engines - (self._busy() - busy))
        self._seconds = batch.seconds
        if self._overlap and before is not None:
            self._seconds = self._batched - before
        return batch

    def publish(self, version: int) -> None:
        """Tell the engines of a published `version`. Returns when all serve it, with --deployment
        hybrid."""
        self._call(self._started().publish(version))
        self.check()

    def check(self) -> None:
        """Raise what an engine has failed with: the others could go on, but a run stops."""
        for error in self._started().failures.values():
            raise error

    def figures(self, batch: Batch) -> dict[str, Any]:
        """The metrics of how the last batch was sampled; engines since the last call."""
        now, busy = time.monotonic(), self._busy()
        elapsed, worked = now - self._noted[0], busy - self._noted[1]
        self._noted = now, busy
        return {
            "made_tokens": batch.tokens,
            "token_budget": self._token_budget,
            "dropped": len(batch.dropped),
            "rollout_seconds": batch.seconds,
            "rollout_tokens_per_second": batch.tokens / self._seconds,
            "utilisation": min(1.0, worked / (elapsed * self.engines)),
            "idle_seconds": self._idle,
        }

    def spans(self) -> list[Span]:
        """The segments that have ended since the last call."""
        return self._call(self._take_spans())

    def _busy(self) -> float:
        return sum(engine.busy_seconds for engine in self._engines)

    async def _take_spans(self) -> list[Span]:
        return self._started().take_spans()

    async def _start(self) -> Driver:
        driver = self._make()
        await driver.__aenter__()
        return driver

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` gives in the loop, waited for as long as everybody lives."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        while True:
            try:
                return future.result(_LOOK_SECONDS)
            except TimeoutError:
                if future.done():  # meanwhile, or of a TimeoutError of its own
                    return future.result()
                self._alive()

    def _started(self) -> Driver:
        assert self._driver is not None, "the rollouts have not begun"
        return self._driver

    def _end(self) -> None:
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)
        self._loop.close()


async def _cancel_others() -> None:
    """What a driver that could not be closed has left running."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=CLOSE_SECONDS / 2)


def scheduler_config(config: TrainConfig, token_budget: int) -> Config:
    """What the scheduler is told. token_budget: used with --rollouts budget."""
    timeout = int(config.ready_timeout * 1e6)
    if not config.partial:
        # all at once and nothing moves, so that a run does the same again
        return Config(
            deployment="alternate",
            placement="group_round_robin",
            order="fifo",
            concurrency="fixed",
            groups=config.prompts,
            lease_timeout=timeout,
        )
    return Config(
        deployment="alternate" if config.deployment == "hybrid" else "overlap",
        placement=config.placement,
        order=config.order,
        staleness=config.staleness,
        token_budget=token_budget,
        # admission counts in batches, which have to have a size for that
        groups=config.prompts if config.staleness == "admission" else 0,
        live_limit=config.live_limit or config.prompts * config.samples,
        max_staleness=config.max_staleness,
        lease_timeout=timeout,
    )
