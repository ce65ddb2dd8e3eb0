"""What each step of an engine took, and how full the engine is: read off vLLM's own scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from kimisys.adapters.vllm.loop import Observer

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.llm_engine import LLMEngine

STEP = np.dtype(
    [
        ("number", np.int64),
        ("start", np.float64),
        ("seconds", np.float64),
        ("batch", np.int32),
        ("kv_tokens", np.int64),
        ("prefill_tokens", np.int32),
        ("new_tokens", np.int32),
        ("preempted", np.int32),
    ]
)
"""One step. number: counted from 0. start: seconds of time.monotonic(). seconds: of scheduling,
computing, sampling and handing on. batch: sequences. kv_tokens: whose keys and values the running
sequences have when it is done. prefill_tokens: computed by sequences that compute more than one.
new_tokens: sampled. preempted: sequences that lost their keys and values for want of memory."""

_KEPT = 1 << 16  # steps: at 5 ms each those of the last five minutes, in 3 MB

_computed = attrgetter("num_computed_tokens")


class Steps(Observer):
    """Records the steps of an engine whose scheduler is in this process.

    Told of the steps in the engine's thread; asked in any.
    """

    def __init__(self, engine: LLMEngine, kept: int = _KEPT) -> None:
        client: Any = engine.engine_core
        self._scheduler: Scheduler = client.engine_core.scheduler
        self._ring = np.zeros(kept, STEP)
        self._number = self._taken = 0
        self._open = np.zeros(1, STEP)
        # vLLM tells nobody what it has scheduled, unless all of its statistics are on.
        self._schedule: Callable[..., SchedulerOutput] = self._scheduler.schedule
        self._scheduler.schedule = self._noted  # type: ignore[method-assign]
        cache = engine.vllm_config.cache_config
        self._block_tokens: int = cache.block_size
        # One block holds nothing: vLLM points to it where there is nothing to attend to.
        self.kv_capacity: int = (int(cache.num_gpu_blocks or 0) - 1) * self._block_tokens
        """Tokens that the key-value cache holds, in whole blocks."""
        self.max_sequences: int = engine.vllm_config.scheduler_config.max_num_seqs

    def step_begins(self) -> None:
        self._open[0] = np.zeros((), STEP)
        self._open["start"] = time.monotonic()

    def step_ended(self, new_tokens: int) -> None:
        step = self._open[0]
        if not step["batch"]:
            return  # nothing was to be computed
        step["seconds"] = time.monotonic() - step["start"]
        step["new_tokens"], step["number"] = new_tokens, self._number
        self._ring[self._number % len(self._ring)] = step
        self._number += 1

    def take(self) -> np.ndarray:
        """STEP[steps since the last call]; where that was too long ago the oldest are missing, as
        `number` tells."""
        end = self._number
        first = max(self._taken, end - len(self._ring))
        self._taken = end
        return self._ring[np.arange(first, end) % len(self._ring)]

    @property
    def kv_tokens(self) -> int:
        """Tokens of the key-value cache that are in use, in whole blocks."""
        pool = self._scheduler.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks() * self._block_tokens
        return self.kv_capacity - int(free)

    @property
    def counts(self) -> tuple[int, int]:
        """Sequences that run, and that wait in vLLM."""
        running, waiting = self._scheduler.get_request_counts()
        return running, waiting

    def _noted(self, *arguments: Any, **options: Any) -> SchedulerOutput:
        """vLLM's schedule(), with what it decided written down."""
        output = self._schedule(*arguments, **options)
        step = self._open[0]
        scheduled = output.num_scheduled_tokens
        step["batch"] = len(scheduled)
        step["prefill_tokens"] = sum(count for count in scheduled.values() if count > 1)
        step["kv_tokens"] = sum(map(_computed, self._scheduler.running))
        step["preempted"] = len(output.preempted_req_ids or ())
        return output
