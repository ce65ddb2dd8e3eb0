"""A vLLM engine in a thread of its own: requests are admitted and stepped there, callers await.

The scheduler and, without tensor parallelism, the model run in this process. vLLM's output
processor is left out: token ids and log-probabilities are taken as the engine core gives them.
"""

from __future__ import annotations

import atexit
import copy
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kimisys.errors import KimisysError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.llm_engine import LLMEngine

T = TypeVar("T")

_EXIT_SECONDS = 30.0


class EngineError(KimisysError):
    """The engine is closed, failed, or refuses to serve; the message says why."""


class EngineTimeoutError(EngineError):
    """The engine, or ranks of it, did not answer in time; the message says who was waited for."""


@dataclass(frozen=True)
class Sample:
    """One completion of a prompt.

    token_ids: generated, with the stop token if there is one. log_probs: natural, of each generated
    token under the distribution it was sampled from. finish_reason: "stop" or "length".
    version: of the weights that generated all of it. prompt_log_probs: if asked for,
    float32[len(prompt) - 1, vocab].
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    version: int
    prompt_log_probs: np.ndarray | None = None


@dataclass
class _Live:
    """A sample that is being generated."""

    batch: _Batch
    position: tuple[int, int]
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[np.ndarray] = field(default_factory=list)
    prompt_log_probs: np.ndarray | None = None


@dataclass
class _Batch:
    """One call of ``generate``: admitted as a whole, answered as a whole."""

    prompts: Sequence[Sequence[int]]
    samples: int
    params: SamplingParams
    admit: Callable[[LLMEngine], int]
    future: Future[list[list[Sample]]] = field(default_factory=Future)
    done: list[list[Sample | None]] = field(default_factory=list)
    pending: int = 0
    version: int = 0


@dataclass
class _Exclusive:
    """A call that runs when no sample is being generated."""

    call: Callable[[LLMEngine], Any]
    future: Future[Any] = field(default_factory=Future)


class EngineLoop:
    """Owns the engine and its thread.

    Jobs are taken in order. An exclusive job waits until what is running has finished, and what was
    submitted after it waits for it, so weights never change under a sample.

    build: makes the engine, in the thread. The first exclusive job tells whether that went well.
    """

    def __init__(self, build: Callable[[], LLMEngine]) -> None:
        self._build = build
        self._inbox: queue.SimpleQueue[_Batch | _Exclusive | None] = queue.SimpleQueue()
        self._held: _Exclusive | None = None
        self._live: dict[str, _Live] = {}
        self._requests = 0
        self._lock = threading.Lock()  # of _ended, against jobs that nobody would answer
        self._ended = ""
        self._thread = threading.Thread(target=self._run, name="kimisys-engine", daemon=True)
        self._thread.start()
        # An interpreter that ends under the thread aborts in one of torch's.
        atexit.register(self.close, _EXIT_SECONDS)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samples: int,
        params: SamplingParams,
        admit: Callable[[LLMEngine], int],
    ) -> Future[list[list[Sample]]]:
        """`samples` completions of each prompt. Cancelling the future ends their generation.

        admit: called in the thread when the batch's turn has come; returns the version that will
        generate it, or raises what the caller shall see.
        """
        batch = _Batch(prompts, samples, params, admit)
        self._submit(batch)
        return batch.future

    def exclusive(self, call: Callable[[LLMEngine], T]) -> Future[T]:
        """Runs `call` in the thread when no sample is being generated."""
        job = _Exclusive(call)
        self._submit(job)
        return job.future

    def close(self, timeout_seconds: float) -> None:
        """Ends the engine and its thread; what is running fails with EngineError. Idempotent.

        Raises EngineTimeoutError when it does not end in time; it ends when it comes to it.
        """
        self._inbox.put(None)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise EngineTimeoutError(f"the engine did not end within {timeout_seconds:g} s")
        atexit.unregister(self.close)

    def _submit(self, job: _Batch | _Exclusive) -> None:
        with self._lock:
            if self._ended:
                raise EngineError(self._ended)
            self._inbox.put(job)

    def _run(self) -> None:
        reason = "the engine is closed"
        engine: LLMEngine | None = None
        try:
            engine = self._build()
            while self._take(engine):
                self._step(engine)
        except BaseException as error:
            reason = f"the engine failed: {type(error).__name__}: {error}"
            self._end(reason, error)
        else:
            self._end(reason, None)
        finally:
            if engine is not None:
                engine.engine_core.shutdown()

    def _take(self, engine: LLMEngine) -> bool:
        """Admits what has come; blocks while there is nothing to do. False: the loop shall end."""
        while True:
            if self._held is not None:
                if self._live:
                    return True
                job, self._held = self._held, None
                _answer(job.future, lambda job=job: job.call(engine))  # type: ignore[misc]
            try:
                taken = self._inbox.get(block=not self._live)
            except queue.Empty:
                return True
            if taken is None:
                return False
            if isinstance(taken, _Exclusive):
                self._held = taken
            else:
                self._admit(engine, taken)

    def _admit(self, engine: LLMEngine, batch: _Batch) -> None:
        if batch.future.cancelled():
            return
        try:
            batch.version = batch.admit(engine)
            requests = [self._request(engine, prompt, batch.params) for prompt in batch.prompts]
        except Exception as error:
            refusal = error
            _answer(batch.future, lambda: _raise(refusal))
            return
        batch.done = [[None] * batch.samples for _ in requests]
        batch.pending = len(requests) * batch.samples
        if not batch.pending:
            _answer(batch.future, lambda: batch.done)
        for row, request in enumerate(requests):
            for column in range(batch.samples):
                # Parameters are shared by the samples: without a seed of their own they may be.
                sample = copy.copy(request)
                sample.request_id = f"{request.request_id}-{column}"
                sample.external_req_id = sample.request_id
                self._live[sample.request_id] = _Live(batch, (row, column))
                engine.engine_core.add_request(sample)

    def _request(self, engine: LLMEngine, prompt: Sequence[int], params: SamplingParams) -> Any:
        """vLLM's request for one prompt, checked by vLLM."""
        from vllm.inputs import tokens_input

        self._requests += 1
        return engine.input_processor.process_inputs(
            str(self._requests),
            tokens_input(list(prompt)),
            params,
            supported_tasks=engine.get_supported_tasks(),
        )

    def _step(self, engine: LLMEngine) -> None:
        cancelled = [id_ for id_, live in self._live.items() if live.batch.future.cancelled()]
        if cancelled:
            engine.engine_core.abort_requests(cancelled)
            for request_id in cancelled:
                del self._live[request_id]
        if not self._live:
            return
        for output in engine.engine_core.get_output().outputs:
            live = self._live.get(output.request_id)
            if live is not None:
                self._collect(output, live)

    def _collect(self, output: EngineCoreOutput, live: _Live) -> None:
        live.token_ids.extend(output.new_token_ids)
        if output.new_logprobs is not None:
            live.log_probs.append(output.new_logprobs.logprobs[:, 0])
        if output.new_prompt_logprobs_tensors is not None:
            live.prompt_log_probs = _by_token(output.new_prompt_logprobs_tensors)
        if output.finish_reason is None:
            return
        del self._live[output.request_id]
        batch, (row, column) = live.batch, live.position
        batch.done[row][column] = Sample(
            live.token_ids,
            np.concatenate(live.log_probs).tolist() if live.log_probs else [],
            str(output.finish_reason),
            batch.version,
            live.prompt_log_probs,
        )
        batch.pending -= 1
        if not batch.pending and batch.future.set_running_or_notify_cancel():
            batch.future.set_result(batch.done)  # type: ignore[arg-type]  # none is None any more

    def _end(self, reason: str, cause: BaseException | None) -> None:
        """Fails all that is running or waiting, and all that comes."""
        with self._lock:
            self._ended = reason
        futures: set[Future[Any]] = {live.batch.future for live in self._live.values()}
        if self._held is not None:
            futures.add(self._held.future)
        while not self._inbox.empty():
            job = self._inbox.get()
            if job is not None:
                futures.add(job.future)
        self._live.clear()
        for future in futures:
            error = EngineError(reason)
            error.__cause__ = cause
            _answer(future, lambda error=error: _raise(error))  # type: ignore[misc]


def _answer(future: Future[Any], call: Callable[[], Any]) -> None:
    if future.done() or not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)


def _raise(error: BaseException) -> None:
    raise error


def _by_token(tensors: Any) -> np.ndarray:
    """float32[positions, vocab] from vLLM's rows: sorted, after the prompt's own token."""
    ids = tensors.logprob_token_ids.numpy()[:, 1:].astype(np.int64)
    found = np.full(ids.shape, -np.inf, np.float32)
    np.put_along_axis(found, ids, tensors.logprobs.numpy()[:, 1:], axis=1)
    return found
