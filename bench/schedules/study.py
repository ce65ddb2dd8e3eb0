"""Runs the study: every policy on every draw of every case, and what that says."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scipy import stats

from bench.schedules.cases import Case, Study
from kimisys.rollout.measure import Floor, Measured, floor, measure, tuned
from kimisys.rollout.policies import policies

BASELINES = ("group_round_robin", "least_loaded", "fifo_cap")
"""Online, whole iterations: what `default` is held against."""
TUNED_ON = 16
"""Most engines in simulations that choose a knob."""
ATLEAST_ONLINE, ATMOST_OFFLINE, ATLEAST_PARTIAL = 0.95, 1.15, 1.5


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half width of its 95 % confidence interval (Student's t)."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """Of independent draws."""
    if len(values) < 2:
        return Interval(values[0], math.inf)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * error)


@dataclass(frozen=True)
class Result:
    """A case: what each policy reached at each seed, and the best that knows the lengths."""

    case: Case
    measured: Mapping[str, list[Measured]]
    floors: list[Floor]

    def ratio(self, name: str, other: str) -> Interval:
        """Trained tokens per second of one policy against another's, on the same draws."""
        pairs = zip(self.measured[name], self.measured[other], strict=True)
        return interval([one.speed / two.speed for one, two in pairs])

    @property
    def best_baseline(self) -> str:
        """The online baseline that is fastest in the mean."""
        return max(BASELINES, key=lambda name: sum(m.speed for m in self.measured[name]))

    def over(self, name: str, what: str) -> Interval:
        """Seconds of whole iterations against the best schedule that was found, or the bound."""
        floors = zip(self.measured[name], self.floors, strict=True)
        return interval([sum(one.iterations) / getattr(least, what) for one, least in floors])

    def figures(self) -> dict[str, Interval]:
        """What the study is to show; of partial rollouts also what they cost."""
        partial = self.measured["partial"]
        return {
            "default / best online baseline": self.ratio("default", self.best_baseline),
            "default / best offline schedule": self.over("default", "schedule"),
            "default / lower bound": self.over("default", "bound"),
            "partial / group_round_robin": self.ratio("partial", "group_round_robin"),
            "partial / april": self.ratio("partial", "april"),
            "partial / areal": self.ratio("partial", "areal"),
            "partial: recomputed": interval([one.recomputed_share for one in partial]),
            "partial: staleness": interval([one.staleness for one in partial]),
            "partial: trained length": interval([one.bias for one in partial]),
        }

    def lost(self) -> list[str]:
        """The goals that this case misses, in words."""
        figures = self.figures()
        goals = (
            ("default / best online baseline", ATLEAST_ONLINE, 1),
            ("default / best offline schedule", ATMOST_OFFLINE, -1),
            ("partial / group_round_robin", ATLEAST_PARTIAL, 1),
        )
        return [
            f"{name} is {figures[name]}, the goal {goal}"
            for name, goal, sign in goals
            if sign * (figures[name].mean - goal) < 0
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON types."""
        return {
            "case": asdict(self.case),
            "name": self.case.name,
            "best_baseline": self.best_baseline,
            "figures": {name: asdict(one) for name, one in self.figures().items()},
            "lost": self.lost(),
            "floors": [asdict(one) for one in self.floors],
            "policies": {
                name: [asdict(one) | {"speed": one.speed} for one in all_]
                for name, all_ in self.measured.items()
            },
        }


def investigate(case: Case, study: Study, tell: Callable[[str], object]) -> Result:
    """Choose each knob on the tuning draws, then measure every policy on the others."""
    # as many groups an engine: what is best for 16 engines is best for 64, at a quarter of the time
    smaller = replace(case, engines=min(case.engines, TUNED_ON))
    tuning = [smaller.lots(study, seed) for seed in study.tuning]
    knobs = {}
    for name, policy in policies().items():
        tell(f"{case.name}: {name}, its knob")
        knobs[name] = tuned(policy, smaller.setting(study, policy, tuning[0]), tuning)
    measured: dict[str, list[Measured]] = {name: [] for name in policies()}
    floors = []
    for seed in study.seeds:
        lots = case.lots(study, seed)
        for name, policy in policies().items():
            tell(f"{case.name}: {name}, seed {seed}")
            setting = case.setting(study, policy, lots)
            measured[name].append(measure(policy, setting, lots, knobs[name]))
        tell(f"{case.name}: the offline search, seed {seed}")
        whole = case.setting(study, policies()["default"], lots)
        floors.append(floor(whole, lots, study.search, seed))
    return Result(case, measured, floors)
