"""Lots of lengths: the distributions are what they say, and files are read or refused by line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kimisys._core.rollout import Lots
from kimisys.errors import WorkloadError
from kimisys.rollout.workload import (
    TAIL,
    Prompts,
    extended,
    fit,
    intraclass_correlation,
    lognormal,
    pareto,
    read_lengths,
    write_lengths,
)

FAR = 1 << 40  # a limit that nothing reaches


def table(lots: Lots) -> np.ndarray:
    return np.asarray(lots.lengths).reshape(-1, lots.samples)


def drawn(name: str, groups: int, samples: int, correlation: float, seed: int = 1) -> Lots:
    shape = {"median": 4000.0, "sigma": 1.1, "correlation": correlation, "limit": FAR, "seed": seed}
    if name == "pareto":
        return pareto(groups, samples, alpha=1.3, **shape)  # type: ignore[arg-type]
    return lognormal(groups, samples, **shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("correlation", [0.0, 0.05, 0.8])
def test_lognormal_lengths_are_lognormal(correlation: float) -> None:
    # one of each group: siblings are no independent draws
    logs = np.log(table(drawn("lognormal", 20_000, 2, correlation))[:, 0])
    assert stats.kstest(logs, "norm", args=(math.log(4000), 1.1)).pvalue > 1e-3


def test_pareto_lengths_have_their_body_and_their_tail() -> None:
    lengths = table(drawn("pareto", 50_000, 1, 0.0))[:, 0]
    begin = 4000 * math.exp(1.1 * stats.norm.ppf(1 - TAIL))
    body, tail = lengths[lengths <= begin], lengths[lengths > begin]
    assert len(tail) / len(lengths) == pytest.approx(TAIL, abs=0.01)
    assert stats.kstest(tail / begin, "pareto", args=(1.3,)).pvalue > 1e-3
    assert np.median(lengths) == pytest.approx(4000, rel=0.03)
    below = np.log(body[body < 4000])
    assert np.std(below) == pytest.approx(1.1 * math.sqrt(1 - 2 / math.pi), rel=0.03)


@pytest.mark.parametrize("name", ["lognormal", "pareto"])
@pytest.mark.parametrize("correlation", [0.0, 0.05, 0.5, 0.8, 1.0])
def test_siblings_resemble_each_other_as_asked(name: str, correlation: float) -> None:
    lengths = table(drawn(name, 6_000, 8, correlation))
    assert intraclass_correlation(lengths) == pytest.approx(correlation, abs=0.03)
    if correlation == 1:
        assert (lengths == lengths[:, :1]).all()


def test_the_correlation_is_the_one_of_pairs() -> None:
    logs = np.log(table(drawn("lognormal", 4_000, 4, 0.6)))
    pairs = np.array([logs[:, [i, j]] for i in range(4) for j in range(4) if i != j]).reshape(-1, 2)
    expected = np.corrcoef(pairs.T)[0, 1]
    assert intraclass_correlation(np.exp(logs)) == pytest.approx(expected, abs=0.005)


def test_what_does_not_vary_has_no_correlation() -> None:
    assert intraclass_correlation([[5, 5], [5, 5]]) == 0
    assert intraclass_correlation([[5, 9]]) == 0
    assert intraclass_correlation([[5], [9]]) == 0


@pytest.mark.parametrize("name", ["lognormal", "pareto"])
def test_a_seed_gives_one_lot_and_another_seed_another(name: str) -> None:
    first, again, other = (table(drawn(name, 50, 8, 0.5, seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_prompts_have_their_lengths() -> None:
    make: Callable[[Prompts], Lots] = lambda prompts: lognormal(  # noqa: E731
        4_000, 1, median=9, sigma=0, correlation=0, limit=10, seed=1, prompts=prompts
    )
    assert (np.asarray(make(Prompts(300)).prompt_tokens) == 300).all()
    spread = np.log(np.asarray(make(Prompts(300, 0.5)).prompt_tokens))
    assert stats.kstest(spread, "norm", args=(math.log(300), 0.5)).statistic < 0.03
    assert (np.asarray(make(Prompts(300)).lengths) == 9).all()


@pytest.mark.parametrize("name", ["lognormal", "pareto"])
def test_a_fit_draws_the_like_of_its_trace(name: str) -> None:
    trace = drawn(name, 1_500, 8, 0.7)
    lots = fit(trace).draw(3_000, 4, limit=FAR, seed=7)
    assert intraclass_correlation(table(lots)) == pytest.approx(0.7, abs=0.04)
    for share in (0.05, 0.5, 0.95, 0.99):
        expected = np.quantile(np.asarray(trace.lengths), share)
        assert np.quantile(np.asarray(lots.lengths), share) == pytest.approx(expected, rel=0.15)
    assert set(np.asarray(lots.prompt_tokens)) == set(np.asarray(trace.prompt_tokens))


def test_an_extension_goes_on_after_the_trace() -> None:
    trace = drawn("lognormal", 50, 8, 0.7)
    lots = extended(trace, 2_000, seed=3)
    assert (table(lots)[:50] == table(trace)).all()
    assert len(np.asarray(lots.prompt_tokens)) == len(table(lots)) == 2_000
    assert np.median(table(lots)[50:]) == pytest.approx(np.median(table(trace)), rel=0.1)
    assert extended(trace, 50, seed=3) is trace


def test_a_fit_of_equal_lengths_draws_them() -> None:
    trace = Lots(np.full(3, 10), np.full(6, 77), samples=2, limit=100)
    assert set(np.asarray(fit(trace).draw(5, 2, limit=100, seed=1).lengths)) == {77}


def test_a_fit_knows_nothing_beyond_the_cut() -> None:
    trace = drawn("lognormal", 200, 8, 0.5)
    cut = Lots(trace.prompt_tokens, trace.lengths, samples=8, limit=5_000)
    lots = fit(cut).draw(500, 8, limit=FAR, seed=3)
    assert np.asarray(lots.lengths).max() == 5_000
    assert (np.asarray(lots.lengths) == 5_000).mean() == pytest.approx(
        (np.asarray(trace.lengths) >= 5_000).mean(), abs=0.05
    )


@given(
    st.integers(1, 5).flatmap(
        lambda samples: st.lists(
            st.tuples(
                st.integers(1, 1 << 30),
                st.lists(st.integers(1, 1 << 30), min_size=samples, max_size=samples),
            ),
            min_size=1,
            max_size=5,
        )
    )
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, groups: list[tuple[int, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("trace") / "lengths.jsonl"
    lengths = np.array([each for _, each in groups])
    prompts = np.array([prompt for prompt, _ in groups])
    limit = int(np.median(lengths))
    write_lengths(path, Lots(prompts, lengths.ravel(), samples=lengths.shape[1], limit=limit))
    read = read_lengths(path)
    assert (np.asarray(read.prompt_tokens) == prompts).all()
    assert (table(read) == np.minimum(lengths, limit)).all()
    assert read.limit == min(limit, lengths.max())
    assert read_lengths(path, limit=3).limit == 3


GOOD = json.dumps({"prompt_tokens": 5, "lengths": [1, 2], "problem": "other keys may be there"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("", "line 2 is no JSON"),
        ("[1]", "line 2 has no prompt_tokens"),
        ('{"lengths": [1, 2]}', "line 2 has no prompt_tokens"),
        ('{"prompt_tokens": 5, "lengths": []}', r"line 2: lengths is \[\]"),
        ('{"prompt_tokens": 5, "lengths": 7}', "line 2: lengths is 7"),
        ('{"prompt_tokens": 0, "lengths": [1, 2]}', "line 2: prompt_tokens has 0"),
        ('{"prompt_tokens": 5, "lengths": [1, -2]}', "line 2: lengths has -2"),
        ('{"prompt_tokens": 5, "lengths": [1, 2.5]}', r"line 2: lengths has 2\.5"),
        ('{"prompt_tokens": 5, "lengths": [1, true]}', "line 2: lengths has True"),
        ('{"prompt_tokens": 5, "lengths": [1, 2, 3]}', "line 2: 3 lengths, where others have 2"),
        (f'{{"prompt_tokens": 5, "lengths": [1, {1 << 70}]}}', "line 2: lengths has 1180"),
    ],
)
def test_a_line_that_is_no_group_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(WorkloadError, match=message):
        read_lengths(path)


def test_groups_that_were_dropped_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    dropped = '{"prompt_tokens": 9, "lengths": [0, 4], "dropped": "stale"}'
    path.write_text(f"{dropped}\n{GOOD}\n{dropped}\n")
    assert read_lengths(path).prompt_tokens.tolist() == [5]
    path.write_text(f"{dropped}\n")
    with pytest.raises(WorkloadError, match="holds no group"):
        read_lengths(path)


def test_a_file_without_a_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_lengths(tmp_path / "empty.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(WorkloadError, match="holds no group"):
        read_lengths(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 0},
        {"samples": 0},
        {"limit": 0},
        {"median": 0.5},
        {"sigma": -1.0},
        {"sigma": math.nan},
        {"correlation": 1.1},
        {"correlation": -0.1},
        {"alpha": 0.0},
    ],
)
def test_parameters_that_make_no_sense_are_named(change: dict[str, float]) -> None:
    (name,) = change
    good = {"median": 10, "sigma": 1, "alpha": 1, "correlation": 0, "limit": 9, "seed": 1}
    shape = {"groups": 3, "samples": 2, **good, **change}
    with pytest.raises(WorkloadError, match=name):
        pareto(shape.pop("groups"), shape.pop("samples"), **shape)  # type: ignore[arg-type]
