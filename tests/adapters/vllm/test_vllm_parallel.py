"""Sizes of parallelism: what is legal, and whose rank is where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimisys.adapters.vllm.parallel import Coordinates, EngineParallel
from kimisys.errors import LayoutError

sizes = st.integers(1, 9)
parallels = st.builds(EngineParallel, sizes, sizes, sizes, st.booleans(), sizes)


@given(parallels)
def test_what_is_printed_is_read_again(parallel: EngineParallel) -> None:
    assert EngineParallel.parse(str(parallel)) == parallel


@given(parallels, st.data())
def test_ranks_count_as_vllm_s(parallel: EngineParallel, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, parallel.world_size - 1))
    at = parallel.place(rank)
    again = (at.replica * parallel.data + at.data) * parallel.pipeline + at.pipeline
    assert again * parallel.tensor + at.tensor == rank
    assert at.tensor < parallel.tensor and at.pipeline < parallel.pipeline
    assert at.data < parallel.data and at.replica < parallel.replicas


def test_what_is_not_given_is_one_or_off() -> None:
    assert EngineParallel.parse("") == EngineParallel(1, 1, 1, False, 1)
    parallel = EngineParallel.parse(" ep=on, tp=16,dp=8 ")
    assert parallel == EngineParallel(tensor=16, data=8, expert=True)
    assert parallel.world_size == 128 and EngineParallel(2, replicas=3).engine == EngineParallel(2)
    assert EngineParallel(2, 2, 2, replicas=2).place(11) == Coordinates(1, 0, 1, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tp=0", "tp='0' is not a size; give an integer of at least 1"),
        ("tp=²", "not a size"),
        ("tp=1.5", "not a size"),
        ("tp", r"'tp' in 'tp' is not known; legal are tp=SIZE, pp=SIZE, .* ep=on or ep=off"),
        ("ep=yes", "ep='yes' is neither on nor off"),
        ("cp=2", "'cp=2' in 'cp=2' is not known"),
        ("tp=2,tp=4", "'tp' is given twice"),
    ],
)
def test_illegal_texts_are_refused_with_what_is_legal(text: str, says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        EngineParallel.parse(text)


def test_illegal_sizes_and_ranks_are_refused() -> None:
    for illegal in (0, -1, True, 1.0):
        with pytest.raises(LayoutError, match=r"pp=.* is not a size"):
            EngineParallel(pipeline=illegal)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="neither on nor off"):
        EngineParallel(expert=1)  # type: ignore[arg-type]
    for rank in (-1, 4):
        with pytest.raises(LayoutError, match=f"rank {rank} of tp=2,.*ranks are 0 to 3"):
            EngineParallel(2, data=2).place(rank)
