"""What an engine may claim to serve when an update fails half-way, and how its waits end.

vLLM is a stand-in that answers calls of its ranks, so that any of them can fail or be late.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kimisys.adapters.vllm import engine as engine_module
from kimisys.adapters.vllm.engine import Engine, EngineConfig, EngineError, EngineTimeoutError
from kimisys.adapters.vllm.loop import EngineLoop
from kimisys.errors import DigestError

RANKS = 2


class Ranks:
    """vLLM's engine, as far as an update needs it."""

    def __init__(self) -> None:
        self.engine_core = SimpleNamespace(
            shutdown=lambda: None, add_request=lambda _: None, get_output=self._output
        )
        self.input_processor = self
        self.packed: int | None = None
        self.label: str | None = None
        self.cache_resets = 0
        self.updates: list[dict[str, Any]] = []
        self.fail: dict[str, Callable[[], Any]] = {}
        self.asked: list[str] = []
        self.released = threading.Event()

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()
    ) -> list[Any]:
        assert timeout is not None and timeout > 0
        name = args[0] if method == "kimisys_call" else method
        self.asked.append(name)
        if name in self.fail:
            given = self.fail[name]()
            if given is not None:
                return list(given)
        if name == "update_weights":
            self.updates.append(args[1]["update_info"])
            self._received = self.updates[-1]["version"]
        if name == "finish_weight_update":
            self.packed = self._received
        if name != "kimisys_status":
            return [None] * RANKS
        seconds = {"pull": 1.0, "digest": 2.0, "pack": 3.0, "read": 0.5}
        counts = {"nbytes": 5, "wire_nbytes": 6, "full_nbytes": 8, "changed": 2, "digests": 7}
        return [{"version": self.packed, "base": None, "seconds": seconds, **counts}] * RANKS

    def set_weight_version(self, label: str) -> None:
        if "set_weight_version" in self.fail:
            self.fail["set_weight_version"]()
        self.label = label

    def reset_prefix_cache(self) -> bool:
        self.cache_resets += 1
        return "reset_prefix_cache" not in self.fail

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def process_inputs(self, request_id: str, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(request_id=request_id)

    def _output(self) -> Any:
        """A step in which nobody gets a token."""
        self.released.wait(0.01)
        return SimpleNamespace(outputs=[])


def raising(error: BaseException) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail


def with_engine(
    work: Callable[[Engine, Ranks], Any], timeout_seconds: float = 20.0, tensor_parallel: int = 2
) -> None:
    async def run() -> None:
        ranks = Ranks()
        config = EngineConfig(
            Path("some-model"), tensor_parallel=tensor_parallel, timeout_seconds=timeout_seconds
        )
        engine = Engine(config, EngineLoop(lambda: ranks))  # type: ignore[arg-type,return-value]
        engine._vocabulary = 10  # which `start` asks vLLM for
        try:
            await work(engine, ranks)
        finally:
            ranks.released.set()
            await engine.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "stage",
    [
        "finish_weight_update",
        "kimisys_status",
        "set_weight_version",
        "reset_prefix_cache",
        "one rank",
        "report",
    ],
)
def test_whatever_fails_once_packing_began_ends_serving(stage: str) -> None:
    """The ranks may compute with the new weights by then, so the old version is not claimed."""

    async def work(engine: Engine, ranks: Ranks) -> None:
        assert (await engine.update(1))["version"] == engine.version == 1
        if stage == "one rank":
            ranks.fail["kimisys_status"] = lambda: [{"version": 2}, {"version": 1}]
        elif stage == "report":
            ranks.fail["kimisys_status"] = lambda: [{"version": 2}] * RANKS
        else:
            ranks.fail[stage] = raising(OSError("the cable is out"))
        with pytest.raises(EngineError, match=r"packing version 2 failed: .*restart the engine"):
            await engine.update(2)
        assert engine.version is None
        ranks.fail.clear()
        for refused in (engine.generate([[1]]), engine.probe([1, 2]), engine.update(3)):
            with pytest.raises(EngineError, match="packing version 2 failed"):
                await refused

    with_engine(work)


def test_what_fails_before_packing_leaves_the_old_version_served() -> None:
    async def work(engine: Engine, ranks: Ranks) -> None:
        await engine.update(1)
        second_hand = ("PeerFailedError", "ranks [1] did not", "")
        ranks.fail["update_weights"] = lambda: [second_hand, ("DigestError", "torn: w", "")]
        with pytest.raises(DigestError, match="torn: w"):
            await engine.update(2)
        ranks.fail["update_weights"] = lambda: [("PeerTimeoutError", "waited for [1]", ""), None]
        with pytest.raises(EngineTimeoutError, match=r"waited for \[1\]"):
            await engine.update(2)
        assert engine.version == 1 and ranks.packed == 1 and ranks.label == "1"
        ranks.fail.clear()
        report = await engine.update(2)
        assert engine.version == ranks.packed == 2
        assert (report["nbytes"], report["digests"], report["pack_seconds"]) == (10, 7, 3.0)
        assert (report["wire_nbytes"], report["full_nbytes"], report["changed"]) == (12, 16, 4)
        assert (report["base"], report["read_seconds"]) == (None, 0.5)

    with_engine(work)


def test_an_update_empties_the_prefix_cache_unless_told_to_keep_it() -> None:
    async def work(engine: Engine, ranks: Ranks) -> None:
        await engine.update(1)
        assert ranks.cache_resets == 1
        await engine.update(2, keep_prefix_cache=True)
        assert ranks.cache_resets == 1 and ranks.updates[-1]["full"] is False
        await engine.update(3, full=True)
        assert ranks.cache_resets == 2 and ranks.updates[-1]["full"] is True

    with_engine(work)


def test_ranks_that_do_not_answer_are_named_and_end_serving() -> None:
    """vLLM would take a late answer for the answer to the next call."""

    async def work(engine: Engine, ranks: Ranks) -> None:
        await engine.update(1)
        ranks.fail["init_weight_transfer_engine"] = raising(TimeoutError("RPC call timed out."))
        late = r"ranks of the engine of some-model \(ranks 0 to 1\) did not answer kimisys_call"
        with pytest.raises(EngineTimeoutError, match=late + " init_weight_transfer_engine"):
            await engine.connect(["somewhere"])
        with pytest.raises(EngineError, match=late):
            await engine.update(2)
        with pytest.raises(EngineError, match=late):
            await engine.generate([[1]])

    with_engine(work)


def test_an_executor_that_lost_a_rank_ends_serving_by_name() -> None:
    async def work(engine: Engine, ranks: Ranks) -> None:
        await engine.update(1)
        ranks.fail["start_weight_update"] = raising(RuntimeError("Executor failed."))
        with pytest.raises(EngineError, match=r"some-model.*start_weight_update: Executor failed"):
            await engine.update(2)
        assert engine.version is None

    with_engine(work)


def test_every_call_ends_though_the_engine_does_not_answer() -> None:
    """The first finds a rank that hangs, the others wait for their turn behind it."""

    async def work(engine: Engine, ranks: Ranks) -> None:
        ranks.fail["start_weight_update"] = ranks.released.wait
        waited = r"the engine of some-model \(ranks 0 to 0\) did not answer"
        for name, call in (
            ("update", engine.update(1)),
            ("connect", engine.connect(["somewhere"])),
            ("generate", engine.generate([[1]])),
            ("probe", engine.probe([1, 2])),
        ):
            with pytest.raises(EngineTimeoutError, match=f"{waited} {name} within 0.05 s"):
                await call
        ranks.fail.clear()
        ranks.released.set()
        engine._loop.close(20.0)
        assert "init_weight_transfer_engine" not in ranks.asked, "a call ran after it was given up"

    with_engine(work, timeout_seconds=0.05, tensor_parallel=1)


def test_a_sample_that_never_ends_is_given_up() -> None:
    async def work(engine: Engine, ranks: Ranks) -> None:
        engine._version = 1
        with pytest.raises(EngineTimeoutError, match="did not answer generate"):
            await engine.generate([[1]])
        ranks.engine_core.abort_requests = aborted.extend
        await asyncio.to_thread(engine._loop.exclusive(lambda _: None).result, 20.0)

    aborted: list[str] = []
    with_engine(work, timeout_seconds=0.5)
    assert aborted == ["1-0"]


def test_an_engine_that_does_not_start_in_time_is_given_up(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    ranks = Ranks()
    ranks.engine_core.shutdown = ended.set

    def build(config: EngineConfig) -> Any:
        assert ranks.released.wait(20.0)
        return ranks

    monkeypatch.setattr(engine_module, "build", build)
    with pytest.raises(EngineTimeoutError, match=r"did not answer start within 0.05 s"):
        asyncio.run(Engine.start(EngineConfig(folders["tied"], timeout_seconds=0.05)))
    ranks.released.set()
    assert ended.wait(20.0), "an engine that was built too late goes on living"
