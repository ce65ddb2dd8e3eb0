"""The study of schedules says what its simulations say: intervals, ratios, and what is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from bench.schedules import trade
from bench.schedules.cases import Case, Study, cases
from bench.schedules.plot import draw
from bench.schedules.study import BASELINES, Result, interval, investigate
from kimisys.rollout.measure import Floor, Measured
from kimisys.rollout.policies import policies

CASE = Case(1, "slack", 0.8)


def measured(policy: str, speed: float, seconds: float = 10.0) -> Measured:
    """Whose whole iterations took `seconds`."""
    return Measured(
        policy=policy, knob=None, seconds=10.0, groups=1, trajectories=8, tokens=round(10 * speed),
        decoded=1000, recomputed=100, utilisation=1.0, staleness=0.5, staleness_most=1, bias=0.9,
        moved=0, dropped=0, iterations=[seconds / 4, seconds * 3 / 4],
    )  # fmt: skip


def result(speeds: Mapping[str, tuple[float, float]], seconds: float = 10.0) -> Result:
    """Two seeds; what is not named makes 100 tokens a second. A schedule of 10 seconds is known."""
    made = {
        name: [measured(name, speed, seconds) for speed in speeds.get(name, (100, 100))]
        for name in policies()
    }
    return Result(CASE, made, [Floor(2, bound=8.0, schedule=10.0, evaluations=5)] * 2)


def test_an_interval_is_students() -> None:
    """t(0.975, 2) = 4.3027, the error of the mean 1 / sqrt(3)."""
    assert interval([1, 2, 3]).mean == 2
    assert interval([1, 2, 3]).half == pytest.approx(2.4841, abs=1e-4)
    assert interval([5, 5]).half == 0
    assert str(interval([1, 2, 3])) == "2.000 ± 2.484"


def test_policies_are_compared_on_the_same_draws() -> None:
    speeds = {"default": (100.0, 330.0), "least_loaded": (100.0, 300.0), "fifo_cap": (300.0, 90.0)}
    compared = result(speeds)
    assert compared.best_baseline == "least_loaded"
    figures = compared.figures()
    assert figures["default / best online baseline"].mean == pytest.approx((1 + 1.1) / 2)
    assert figures["partial: recomputed"].mean == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("speeds", "seconds", "lost"),
    [
        ({"partial": (150.0, 150.0)}, 11.4, []),
        ({"partial": (140.0, 140.0)}, 11.4, ["partial / group_round_robin"]),
        ({"partial": (150.0, 150.0)}, 12.0, ["default / best offline schedule"]),
        (
            {"partial": (150.0, 150.0), "default": (94.0, 94.0)},
            11.4,
            ["default / best online baseline"],
        ),
    ],
)
def test_what_misses_a_goal_is_said(
    speeds: dict[str, tuple[float, float]], seconds: float, lost: list[str]
) -> None:
    assert [line.split(" is ")[0] for line in result(speeds, seconds).lost()] == lost
    offline = result(speeds, seconds).figures()["default / best offline schedule"]
    assert offline.mean == pytest.approx(seconds / 10)


def test_the_cases_are_those_of_the_claim() -> None:
    """8, 16 and 64 engines, KV-bound and slack, siblings alike and not."""
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names) == 12
    assert {case.engines for case in cases()} == {8, 16, 64}


def test_a_small_case_from_end_to_end(tmp_path: Path) -> None:
    study = Study(seeds=(1, 2), tuning=(101,), whole_iterations=1, search=50)
    told: list[str] = []
    found = investigate(CASE, study, told.append)
    assert any("default, seed 2" in line for line in told)
    assert set(found.measured) == set(policies()) >= set(BASELINES)
    assert all(len(each) == 2 for each in found.measured.values())
    for least in found.floors:
        assert least.schedule is not None and least.bound <= least.schedule
    assert found.figures()["default / lower bound"].mean >= 1
    record = json.loads(json.dumps({"cases": [found.to_json()]}))
    assert record["cases"][0]["name"] == "1 engines, slack, siblings alike"
    draw(record, tmp_path / "study.svg")
    assert "siblings alike" in (tmp_path / "study.svg").read_text()


def test_the_trade_of_speed_for_staleness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trade, "KNOBS", {"areal": (1, 2)})
    rows = trade.traded(CASE, Study(seeds=(1, 2), warm_up=1, iterations=2))
    assert [(row["policy"], row["knob"]) for row in rows] == [("areal", 1), ("areal", 2)]
    assert all(row["staleness_most"] <= row["knob"] for row in rows)
    assert all(row["speed"]["mean"] > 0 and row["speed"]["half"] > 0 for row in rows)
    assert "areal 2 " in " ".join(trade.line(rows[-1]).split())
    trade.draw({"cases": [{"name": CASE.name, "rows": rows}] * 4}, tmp_path / "trade.svg")
    assert (tmp_path / "trade.svg").read_text().count("siblings alike") == 4
