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
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

import kimisys.errors
from kimisys.adapters.vllm import environment
from kimisys.adapters.vllm.loop import EngineError, EngineLoop, EngineTimeoutError, Sample
from kimisys.adapters.vllm.status import report
from kimisys.errors import CheckpointError, VersionError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

__all__ = ["Engine", "EngineConfig", "EngineError", "EngineTimeoutError", "Sample"]

T = TypeVar("T")

_CLOSE_SECONDS = 30.0
_SECOND_HAND = {"PeerTimeoutError": 1, "PeerFailedError": 2}  # errors about other ranks
_BLOCK_TOKENS = 32  # of a cache block: the smallest that the CPU's attention likes


@dataclass(frozen=True)
class EngineConfig:
    """How to start an engine."""

    model: Path
    """Folder with a Hugging Face config.json; weights in it are not read."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; publishers must publish in it."""
    tensor_parallel: int = 1
    """Ranks of the engine. One runs in this process, more are worker processes."""
    max_length: int = 256
    """Largest number of tokens in a prompt and its completion together."""
    max_sequences: int = 512
    """Sequences in one step."""
    max_batched_tokens: int = 8192
    """Tokens in one step: bounds the prompts that begin together."""
    kv_cache_bytes: int = 512 << 20
    """Memory of the key-value cache of a rank, allocated at start."""
    prefix_caching: bool = False
    """Keys and values of whole blocks of a prompt are found again by later prompts. Of no use for
    prompts that are about as short as a block."""
    threads: int = 2
    """OpenMP threads of an engine in this process."""
    seed: int = 0
    """Of sampling, for calls that give none."""
    timeout_seconds: float = 600.0
    """Longest wait of a call for the engine, its turn included, and of the engine for its ranks."""


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
        self._version: int | None = None
        self._broken = ""

    @classmethod
    async def start(cls, config: EngineConfig) -> Engine:
        """Starts vLLM with random weights; the first update brings those that may be served.

        Raises CheckpointError for a folder without a readable config.json, EngineError when vLLM
        fails.
        """
        _check_folder(config.model)
        engine = cls(config, EngineLoop(lambda: _build(config)))
        try:
            await engine._exclusive("start", lambda llm: None)
        except BaseException:
            with suppress(EngineTimeoutError):
                engine._loop.close(0.0)
            raise
        return engine

    @property
    def version(self) -> int | None:
        """Whose weights are served; None before the first update."""
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
        Raises VersionError, EngineError; ValueError for a prompt that is empty or too long.
        """
        self._check_lengths(prompts, max_tokens)
        params = _sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            stop_token_ids=list(stop_token_ids),
            logprobs=0,
        )

        def admit(llm: LLMEngine) -> int:
            served = self._check_version(version)
            if seed is not None:
                self._rpc(llm, "kimisys_seed", seed=seed)
            return served

        future = self._loop.generate(prompts, samples, params, admit)
        return await self._answer("generate", future)

    async def probe(self, token_ids: Sequence[int], version: int | None = None) -> np.ndarray:
        """What the engine computes: float32[len(token_ids) - 1, vocab], a log-softmax in each row.

        Row i is the distribution of the token at i + 1 given those up to i, at temperature 1.
        Raises VersionError, EngineError; ValueError for fewer than two tokens, or too many.
        """
        if len(token_ids) < 2:
            raise ValueError(f"a probe needs at least two tokens, not {len(token_ids)}")
        self._check_lengths([token_ids], 1)
        params = _sampling(max_tokens=1, temperature=0.0, prompt_logprobs=-1)
        future = self._loop.generate(
            [token_ids], 1, params, lambda llm: self._check_version(version)
        )
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

    def _check_version(self, version: int | None) -> int:
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

    def _check_lengths(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
        room = self.config.max_length - max_tokens
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= room:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens; with max_tokens {max_tokens} it may "
                    f"have 1 to {room}, as the engine's max_length is {self.config.max_length}"
                )


def _build(config: EngineConfig) -> LLMEngine:
    """The vLLM engine; called in the thread that will step it."""
    environment.apply(config.tensor_parallel)
    import torch

    torch._dynamo.config.disable = True  # TORCHDYNAMO_DISABLE, for a process that has torch already
    torch.set_num_threads(config.threads)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from kimisys.adapters.vllm import plugin

    plugin.register()
    _register_models(config.model)
    arguments = EngineArgs(
        model=str(config.model),
        dtype=config.dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        tensor_parallel_size=config.tensor_parallel,
        max_model_len=config.max_length,
        max_num_seqs=config.max_sequences,
        max_num_batched_tokens=max(config.max_batched_tokens, config.max_length),
        kv_cache_memory_bytes=config.kv_cache_bytes,
        block_size=_BLOCK_TOKENS,
        enable_prefix_caching=config.prefix_caching,
        logprobs_mode="processed_logprobs",
        max_logprobs=-1,
        seed=config.seed,
        disable_log_stats=True,
        weight_transfer_config={"backend": plugin.BACKEND},  # type: ignore[arg-type]
        worker_extension_cls="kimisys.adapters.vllm.weight_transfer.WorkerReport",
    )
    return LLMEngine.from_engine_args(arguments)


def _register_models(folder: Path) -> None:
    """Imports the model's class here; vLLM would inspect it in a child process (10 s, once)."""
    from vllm.model_executor.models import ModelRegistry

    for name in json.loads((folder / "config.json").read_text())["architectures"]:
        known = ModelRegistry.models.get(name)
        load = getattr(known, "load_model_cls", None)
        if load is not None:
            ModelRegistry.register_model(name, load())


def _check_folder(folder: Path) -> None:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; give a folder with a Hugging Face config.json"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("architectures"), list):
        raise CheckpointError(
            f"{path} does not name its architectures, so vLLM does not know what to build; add "
            '"architectures", for example ["Qwen3ForCausalLM"]'
        )


def _sampling(**options: Any) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # ignore_eos: only the caller's stop tokens end a sample, not what config.json calls eos.
    return SamplingParams(
        ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **options
    )
