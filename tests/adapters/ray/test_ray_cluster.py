"""Waiting on real actors: one deadline, a name in every error, errors as they were raised."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimisys.adapters.ray import ActorLostError, kill, local_cluster, share, spawn, wait
from kimisys.errors import PlanError


class Worker:
    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def total(self, numbers: list[int]) -> int:
        return sum(numbers)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def refuse(self) -> None:
        raise PlanError("tensor 'w' has no source; publish it")

    def die(self) -> None:
        os._exit(3)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_cluster(cpus=1):
        yield
    assert not list(Path("/tmp").glob(f"kimisys-ray-{os.getpid()}-*"))


def test_results_come_by_name() -> None:
    worker = spawn(Worker, {"KIMISYS_TEST": "yes"})
    calls = {
        "a": worker.environment.remote("KIMISYS_TEST"),
        "b": worker.total.remote(share([1, 2, 3])),
    }
    assert wait(calls, 60) == {"a": "yes", "b": 6}
    kill(worker)


def test_an_actor_error_is_raised_as_it_was() -> None:
    worker = spawn(Worker, {})
    with pytest.raises(PlanError) as caught:
        wait({"rank 0": worker.refuse.remote()}, 60)
    assert type(caught.value) is PlanError
    assert str(caught.value) == "tensor 'w' has no source; publish it"
    kill(worker)


def test_a_dead_actor_is_named() -> None:
    worker = spawn(Worker, {})
    with pytest.raises(ActorLostError, match="rank 1 is lost"):
        wait({"rank 1": worker.die.remote()}, 60)


def test_one_deadline_holds_for_all_of_them() -> None:
    workers = [spawn(Worker, {}) for _ in range(3)]
    wait({str(i): w.total.remote([]) for i, w in enumerate(workers)}, 60)
    calls = {f"rank {i}": w.sleep.remote(0.5 + i) for i, w in enumerate(workers)}
    started = time.monotonic()
    with pytest.raises(ActorLostError, match="no answer from rank 1, rank 2 within 1 s"):
        wait(calls, 1.0)
    assert time.monotonic() - started < 30  # not one second for each answer, on any machine
    for worker in workers:
        kill(worker)
