"""The inference side of a run: vLLM engines that follow published versions and share the
sampling."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kimisys.adapters.ray import Actors, share
from kimisys.adapters.vllm.engine import EngineConfig, Sample
from kimisys.adapters.vllm.environment import environment
from kimisys.trainer.engine_actor import EngineActor

_SEED_STRIDE = 7_919  # between the seeds of two engines


@dataclass(frozen=True)
class Sync:
    """One version that all engines serve. nbytes, digests: pulled and compared, by all together."""

    version: int
    nbytes: int
    digests: int


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
    its completion together. name: of the actors, before their number.
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
    ) -> None:
        self._actors = actors
        self._names = [f"{name} {i}" for i in range(count)]
        self._starting: dict[str, Any] = {}
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        self._config = EngineConfig(
            model,
            dtype=dtype,
            tensor_parallel=tensor_parallel,
            max_length=max_length,
            threads=threads,
            seed=seed,
            timeout_seconds=timeout_seconds,
        )

    def start(self) -> None:
        """Begin to start them; `connect` waits for it."""
        for name in self._names:
            variables = environment(self._config.threads)
            self._actors.spawn(name, EngineActor, variables, self._config)
            self._starting[name] = self._actors.begin(name, "start")

    def connect(self, addresses: Sequence[Path]) -> None:
        """Let each engine, once started, plan its pull from the publishers at `addresses`."""
        self._actors.wait(self._starting)
        self._all("connect", [str(address) for address in addresses])

    def update(self, version: int) -> Sync:
        """Let every engine pull, verify and commit the published `version`.

        Raises DigestError when one of them refuses what it got: others may serve it already.
        """
        reports = self._all("update", version)
        nbytes, digests = (sum(r[key] for r in reports) for key in ("nbytes", "digests"))
        return Sync(version, nbytes, digests)

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
