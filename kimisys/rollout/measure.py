"""What a policy reaches on a workload, by simulation: the figures of its steady state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kimisys._core.rollout import (
    EngineModel,
    Lots,
    Outcome,
    Simulation,
    bounds,
    offline,
    simulate,
)
from kimisys.errors import WorkloadError
from kimisys.rollout.policies import Policy, policy

PARTS = (8, 16)
"""Engines of the parts in which the offline search also looks at many."""


@dataclass(frozen=True)
class Setting:
    """What is simulated, whatever the policy.

    engine: fields of an EngineModel, every engine's. groups: of a batch. token_budget: output
    tokens of an iteration by budget. iterations: that are measured, after warm_up more, in which
    the first batches (of short trajectories, where the long ones go on) are left behind. Seconds:
    train_base, train_token (per trained token), reward_latency, report_interval.
    """

    engines: int
    engine: Mapping[str, Any]
    groups: int
    token_budget: int
    iterations: int = 1
    warm_up: int = 0
    train_base: float = 0.0
    train_token: float = 0.0
    reward_latency: float = 0.0
    report_interval: float = 1.0


@dataclass(frozen=True)
class Measured:
    """Figures of the measured iterations of one simulation. seconds: from the last warm-up batch
    to the last; lengths in tokens, staleness in versions.

    recomputed: tokens whose KV was computed again, because a trajectory went on elsewhere or later,
    or was preempted. utilisation: the share of their time in which engines ran something, training
    included. bias: mean length of what was trained, as a share of the mean length of all that was
    dispatched by then, as it ends.
    """

    policy: str
    knob: float | None
    seconds: float
    groups: int
    trajectories: int
    tokens: int
    decoded: int
    recomputed: int
    utilisation: float
    staleness: float
    staleness_most: int
    bias: float
    moved: int
    dropped: int
    iterations: list[float] = field(default_factory=list)
    """Seconds of rollouts in each."""

    @property
    def speed(self) -> float:
        """Trained tokens per second."""
        return self.tokens / self.seconds

    @property
    def recomputed_share(self) -> float:
        """Of the tokens that were decoded."""
        return self.recomputed / max(1, self.decoded)


@dataclass(frozen=True)
class Floor:
    """Of whole iterations whose lengths are all known: seconds of the rollouts of `batches`
    batches. schedule: the best that was found (None: not searched), timing `evaluations` lists of
    engines; bound: what none can beat."""

    batches: int
    bound: float
    schedule: float | None
    evaluations: int


def run(
    chosen: Policy,
    setting: Setting,
    lots: Lots,
    *,
    iterations: int,
    knob: float | None = None,
    spans: bool = False,
) -> Outcome:
    """One simulation. Raises WorkloadError if the lots do not suffice, SchedulerError for numbers
    that make no sense."""
    return simulate(_simulation(chosen, setting, lots, iterations, knob), lots, spans)


def floor(setting: Setting, lots: Lots, evaluations: int, seed: int) -> Floor:
    """Bound and best schedule of the measured iterations as whole ones, without training.

    evaluations: lists of engines that each search may time for each batch; 0: no search. All
    engines are searched together, and in parts of PARTS engines, as a search over many engines
    stays near its start. Raises as `run`.
    """
    alone = replace(setting, train_base=0.0, train_token=0.0, reward_latency=0.0)
    known = _simulation(policy("default"), alone, lots, setting.iterations, None)
    least = bounds(known, lots).seconds
    if not evaluations:
        return Floor(setting.iterations, least, None, 0)
    found = offline(known, lots, evaluations, seed)
    total, spent = 0.0, found.evaluations
    update = found.seconds - sum(each.seconds for each in found.iterations)
    for number, whole in enumerate(found.iterations):
        best = whole.seconds
        for engines in (each for each in PARTS if alone.engines % each == 0):
            if engines < alone.engines:
                seconds, more = _in_parts(alone, lots, number, engines, evaluations, seed)
                best, spent = min(best, seconds), spent + more
        total += best
    return Floor(setting.iterations, least, total + update, spent)


def _in_parts(
    setting: Setting, lots: Lots, number: int, engines: int, evaluations: int, seed: int
) -> tuple[float, int]:
    """Seconds of the best schedule of batch `number` where `engines` engines each share a part of
    its trajectories, dealt out longest first; and the lists that were timed."""
    first, last = (setting.groups * lots.samples * n for n in (number, number + 1))
    lengths = np.minimum(np.asarray(lots.lengths)[first:last], lots.limit)
    prompts = np.repeat(np.asarray(lots.prompt_tokens), lots.samples)[first:last]
    order = np.argsort(-lengths, kind="stable")
    parts = setting.engines // engines
    longest, spent = 0.0, 0
    for part in range(parts):
        mine = order[part::parts]
        share = Lots(prompts[mine], lengths[mine], samples=1, limit=lots.limit)
        smaller = replace(setting, engines=engines, groups=len(mine))
        known = _simulation(policy("default"), smaller, share, 1, None)
        found = offline(known, share, evaluations, seed)
        longest = max(longest, found.iterations[0].seconds)
        spent += found.evaluations
    return longest, spent


def _simulation(
    chosen: Policy, setting: Setting, lots: Lots, iterations: int, knob: float | None
) -> Simulation:
    most = int(setting.engine["max_sequences"])
    model = EngineModel(**{**setting.engine, "max_sequences": chosen.cap(most, knob)})
    return Simulation(
        config=chosen.config(setting.groups, setting.token_budget, lots.samples, knob),
        engines=[model] * setting.engines,
        iterations=iterations,
        train_base=setting.train_base,
        train_token=setting.train_token,
        reward_latency=setting.reward_latency,
        report_interval=setting.report_interval,
        oracle=chosen.oracle,
    )


def measure(chosen: Policy, setting: Setting, lots: Lots, knob: float | None = None) -> Measured:
    """Simulate the warm-up alone, then it and the measured iterations: the same prefix, so that the
    difference is what the measured ones did."""
    if setting.iterations < 1:
        raise WorkloadError(f"iterations is {setting.iterations}; it must be 1 at least")
    whole = run(chosen, setting, lots, iterations=setting.warm_up + setting.iterations, knob=knob)
    before = (
        run(chosen, setting, lots, iterations=setting.warm_up, knob=knob)
        if setting.warm_up
        else None
    )

    def made(name: str) -> int:
        return int(getattr(whole, name)) - (int(getattr(before, name)) if before else 0)

    def counted(name: str) -> int:
        earlier = int(getattr(before.ledger, name)) if before else 0
        return int(getattr(whole.ledger, name)) - earlier

    def difference(late: npt.ArrayLike, early: npt.ArrayLike | None) -> npt.NDArray[Any]:
        return np.asarray(late) - (np.asarray(early) if early is not None else 0)

    first = setting.warm_up
    seconds = whole.seconds - (before.seconds if before else 0.0)
    tokens, groups = (int(np.sum(each[first:])) for each in (whole.tokens, whole.groups))
    trajectories = groups * lots.samples
    stale = difference(whole.ledger.stale, before.ledger.stale if before else None)
    busy = difference(whole.busy, before.busy if before else None)
    return Measured(
        policy=chosen.name,
        knob=knob,
        seconds=seconds,
        groups=groups,
        trajectories=trajectories,
        tokens=tokens,
        decoded=made("decoded"),
        recomputed=counted("recomputed") + made("preempted"),
        utilisation=float(busy.sum()) / (seconds * setting.engines),
        staleness=float(stale @ np.arange(len(stale))) / max(1, int(stale.sum())),
        staleness_most=int(np.flatnonzero(stale).max(initial=0)),
        bias=tokens / max(1, trajectories) / mean_length(lots, int(whole.ledger.offered_groups)),
        moved=counted("moved"),
        dropped=counted("dropped_groups"),
        iterations=[float(each) for each in whole.rollout_seconds[first:]],
    )


def mean_length(lots: Lots, groups: int | None = None) -> float:
    """Of the trajectories of the first `groups` as they end, cut at the limit; tokens."""
    last = None if groups is None else groups * lots.samples
    return float(np.minimum(np.asarray(lots.lengths)[:last], lots.limit).mean())


def tuned(chosen: Policy, setting: Setting, tuning: list[Lots]) -> float | None:
    """The value of the knob that trains the most tokens per second over `tuning`: other
    draws of the workload than those it is then measured on. None where there is no knob."""
    if not chosen.knob:
        return None

    def speed(value: float) -> float:
        results = [measure(chosen, setting, lots, value) for lots in tuning]
        return sum(one.tokens for one in results) / sum(one.seconds for one in results)

    return max(chosen.knob_values, key=speed)
