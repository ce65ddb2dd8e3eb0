"""The backend's registration, how an engine's ranks decide together, and when one refuses."""

from __future__ import annotations

import importlib.metadata
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import pytest
import torch.distributed as dist
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from kimisys.adapters.vllm import plugin
from kimisys.adapters.vllm.ranks import PeerTimeoutError, check_together, sum_over_ranks
from kimisys.adapters.vllm.weight_transfer import Behind, KimisysWeightTransferEngine
from kimisys.broadcast import Pulled
from kimisys.broadcast.agreement import PeerFailedError


def test_registering_twice_is_registering_once() -> None:
    plugin.register()
    plugin.register()
    assert WeightTransferEngineFactory._registry["kimisys"]() is KimisysWeightTransferEngine


def test_vllm_finds_the_backend_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="kimisys")
    register = entry.load()
    assert register is plugin.register
    monkeypatch.setattr(WeightTransferEngineFactory, "_registry", {})
    for _ in range(2):
        register()
        assert list(WeightTransferEngineFactory._registry) == ["kimisys"]


class Collective:
    """An all-reduce between threads."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=20)
        self._given: dict[int, npt.NDArray[np.int64]] = {}

    def total(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        self._given[threading.get_ident()] = values
        self._barrier.wait()
        summed = np.sum(list(self._given.values()), axis=0)
        self._barrier.wait()
        return np.asarray(summed)


def decide(failing: int | None) -> list[Future[None]]:
    """Three ranks, of which one may have what keeps it from pulling."""
    collective = Collective(3)

    def rank(number: int) -> None:
        def check() -> None:
            if number == failing:
                raise OSError("the socket is gone")

        check_together(check, 3, number, collective.total)

    with ThreadPoolExecutor(3) as pool:
        return [pool.submit(rank, number) for number in range(3)]


def test_ranks_of_which_none_refuses_go_on() -> None:
    assert [rank.result() for rank in decide(failing=None)] == [None] * 3


def test_no_rank_waits_for_one_that_refused() -> None:
    ranks = decide(failing=1)
    assert isinstance(ranks[1].exception(), OSError)
    for number in (0, 2):
        with pytest.raises(PeerFailedError, match=rf"rank {number} .* ranks \[1\]"):
            ranks[number].result()


def test_a_rank_that_refuses_says_so_though_nobody_listens() -> None:
    def total(_: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        raise PeerTimeoutError("the others did not come")

    def check() -> None:
        raise OSError("the socket is gone")

    with pytest.raises(OSError, match="socket") as caught:
        check_together(check, 2, 0, total)
    assert caught.value.__notes__ == ["the others did not come"]
    with pytest.raises(PeerTimeoutError):
        check_together(lambda: None, 2, 0, total)


def pulled(version: int, base: int | None, *touched: str) -> Pulled:
    names = frozenset((0, name) for name in touched)
    return Pulled(version, base, 0, 0, 0, 0, 0, False, {}, 0.0, names, None)


def test_what_a_model_is_behind_of_its_shadow() -> None:
    """Every pull since the model was packed counts, and everything after one that is not known."""
    behind = Behind()
    behind.pulled(pulled(1, None, "a"))
    assert behind.names is None, "a full pull brings everything, and the model holds nothing yet"
    behind.pulled(pulled(2, 1, "a"))
    assert behind.names is None
    behind.packed()
    assert behind.names == set()
    behind.pulled(pulled(3, 2, "a"))
    behind.pulled(pulled(5, 3, "b"))
    assert behind.names == {"a", "b"}
    behind.packed()
    behind.pulled(pulled(7, 6, "c"))  # from 5 to 6 an attempt had come that failed afterwards
    assert behind.names is None
    behind.packed()
    behind.pulled(pulled(8, 7))
    assert behind.names == set()
    behind.pulled(pulled(9, None, "a"))
    assert behind.names is None


def gloo_ranks(size: int) -> list[dist.ProcessGroup]:
    """A process group's ranks, all in this process."""
    store = dist.HashStore()

    def join(rank: int) -> dist.ProcessGroup:
        return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=20))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(join, range(size)))


def test_digests_are_summed_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")

    def total(group: dist.ProcessGroup) -> list[int]:
        return sum_over_ranks(np.array([2**62, group.rank()]), group, 20.0).tolist()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(total, gloo_ranks(3))) == [[3 * 2**62 - 2**64, 3]] * 3


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    groups = gloo_ranks(3)
    with pytest.raises(PeerTimeoutError, match=r"rank 1 of the engine waited up to 0\.1 s .*0, 2"):
        sum_over_ranks(np.array([1]), groups[1], 0.1)
