"""The benchmarks of deltas: that what they compare is what they say, and that lies are found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bench.delta import diff, loopback, scatter, wire
from bench.delta.formats import Compressed, Sparse, bound
from bench.delta.versions import COLUMNS, RUN, Pattern, Versions
from bench.harness import measure
from bench.reshard import MIB


@pytest.mark.parametrize("pattern", ["random", "clustered"])
@pytest.mark.parametrize("density", [0.0001, 0.01, 0.3])
def test_versions_differ_at_the_density_by_one_step_of_bfloat16(
    pattern: Pattern, density: float
) -> None:
    made = Versions(8 * MIB, density, pattern)
    first, second = (bits.astype(np.int32) for bits in made.bits)
    steps = second - first
    assert np.count_nonzero(steps) == made.changed
    assert set(np.abs(steps[steps != 0])) == {1}
    expected = made.elements * density
    assert abs(made.changed - expected) < 6 * expected**0.5 + COLUMNS
    rows = steps.reshape(-1, COLUMNS) != 0
    if pattern == "clustered":
        assert (rows.all(axis=1) == rows.any(axis=1)).all()
        assert np.flatnonzero(rows.any(axis=1))[0] % RUN == 0
    else:
        halves = np.array([np.count_nonzero(half) for half in np.split(steps, 2)])
        assert abs(halves[0] - halves[1]) < 6 * expected**0.5
    assert made.live is made.bits[0] and made.old is made.bits[1]
    made.turn()
    assert made.live is made.bits[1] and made.old is made.bits[0]


@settings(max_examples=50, deadline=None)
@given(arrays(np.uint16, 200), st.lists(st.integers(0, 199)), st.integers(1, 2**16 - 1))
def test_other_formats_bring_the_new_bits(old: Any, places: list[int], flip: int) -> None:
    new = old.copy()
    new[places] ^= np.uint16(flip)
    sparse = Sparse(old, new)
    assert sparse.nbytes == 6 * len(set(places))
    assert (sparse.applied(old) == new).all()
    assert (Compressed(old, new).applied(old) == new).all()


def test_the_bound_is_that_of_the_entropy() -> None:
    assert bound(0.5) == pytest.approx(1.15 * (1 / 4 + 2))
    assert bound(0.25) == pytest.approx(1.15 * (0.8112781 / 2 + 2))


def test_the_cases_of_finding_changes_give_right_answers() -> None:
    records = [measure("b", case, repeats=1) for case in diff.cases(2 * MIB)]
    assert [r.case for r in records if not r.correct] == []
    assert [len(record.peers) for record in records] == [1, 1, 3, 1, 1, 1]


@pytest.mark.parametrize("pattern", ["random", "clustered"])
def test_the_cases_of_wire_bytes_give_right_answers_within_the_bound(pattern: Pattern) -> None:
    for density in (0.01, 0.3):
        (record,) = (measure("b", c, repeats=1) for c in wire.wire(2 * MIB, density, pattern))
        assert record.correct
        assert record.figures is not None
        ours, limit, sparse, packed, anew, full = list(record.figures.values())[2:]
        assert 2 < ours <= limit and sparse == 6 and packed < anew < 1.01 * full
        assert full == pytest.approx(2 * 1 / (record.figures["density (%)"] / 100))


def test_the_cases_of_writing_changes_give_right_answers() -> None:
    records = [measure("b", case, repeats=3) for case in scatter.cases(2 * MIB, 0.01)]
    assert [(record.correct, len(record.peers)) for record in records] == [(True, 2)] * 2


def test_a_delta_that_is_not_written_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = scatter.Scatter
    monkeypatch.setattr(scatter, "Scatter", lambda *arguments: Lazy(right(*arguments)))
    records = [measure("b", case, repeats=1) for case in scatter.cases(2 * MIB, 0.01)]
    assert [record.correct for record in records] == [False, False]


class Lazy:
    """A Scatter that writes nothing."""

    def __init__(self, right: Any) -> None:
        self._right = right

    def __getattr__(self, name: str) -> Any:
        return getattr(self._right, name)

    def apply(self, *arguments: Any) -> int:
        return 0


def test_the_cases_of_mooncake_give_right_answers() -> None:
    full, part = (measure("b", case, repeats=2) for case in loopback.cases(2 * MIB, 0.01))
    assert full.correct and part.correct
    assert full.figures is not None and part.figures is not None
    (everything,), (little,) = full.figures.values(), part.figures.values()
    assert everything >= 2 * MIB / 1e6 and 0 < little < everything / 10


def test_changes_that_are_missed_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind:
        """Misses a change."""

        def __init__(self, *arguments: Any) -> None:
            self._right = right(*arguments)

        def compare(self, *arguments: Any) -> Any:
            return SimpleNamespace(changed=self._right.compare(*arguments).changed - 1)

    right = diff.Diff
    monkeypatch.setattr(diff, "Diff", Blind)
    versions = Versions(MIB, 0.01, "random")
    assert not measure("b", diff.compare(versions, "c", {}), repeats=1).correct


def test_a_pull_of_everything_is_not_taken_for_a_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    right = wire.Subscriber.pull

    def whole(self: Any, *arguments: Any) -> Any:
        return SimpleNamespace(**vars(right(self, *arguments, full=True)))

    monkeypatch.setattr(wire.Subscriber, "pull", whole)
    (record,) = (measure("b", c, repeats=1) for c in wire.wire(MIB, 0.01, "random"))
    assert not record.correct
