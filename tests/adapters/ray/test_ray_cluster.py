"""Waiting on real actors: one deadline, a name in every error, errors as they were raised, and the
death of an actor noticed while waiting for another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimisys.adapters.ray import Actor, ActorLostError, Actors, local_cluster, share
from kimisys.errors import PlanError


class Worker(Actor):
    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def pid(self) -> int:
        return os.getpid()

    def total(self, numbers: list[int]) -> int:
        return sum(numbers)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def refuse(self) -> None:
        raise PlanError("tensor 'w' has no source; publish it")

    def fail(self) -> None:
        time.sleep(0.5)
        raise RuntimeError("connection closed by peer")

    def die(self) -> None:
        os._exit(3)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_cluster(cpus=1):
        yield
    assert not list(Path("/tmp").glob(f"kimisys-ray-{os.getpid()}-*"))


@pytest.fixture
def actors() -> Iterator[Actors]:
    made = Actors(timeout_seconds=60)
    yield made
    made.close(5)


def spawned(actors: Actors, *names: str) -> Actors:
    for name in names:
        actors.spawn(name, Worker, {"KIMISYS_TEST": f"of {name}"})
    actors.wait({name: actors.begin(name, "pid") for name in names})
    return actors


def test_results_come_by_name(actors: Actors) -> None:
    spawned(actors, "a", "b")
    calls = {
        "b": actors.begin("b", "total", share([1, 2, 3])),
        "a": actors.begin("a", "environment", "KIMISYS_TEST"),
    }
    assert list(actors.wait(calls).items()) == [("b", 6), ("a", "of a")]


def test_an_actor_error_is_raised_as_it_was(actors: Actors) -> None:
    spawned(actors, "rank 0")
    with pytest.raises(PlanError) as caught:
        actors.wait({"rank 0": actors.begin("rank 0", "refuse")})
    assert type(caught.value) is PlanError
    assert str(caught.value) == "tensor 'w' has no source; publish it"


def test_a_dead_actor_is_named(actors: Actors) -> None:
    spawned(actors, "rank 1")
    with pytest.raises(ActorLostError, match="rank 1 is lost"):
        actors.wait({"rank 1": actors.begin("rank 1", "die")})


def kill_soon(pid: int) -> threading.Timer:
    timer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    timer.start()
    return timer


def test_a_death_is_noticed_while_waiting_for_another(actors: Actors) -> None:
    spawned(actors, "rank 0", "engine 0")
    timer = kill_soon(actors.wait({"e": actors.begin("engine 0", "pid")})["e"])
    with pytest.raises(ActorLostError, match="engine 0 is lost"):
        actors.wait({"rank 0": actors.begin("rank 0", "sleep", 50.0)})
    timer.join()


def test_who_died_is_blamed_and_not_who_noticed(actors: Actors) -> None:
    spawned(actors, "rank 0", "rank 1")
    timer = kill_soon(actors.wait({"r": actors.begin("rank 1", "pid")})["r"])
    with pytest.raises(ActorLostError, match="rank 1 is lost"):
        actors.wait({"rank 0": actors.begin("rank 0", "fail")})
    timer.join()


def test_an_error_without_a_death_stays_what_it_is(actors: Actors) -> None:
    spawned(actors, "rank 0")
    with pytest.raises(RuntimeError, match="closed by peer"):
        actors.wait({"rank 0": actors.begin("rank 0", "fail")})


def test_one_deadline_holds_for_all_of_them() -> None:
    names = [f"rank {i}" for i in range(3)]
    actors = spawned(Actors(timeout_seconds=60), *names)
    actors._timeout = 1.0
    calls = {name: actors.begin(name, "sleep", 0.2 + 2 * i) for i, name in enumerate(names)}
    started = time.monotonic()
    with pytest.raises(ActorLostError, match="no answer from rank 1, rank 2 within 1 s"):
        actors.wait(calls)
    assert time.monotonic() - started < 30  # not one second for each answer, on any machine
    actors.close(10)


def test_a_process_may_have_one_cluster_after_another() -> None:
    """Each has a token of its own, and Ray remembers the first that it read."""
    code = (
        "from kimisys.adapters.ray import local_cluster\n"
        "import ray\n"
        "for cpus in (1, 2):\n"
        "    with local_cluster(cpus): print(ray.cluster_resources()['CPU'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert run.stdout.split() == ["1.0", "2.0"]
