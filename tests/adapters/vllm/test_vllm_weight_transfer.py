"""The backend's registration, and how an engine's ranks decide together."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from kimisys.adapters.vllm import plugin
from kimisys.adapters.vllm.weight_transfer import (
    Agreement,
    KimisysWeightTransferEngine,
    PeerFailedError,
)


def test_registering_twice_is_registering_once() -> None:
    plugin.register()
    plugin.register()
    assert WeightTransferEngineFactory._registry["kimisys"]() is KimisysWeightTransferEngine


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
