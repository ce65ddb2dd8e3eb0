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
from kimisys.adapters.vllm.weight_transfer import (
    Agreement,
    KimisysWeightTransferEngine,
    PeerFailedError,
    PeerTimeoutError,
    sum_over_ranks,
)


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


def decide(failing: int | None) -> list[Future[npt.NDArray[np.uint64]]]:
    """Three ranks, of which one may fail before it comes to the digests."""
    collective = Collective(3)

    def rank(number: int) -> npt.NDArray[np.uint64]:
        agreement = Agreement(3, number, collective.total)
        try:
            if number == failing:
                raise OSError("the socket is gone")
            return agreement.combine(np.full(2, 2**63 + number, np.uint64))
        except BaseException:
            agreement.fail()
            raise

    with ThreadPoolExecutor(3) as pool:
        return [pool.submit(rank, number) for number in range(3)]


def test_digests_are_summed_modulo_two_to_the_64() -> None:
    for summed in decide(failing=None):
        assert summed.result().tolist() == [2**63 + 3] * 2


def test_no_rank_waits_for_one_that_failed() -> None:
    ranks = decide(failing=1)
    assert isinstance(ranks[1].exception(), OSError)
    for number in (0, 2):
        with pytest.raises(PeerFailedError, match=rf"rank {number} .* ranks \[1\]"):
            ranks[number].result()


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
