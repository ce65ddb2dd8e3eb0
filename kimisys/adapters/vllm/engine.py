"""A vLLM engine that samples under published weights: asynchronous, token ids in and out.

    engine = await Engine.start(EngineConfig(folder))  # config.json alone; no weights are read
    await engine.connect(addresses)                    # of kimisys.broadcast publishers
    await engine.update(1)                             # pull, verify, pack, commit
    groups = await engine.generate(prompts, samples=8, max_tokens=48, version=1)
    await engine.close()

Best started in a process of its own with ``environment.environment()``: vLLM changes process-wide
state.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

import kimisys.errors
from kimisys.adapters.vllm.build import EngineConfig, build, check, sampling
from kimisys.adapters.vllm.loop import EngineLoop, EngineTimeoutError, Sample
from kimisys.adapters.vllm.status import report
from kimisys.adapters.vllm.steps import Steps
from kimisys.errors import EngineError, VersionError

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

__all__ = ["Engine", "EngineConfig", "EngineError", "EngineTimeoutError", "Sample"]

T = TypeVar("T")

_CLOSE_SECONDS = 30.0
_SECOND_HAND = {"PeerTimeoutError": 1, "PeerFailedError": 2}  # errors about other ranks


class Engine:
    """One running engine; make it with ``start``. All methods may be called from one event loop.

    It serves exactly one committed version. Calls that sample name the version they want and are
    refused with VersionError when it is another; an update waits for what is being sampled, and
    samples asked for after it wait for it. An update empties the prefix cache, if there is one,
    unless it is told to keep it: nothing computed under one version is found under the next.

    Every call but ``close`` raises EngineTimeoutError when the engine does not answer within the
    configuration's timeout_seconds. What has not begun by then never will; a call that a rank of
    the engine left unanswered also ends the engine's serving.
    """

    def __init__(self, config: EngineConfig, loop: EngineLoop) -> None:
        """Not for callers: see ``start``."""
        self.config = config
        self._loop = loop
        self._steps: Steps | None = None
        self._vocabulary = 0
        self._version: int | None = None
        self._broken = ""

    @classmethod
    async def start(cls, config: EngineConfig) -> Engine:
        """Starts vLLM with random weights; the first update brings those that may be served.

        Raises CheckpointError for a folder without a readable config.json, ValueError for CPUs that
        are not this process', EngineError when vLLM fails.
        """
        check(config)
        engine = cls(config, EngineLoop(lambda: build(config)))
        try:
            engine._steps = await engine._exclusive("start", Steps)
            engine._loop.observe(engine._steps)
            engine._vocabulary = await engine._exclusive(
                "start", lambda llm: llm.model_config.get_vocab_size()
            )
        except BaseException:
            with suppress(EngineTimeoutError):
                engine._loop.close(0.0)
            raise
        return engine

    @property
    def version(self) -> int | None:
        """Whose weights are served; None before the first update."""
        return self._version

    @property
    def loop(self) -> EngineLoop:
        """Its thread, for what is generated in other ways than by `generate`."""
        return self._loop

    @property
    def steps(self) -> Steps:
        """What its steps took, and how full it is."""
        assert self._steps is not None  # as `start` has returned
        return self._steps

    def served(self, version: int | None = None) -> int:
        """The version served. Raises VersionError when it is another than `version` or there is
        none, EngineError when the engine serves no more."""
        self._check_serving()
        if self._version is None:
            raise VersionError(
                "no version is served yet: the engine started with random weights; publish one and "
                "update to it"
            )
        if version is not None and version != self._version:
            raise VersionError(
                f"version {self._version} is served, asked was {version}; update the engine first, "
                "or ask for what it serves"
            )
        return self._version

    async def connect(
        self,
        addresses: Sequence[str | Path],
        timeout_seconds: float = 30.0,
        verify_every: int = 16,
    ) -> None:
        """Connects to the publishers of all trainer ranks and plans the pull.

        verify_every: after so many updates by deltas everything that has landed is digested.
        Raises SnapshotError, LayoutError, PlanError, TraceError.
        """
        info = {
            "addresses": [str(address) for address in addresses],
            "timeout_seconds": timeout_seconds,
            "verify_every": verify_every,
        }
        await self._exclusive(
            "connect", lambda llm: self._rpc(llm, "init_weight_transfer_engine", init_info=info)
        )

    async def update(
        self, version: int, full: bool = False, keep_prefix_cache: bool = False
    ) -> dict[str, Any]:
        """Pulls a published version, verifies it, and serves it from now on.

        full: pull everything, also where the changes would do. keep_prefix_cache: prompts may go on
        from keys and values of former versions, so what is sampled is not that of one version.

        Returns version, base (to which the changes were added; None if everything was pulled),
        seconds (wall, all of it), pull_seconds, digest_seconds, pack_seconds and those of the
        pull's phases (the slowest rank's); over all ranks nbytes (of tensor elements landed),
        wire_nbytes (read from publishers), full_nbytes (what full pulls read), changed (elements
        landed); digests (tensors compared).
        Raises VersionError, DigestError, SnapshotError: the version served before is still served.
        Raises EngineError for whatever fails once packing began: nothing is served until the engine
        is restarted. After an EngineTimeoutError ``version`` tells which of these has come about.
        """
        return await self._exclusive(
            "update", lambda llm: self._update(llm, version, full, keep_prefix_cache)
        )

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samples: int = 1,
        max_tokens: int = 64,
        temperature: float = 1.0,
        stop_token_ids: Sequence[int] = (),
        seed: int | None = None,
        version: int | None = None,
    ) -> list[list[Sample]]:
        """`samples` completions of each prompt, all of them under one version.

        max_tokens: per completion, with the stop token. temperature: 0 is greedy. seed: makes a
        call repeatable if nothing else is sampled at the same time. version: that must be served;
        None takes the one that is.
        Raises VersionError, EngineError; ValueError for a prompt that is empty, too long, or
        not of the vocabulary.
        """
        for index, prompt in enumerate(prompts):
            self.check(f"prompt {index}", prompt, max_tokens)
        params = sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            stop_token_ids=list(stop_token_ids),
            logprobs=0,
        )

        def admit(llm: LLMEngine) -> int:
            served = self.served(version)
            if seed is not None:
                self._rpc(llm, "kimisys_seed", seed=seed)
            return served

        future = self._loop.generate(prompts, samples, params, admit)
        return await self._answer("generate", future)

    async def probe(self, token_ids: Sequence[int], version: int | None = None) -> np.ndarray:
        """What the engine computes: float32[len(token_ids) - 1, vocab], a log-softmax in each row.

        Row i is the distribution of the token at i + 1 given those up to i, at temperature 1.
        Raises VersionError, EngineError; ValueError for fewer than two tokens, too many,
        or others than the vocabulary's.
        """
        if len(token_ids) < 2:
            raise ValueError(f"a probe needs at least two tokens, not {len(token_ids)}")
        self.check("the probe", token_ids, 1)
        params = sampling(max_tokens=1, temperature=0.0, prompt_logprobs=-1)
        future = self._loop.generate([token_ids], 1, params, lambda llm: self.served(version))
        found = (await self._answer("probe", future))[0][0].prompt_log_probs
        assert found is not None  # as it was asked for
        return found

    async def close(self) -> None:
        """Ends the engine and its worker processes; what is being sampled fails. Idempotent."""
        await asyncio.to_thread(self._loop.close, _CLOSE_SECONDS)

    async def _exclusive(self, what: str, call: Callable[[LLMEngine], T]) -> T:
        return await self._answer(what, self._loop.exclusive(call))

    async def _answer(self, what: str, future: Future[T]) -> T:
        """The result of a call that the engine's thread answers; cancelled when it comes late."""
        seconds, waiting = self.config.timeout_seconds, asyncio.wrap_future(future)
        try:
            await asyncio.wait([waiting], timeout=seconds)
            if waiting.done():
                return waiting.result()
        finally:
            waiting.cancel()
        raise EngineTimeoutError(
            f"{self._whole()} did not answer {what} within {seconds:g} s; see what it is doing, or "
            "raise EngineConfig.timeout_seconds"
        )

    def _whole(self) -> str:
        return f"the engine of {self.config.model} (ranks 0 to {self.config.tensor_parallel - 1})"

    def _update(
        self, llm: LLMEngine, version: int, full: bool, keep_prefix_cache: bool
    ) -> dict[str, Any]:
        """In the engine's thread, when nothing is being sampled."""
        self._check_serving()
        if self._version is not None and version <= self._version:
            raise VersionError(
                f"version {self._version} is served, asked was {version}; versions only increase"
            )
        started = time.perf_counter()
        # Half of the time, so that ranks that wait for each other can still say so.
        half = self.config.timeout_seconds / 2
        info = {"version": version, "full": full, "timeout_seconds": half}
        self._rpc(llm, "start_weight_update")
        self._rpc(llm, "update_weights", update_info=info)
        try:
            self._rpc(llm, "finish_weight_update")
            ranks = self._ask(llm, "kimisys_status")
            if any(rank["version"] != version for rank in ranks):
                raise VersionError(f"ranks serve {[rank['version'] for rank in ranks]}")
            if not keep_prefix_cache and not llm.reset_prefix_cache():
                raise EngineError("vLLM did not reset its prefix cache")
            llm.set_weight_version(str(version))
            found = report(version, ranks)
        except BaseException as error:
            # Some ranks compute with the new weights, perhaps all: neither version may be claimed.
            raise self._break(f"packing version {version} failed: {error}") from error
        self._version = version
        return found | {"seconds": time.perf_counter() - started}

    def _break(self, reason: str, kind: type[EngineError] = EngineError) -> EngineError:
        """Ends serving, for good; returns the error to raise."""
        self._version, self._broken = None, reason
        return kind(f"{reason}; restart the engine")

    def _ask(self, llm: LLMEngine, method: str, *arguments: Any) -> list[Any]:
        """The answers of all ranks. Raises EngineTimeoutError when one does not come in time,
        EngineError when vLLM has lost one."""
        seconds = self.config.timeout_seconds
        asked = " ".join(map(str, [method, *arguments[:1]]))
        try:
            return llm.collective_rpc(method, timeout=seconds, args=arguments)
        except RuntimeError as error:  # of the executor: what a rank's method raises is an answer
            raise self._break(f"{self._whole()} failed at {asked}: {error}") from error
        except TimeoutError as error:
            # A late answer would be taken for the answer to the next call.
            reason = f"ranks of {self._whole()} did not answer {asked} within {seconds:g} s"
            raise self._break(reason, EngineTimeoutError) from error

    def _rpc(self, llm: LLMEngine, method: str, **arguments: Any) -> None:
        """Calls a method of every rank. Raises what a rank raised if it is of kimisys.errors."""
        answers = self._ask(llm, "kimisys_call", method, arguments)
        failed = [(rank, answer) for rank, answer in enumerate(answers) if answer is not None]
        if not failed:
            return
        # A rank that gave up because of another has less to tell.
        failed.sort(key=lambda failure: _SECOND_HAND.get(failure[1][0], 0))
        rank, (kind, message, trace) = failed[0]
        if kind == "PeerTimeoutError":
            raise EngineTimeoutError(message)
        known = getattr(kimisys.errors, kind, None)
        if known is not None:
            raise known(message)
        raise EngineError(
            f"{method} failed at rank {rank} of the engine: {kind}: {message}\n{trace}"
        )

    def _check_serving(self) -> None:
        if self._broken:
            raise EngineError(f"{self._broken}; restart the engine")

    def check(self, name: str, token_ids: Sequence[int], max_tokens: int) -> None:
        """Raises ValueError, saying `name`, for what vLLM would cut short or die of."""
        if max_tokens < 1:
            raise ValueError(f"{name}: max_tokens is {max_tokens}; it must be at least 1")
        room = self.config.max_length - max_tokens
        if not 0 < len(token_ids) <= room:
            raise ValueError(
                f"{name} has {len(token_ids)} tokens; with max_tokens {max_tokens} it may have 1 "
                f"to {room}, as the engine's max_length is {self.config.max_length}"
            )
        if min(token_ids) < 0 or max(token_ids) >= self._vocabulary:
            raise ValueError(
                f"{name} has tokens from {min(token_ids)} to {max(token_ids)}; the vocabulary of "
                f"{self.config.model} has those from 0 to {self._vocabulary - 1}"
            )
