"""The engine's thread with an engine core that only counts: order, cancellation, failure, end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from types import SimpleNamespace
from typing import Any

import pytest

from kimisys.adapters.vllm.loop import EngineLoop, Live, Observer
from kimisys.errors import EngineError

SECONDS = 20.0


class CountingCore:
    """Each step gives each request a token, its number of steps so far; the n-th token ends it."""

    def __init__(self) -> None:
        self.live: dict[str, list[int]] = {}
        self.aborted: list[str] = []
        self.steps = 0
        self.fails_at = -1
        self.may_step = threading.Event()
        self.may_step.set()
        self.ended = False

    def add_request(self, request: Any) -> None:
        self.live[request.request_id] = [0, request.sampling_params]

    def abort_requests(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for request_id in request_ids:
            del self.live[request_id]

    def get_output(self) -> Any:
        assert self.may_step.wait(SECONDS)
        self.steps += 1
        if self.steps == self.fails_at:
            raise MemoryError("no block left")
        outputs = []
        for request_id, state in list(self.live.items()):
            state[0] += 1
            last = state[0] == state[1]
            if last:
                del self.live[request_id]
            fields = {"new_logprobs": None, "new_prompt_logprobs_tensors": None}
            outputs.append(
                SimpleNamespace(
                    request_id=request_id,
                    new_token_ids=[state[0]],
                    finish_reason="length" if last else None,
                    **fields,
                )
            )
        return SimpleNamespace(outputs=outputs)

    def shutdown(self) -> None:
        self.ended = True


class CountingEngine:
    def __init__(self) -> None:
        self.engine_core = CountingCore()
        self.input_processor = self

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def process_inputs(self, request_id: str, prompt: Any, params: Any, **_: Any) -> Any:
        if not prompt["prompt_token_ids"]:
            raise ValueError("an empty prompt")
        return SimpleNamespace(request_id=request_id, sampling_params=params)


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def loop(engine: CountingEngine) -> Iterator[EngineLoop]:
    loop = EngineLoop(lambda: engine)  # type: ignore[arg-type,return-value]
    yield loop
    engine.engine_core.may_step.set()
    loop.close(SECONDS)
    assert engine.engine_core.ended


def generate(
    loop: EngineLoop, tokens: int, prompts: Any = ((1,),), samples: int = 1, version: int = 1
) -> Future[Any]:
    params: Any = tokens
    return loop.generate(prompts, samples, params, lambda _: version)


def test_samples_are_grouped_by_prompt(loop: EngineLoop) -> None:
    groups = generate(loop, 3, prompts=[[1], [2]], samples=2, version=5).result(SECONDS)
    assert [[one.token_ids for one in group] for group in groups] == [[[1, 2, 3]] * 2] * 2
    assert {(one.version, one.finish_reason) for group in groups for one in group} == {
        (5, "length")
    }


def test_jobs_keep_their_order(loop: EngineLoop, engine: CountingEngine) -> None:
    """An exclusive job begins when what came before is done, and before what came after begins."""
    seen: list[tuple[int, int]] = []
    engine.engine_core.may_step.clear()
    before = generate(loop, 4)
    job = loop.exclusive(
        lambda _: seen.append((engine.engine_core.steps, len(engine.engine_core.live)))
    )
    after = generate(loop, 2)
    engine.engine_core.may_step.set()
    after.result(SECONDS)
    assert before.done() and job.done()
    assert seen == [(4, 0)] and engine.engine_core.steps == 6


def test_cancelling_ends_the_generation(loop: EngineLoop, engine: CountingEngine) -> None:
    core = engine.engine_core
    core.may_step.clear()
    endless, other = generate(loop, 1 << 60, samples=3), generate(loop, 5)
    waiting = generate(loop, 1)
    assert endless.cancel() and waiting.cancel()
    core.may_step.set()
    assert other.result(SECONDS)[0][0].token_ids == [1, 2, 3, 4, 5]
    loop.exclusive(lambda _: None).result(SECONDS)
    assert core.live == {}
    with pytest.raises(CancelledError):
        endless.result(0)


def test_a_refused_batch_harms_no_other(loop: EngineLoop) -> None:
    def refuse(_: Any) -> int:
        raise RuntimeError("not now")

    params: Any = 1
    refused = loop.generate([[1]], 1, params, refuse)
    empty = generate(loop, 1, prompts=[[]])
    nothing = generate(loop, 1, prompts=[])
    fine = generate(loop, 1)
    assert isinstance(refused.exception(SECONDS), RuntimeError)
    assert isinstance(empty.exception(SECONDS), ValueError)
    assert nothing.result(SECONDS) == []
    assert len(fine.result(SECONDS)) == 1


def test_a_failed_step_fails_everybody_and_all_that_comes(
    loop: EngineLoop, engine: CountingEngine
) -> None:
    engine.engine_core.fails_at = 3
    running, held = generate(loop, 10), loop.exclusive(lambda _: None)
    for future in (running, held):
        error = future.exception(SECONDS)
        assert isinstance(error, EngineError) and "no block left" in str(error)
    loop.close(SECONDS)
    with pytest.raises(EngineError, match="MemoryError"):
        generate(loop, 1)


def test_an_engine_that_cannot_be_built_says_why() -> None:
    def build() -> Any:
        raise OSError("no such model")

    loop = EngineLoop(build)
    try:
        error = loop.exclusive(lambda _: None).exception(SECONDS)
    except EngineError as refused:  # when the thread was quicker than the job
        error = refused
    assert isinstance(error, EngineError) and "no such model" in str(error)
    loop.close(SECONDS)


def test_closing_fails_what_is_running(loop: EngineLoop, engine: CountingEngine) -> None:
    running = generate(loop, 1 << 60)
    loop.close(SECONDS)
    assert isinstance(running.exception(SECONDS), EngineError)
    with pytest.raises(EngineError, match="closed"):
        loop.exclusive(lambda _: None)


class Told(Observer):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.ends: list[tuple[str, bool]] = []

    def step_ended(self, new_tokens: int) -> None:
        self.steps.append(new_tokens)

    def ended(self, error: EngineError, closed: bool) -> None:
        self.ends.append((str(error), closed))


class Counted(Live):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def collect(self, output: Any) -> bool:
        self.tokens += output.new_token_ids
        return output.finish_reason is not None


def test_shared_calls_keep_their_turn_and_soon_does_not(
    loop: EngineLoop, engine: CountingEngine
) -> None:
    """A call that shares the engine waits for an exclusive one before it; an urgent one for none,
    and can end what the exclusive one waits for."""
    order: list[str] = []
    core, live = engine.engine_core, Counted()

    def begin(llm: Any) -> None:
        loop.add(llm, loop.request(llm, [1], 1 << 60), live)  # type: ignore[arg-type]
        order.append("begun")

    core.may_step.clear()
    loop.shared(begin)
    running = generate(loop, 5)
    exclusive = loop.exclusive(lambda _: order.append("exclusive"))
    behind = loop.shared(lambda _: order.append("behind"))
    core.may_step.set()
    assert len(running.result(SECONDS)[0][0].token_ids) == 5
    assert order == ["begun"]
    loop.soon(lambda llm: (order.append("soon"), loop.drop(llm, list(core.live))))
    behind.result(SECONDS)
    assert exclusive.done() and order == ["begun", "soon", "exclusive", "behind"]
    assert live.tokens == list(range(1, len(live.tokens) + 1)) and len(live.tokens) >= 5
    loop.soon(lambda _: order.append("woken"))
    loop.exclusive(lambda _: None).result(SECONDS)
    assert order[-1] == "woken"


def test_observers_hear_of_steps_and_of_the_end(loop: EngineLoop, engine: CountingEngine) -> None:
    told = Told()
    loop.observe(told)
    generate(loop, 3, samples=2).result(SECONDS)
    loop.exclusive(lambda _: None).result(SECONDS)
    assert told.steps == [2, 2, 2] and not told.ends
    engine.engine_core.fails_at = 5
    assert isinstance(generate(loop, 9).exception(SECONDS), EngineError)
    loop.close(SECONDS)
    ((reason, closed),) = told.ends
    assert "no block left" in reason and not closed
    with pytest.raises(EngineError, match="no block left"):
        loop.observe(told)
