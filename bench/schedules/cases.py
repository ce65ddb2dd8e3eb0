"""The workloads and engines of the study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kimisys.rollout import Lots
from kimisys.rollout.measure import Setting, mean_length
from kimisys.rollout.policies import Policy
from kimisys.rollout.workload import Prompts, lognormal
from kimisys.trainer.simulate_engines import SHIPPED

ENGINES = (8, 16, 64)
CORRELATIONS = (0.8, 0.05)
MEMORY = {"slack": ("h100-7b", 8), "KV-bound": ("2xh100-32b", 20)}
"""The engine and how many groups of it a batch has: 64 sequences where the cache holds them all to
their ends, 160 where it holds about a quarter of that."""

SAMPLES = 8
PROMPT = 500
MEDIAN, SIGMA, LIMIT = 4000.0, 1.2, 32_768
SPARE = 4  # as many groups as are trained, and so many times more for those under way


@dataclass(frozen=True)
class Study:
    """How much is simulated. seeds: draws that are measured; tuning: other draws, on which knobs
    are chosen; search: engine lists that the offline search times in each batch."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    tuning: tuple[int, ...] = (101,)
    whole_iterations: int = 3
    warm_up: int = 8
    iterations: int = 4
    search: int = 20_000


@dataclass(frozen=True)
class Case:
    """One workload on so many engines."""

    engines: int
    memory: str
    correlation: float

    @property
    def name(self) -> str:
        """For tables."""
        kin = "siblings alike" if self.correlation > 0.5 else "siblings not"
        return f"{self.engines} engines, {self.memory}, {kin}"

    @property
    def groups(self) -> int:
        """Of a batch."""
        return self.engines * MEMORY[self.memory][1]

    def lots(self, study: Study, seed: int) -> Lots:
        """One draw."""
        iterations = max(study.whole_iterations, study.warm_up + study.iterations)
        return lognormal(
            SPARE * self.groups * iterations,
            SAMPLES,
            median=MEDIAN,
            sigma=SIGMA,
            correlation=self.correlation,
            limit=LIMIT,
            seed=seed,
            prompts=Prompts(PROMPT),
        )

    def setting(self, study: Study, policy: Policy, lots: Lots) -> Setting:
        """Of a policy: whole iterations need no warm-up."""
        engine: dict[str, Any] = SHIPPED[MEMORY[self.memory][0]].fields()
        return Setting(
            engines=self.engines,
            engine=engine,
            groups=self.groups,
            token_budget=round(self.groups * SAMPLES * mean_length(lots)),
            iterations=study.whole_iterations if policy.whole else study.iterations,
            warm_up=0 if policy.whole else study.warm_up,
            report_interval=4.0,
        )


def cases() -> Iterator[Case]:
    """All of them."""
    for memory in MEMORY:
        for correlation in CORRELATIONS:
            for engines in ENGINES:
                yield Case(engines, memory, correlation)
