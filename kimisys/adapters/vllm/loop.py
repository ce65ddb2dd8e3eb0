"""A vLLM engine in a thread of its own: requests are admitted and stepped there, callers await.

The scheduler and, without tensor parallelism, the model run in this process. vLLM's output
processor is left out: token ids and log-probabilities are taken as the engine core gives them.
"""

from __future__ import annotations

import atexit
import copy
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kimisys.errors import EngineError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.llm_engine import LLMEngine

T = TypeVar("T")

_EXIT_SECONDS = 30.0


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


class Live:
    """A request that is being generated; its methods are called in the engine's thread."""

    @property
    def cancelled(self) -> bool:
        """Nobody wants it any more."""
        return False

    def collect(self, output: EngineCoreOutput) -> bool:
        """Takes what a step made. True: the request has ended."""
        raise NotImplementedError

    def fail(self, error: EngineError) -> None:
        """The engine has ended before the request has."""


class Observer:
    """Told what the engine's thread does, in that thread."""

    def step_begins(self) -> None:
        """The engine is about to compute."""

    def step_ended(self, new_tokens: int) -> None:
        """It has, and every request has collected what it made."""

    def ended(self, error: EngineError, closed: bool) -> None:
        """Nothing will be computed any more. closed: as asked."""


@dataclass
class _Sampled(Live):
    """A sample of a batch."""

    batch: _Batch
    position: tuple[int, int]
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[np.ndarray] = field(default_factory=list)
    prompt_log_probs: np.ndarray | None = None

    @property
    def cancelled(self) -> bool:
        return self.batch.future.cancelled()

    def collect(self, output: EngineCoreOutput) -> bool:
        self.token_ids.extend(output.new_token_ids)
        if output.new_logprobs is not None:
            self.log_probs.append(output.new_logprobs.logprobs[:, 0])
        if output.new_prompt_logprobs_tensors is not None:
            self.prompt_log_probs = _by_token(output.new_prompt_logprobs_tensors)
        if output.finish_reason is None:
            return False
        self.batch.add(
            self.position,
            Sample(
                self.token_ids,
                np.concatenate(self.log_probs).tolist() if self.log_probs else [],
                str(output.finish_reason),
                self.batch.version,
                self.prompt_log_probs,
            ),
        )
        return True

    def fail(self, error: EngineError) -> None:
        _answer(self.batch.future, lambda: _raise(error))


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

    def add(self, position: tuple[int, int], sample: Sample) -> None:
        """A sample is finished; with the last one the call is answered."""
        row, column = position
        self.done[row][column] = sample
        self.pending -= 1
        if not self.pending:
            _answer(self.future, lambda: self.done)


@dataclass
class _Call:
    """A call in the engine's thread. exclusive: when nothing is being generated."""

    call: Callable[[LLMEngine], Any]
    exclusive: bool
    future: Future[Any] = field(default_factory=Future)


class EngineLoop:
    """Owns the engine and its thread.

    Jobs are taken in order. An exclusive job waits until what is running has finished, and what was
    submitted after it waits for it, so weights never change under a sample.

    build: makes the engine, in the thread. The first exclusive job tells whether that went well.
    """

    def __init__(self, build: Callable[[], LLMEngine]) -> None:
        self._build = build
        self._inbox: queue.SimpleQueue[_Batch | _Call | None] = queue.SimpleQueue()
        self._held: _Call | None = None
        self._soon: deque[Callable[[LLMEngine], object]] = deque()
        self._observers: list[Observer] = []
        self._live: dict[str, Live] = {}
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
        return self._submit_call(_Call(call, exclusive=True))

    def shared(self, call: Callable[[LLMEngine], T]) -> Future[T]:
        """Runs `call` in the thread when its turn has come, beside what is being generated."""
        return self._submit_call(_Call(call, exclusive=False))

    def soon(self, call: Callable[[LLMEngine], object]) -> None:
        """Runs `call` in the thread before the next step, ahead of its turn: also while what came
        before it waits."""
        self._soon.append(call)
        self.shared(lambda engine: None)  # which wakes a thread that has nothing to do

    def observe(self, observer: Observer) -> None:
        """Tells `observer` from the next step on. Raises EngineError when there is none."""
        with self._lock:
            if self._ended:
                raise EngineError(self._ended)
            self._observers.append(observer)

    def add(self, engine: LLMEngine, request: EngineCoreRequest, live: Live) -> None:
        """Generates a request from the next step on. In the thread."""
        request.external_req_id = request.request_id
        self._live[request.request_id] = live
        engine.engine_core.add_request(request)

    def drop(self, engine: LLMEngine, request_ids: Sequence[str]) -> None:
        """Ends requests, without another word to their Lives. In the thread."""
        if not request_ids:
            return
        engine.engine_core.abort_requests(list(request_ids))
        for request_id in request_ids:
            del self._live[request_id]

    def request(
        self, engine: LLMEngine, token_ids: Sequence[int], params: SamplingParams
    ) -> EngineCoreRequest:
        """vLLM's request for one prompt, checked by vLLM. In the thread."""
        from vllm.inputs import tokens_input

        self._requests += 1
        return engine.input_processor.process_inputs(
            str(self._requests),
            tokens_input(list(token_ids)),
            params,
            supported_tasks=engine.get_supported_tasks(),
        )

    def close(self, timeout_seconds: float) -> None:
        """Ends the engine and its thread; what is running fails with EngineError. Idempotent.

        Raises EngineTimeoutError when it does not end in time; it ends when it comes to it.
        """
        self._inbox.put(None)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise EngineTimeoutError(f"the engine did not end within {timeout_seconds:g} s")
        atexit.unregister(self.close)

    def _submit_call(self, job: _Call) -> Future[Any]:
        self._submit(job)
        return job.future

    def _submit(self, job: _Batch | _Call) -> None:
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
            while self._soon:
                self._soon.popleft()(engine)
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
            if isinstance(taken, _Batch):
                self._admit(engine, taken)
            elif taken.exclusive:
                self._held = taken
            else:
                _answer(taken.future, lambda job=taken: job.call(engine))  # type: ignore[misc]

    def _admit(self, engine: LLMEngine, batch: _Batch) -> None:
        if batch.future.cancelled():
            return
        try:
            batch.version = batch.admit(engine)
            requests = [self.request(engine, prompt, batch.params) for prompt in batch.prompts]
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
                self.add(engine, sample, _Sampled(batch, (row, column)))

    def _step(self, engine: LLMEngine) -> None:
        self.drop(engine, [id_ for id_, live in self._live.items() if live.cancelled])
        if not self._live:
            return
        for observer in self._observers:
            observer.step_begins()
        new_tokens = 0
        for output in engine.engine_core.get_output().outputs:
            new_tokens += len(output.new_token_ids)
            live = self._live.get(output.request_id)
            if live is not None and live.collect(output):
                del self._live[output.request_id]
        for observer in self._observers:
            observer.step_ended(new_tokens)

    def _end(self, reason: str, cause: BaseException | None) -> None:
        """Fails all that is running or waiting, and all that comes."""
        error = EngineError(reason)
        error.__cause__ = cause
        with self._lock:
            self._ended = reason
        for live in self._live.values():
            live.fail(error)
        futures: set[Future[Any]] = set() if self._held is None else {self._held.future}
        while not self._inbox.empty():
            job = self._inbox.get()
            if job is not None:
                futures.add(job.future)
        self._live.clear()
        self._soon.clear()
        for future in futures:
            _answer(future, lambda: _raise(error))
        for observer in self._observers:
            observer.ended(error, closed=cause is None)


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
