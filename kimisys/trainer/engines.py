"""The inference side of a run: vLLM engines that follow published versions and share the
sampling."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kimisys.adapters.ray import Actors, share
from kimisys.adapters.vllm.engine import EngineConfig, Sample
from kimisys.adapters.vllm.environment import environment
from kimisys.trainer.engine_actor import EngineActor
from kimisys.trainer.engine_client import EngineClient

_SEED_STRIDE = 7_919  # between the seeds of two engines


@dataclass(frozen=True)
class Sync:
    """One version that all engines serve; sums over all of them. nbytes: of the elements written.
    digests: compared. wire_nbytes: received. full_nbytes: of full pulls of the same version."""

    version: int
    nbytes: int
    digests: int
    wire_nbytes: int
    full_nbytes: int

    @classmethod
    def of(cls, version: int, reports: Sequence[Mapping[str, Any]]) -> Sync:
        """Of what Engine.update reports of each engine."""
        keys = ("nbytes", "digests", "wire_nbytes", "full_nbytes")
        return cls(version, *(sum(report[key] for report in reports) for key in keys))


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. temperature: 0 is greedy. max_tokens: of a completion, its
    end-of-sequence token included."""

    samples: int
    temperature: float
    max_tokens: int
    stop_token_ids: Sequence[int]
    seed: int


class Engines:
    """`count` engines of `tensor_parallel` ranks each, actors among `actors`.

    model: folder with a config.json; its weights are not read. max_length: tokens of a prompt and
    its completion together. threads: of each engine; 0 shares the processors among them. name: of
    the actors, before their number. pinned: whether each has processors of its own.
    """

    def __init__(
        self,
        actors: Actors,
        model: Path,
        dtype: Literal["float32", "bfloat16"],
        max_length: int,
        count: int = 1,
        tensor_parallel: int = 1,
        seed: int = 0,
        timeout_seconds: float = 600.0,
        name: str = "engine",
        threads: int = 0,
        pinned: bool = False,
    ) -> None:
        self._actors = actors
        self._names = [f"{name} {i}" for i in range(count)]
        self._starting: dict[str, Any] = {}
        self._config = EngineConfig(
            model,
            dtype=dtype,
            tensor_parallel=tensor_parallel,
            max_length=max_length,
            threads=threads or threads_for(count),
            seed=seed,
            timeout_seconds=timeout_seconds,
        )
        self._pinned = pinned

    @property
    def count(self) -> int:
        """How many engines."""
        return len(self._names)

    def check(self) -> None:
        """Raise ActorLostError if an actor of the run has died, an engine's or another."""
        self._actors.check()

    def clients(self) -> list[EngineClient]:
        """Each engine as one that makes segments, for an event loop in this process."""
        return [EngineClient(self._actors, name) for name in self._names]

    def steps(self) -> list[np.ndarray]:
        """Each engine's timed steps since the last call: kimisys.adapters.vllm.steps.STEP."""
        return self._all("segments_steps")

    def start(self) -> None:
        """Begin to start them; `connect` waits for it."""
        variables = environment(self._config.threads)
        for number, name in enumerate(self._names):
            cpus = cpus_of(number, self.count) if self._pinned else ()
            self._actors.spawn(name, EngineActor, variables, replace(self._config, cpus=cpus))
            self._starting[name] = self._actors.begin(name, "start")

    def connect(self, addresses: Sequence[Path], verify_every: int = 16) -> None:
        """Let each engine, once started, plan its pull from the publishers at `addresses`.

        verify_every: after so many updates by deltas everything that has landed is digested.
        """
        self._actors.wait(self._starting)
        self._all("connect", [str(address) for address in addresses], verify_every)

    def update(self, version: int, full: bool = False) -> Sync:
        """Let every engine pull, verify and commit the published `version`, by deltas where it can
        unless `full`.

        Raises DigestError when one of them refuses what it got: others may serve it already.
        """
        return Sync.of(version, self._all("update", version, full))

    def generate(
        self, prompts: Sequence[Sequence[int]], how: Sampling, version: int
    ) -> list[list[Sample]]:
        """`how.samples` completions of each prompt under `version`; prompts are dealt out in
        turn."""
        count = len(self._names)
        calls = {
            name: self._actors.begin(
                name,
                "generate",
                prompts[i::count],
                how.samples,
                how.max_tokens,
                how.temperature,
                how.stop_token_ids,
                how.seed + i * _SEED_STRIDE,
                version,
            )
            for i, name in enumerate(self._names)
            if prompts[i::count]
        }
        answers = list(self._actors.wait(calls).values())
        return [answers[i % count][i // count] for i in range(len(prompts))]

    def probe(self, tokens: Sequence[int], version: int) -> list[np.ndarray]:
        """Each engine's log-softmax after each token but the last: float32[tokens - 1, vocab]."""
        return self._all("probe", tokens, version)

    def _all(self, method: str, *args: Any) -> list[Any]:
        shared = [share(argument) for argument in args]
        calls = {name: self._actors.begin(name, method, *shared) for name in self._names}
        return list(self._actors.wait(calls).values())


def threads_for(engines: int) -> int:
    """Threads of each when so many engines share the processors."""
    return max(1, len(os.sched_getaffinity(0)) // engines)


def cpus_of(engine: int, engines: int) -> tuple[int, ...]:
    """The processors that are this engine's when they are shared out evenly."""
    cpus, share = sorted(os.sched_getaffinity(0)), threads_for(engines)
    return tuple(cpus[engine * share : (engine + 1) * share])
