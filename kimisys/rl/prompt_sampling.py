"""Which problems a step samples: easy ones first, and those most often that are solved least.

Source: Kimi k1.5 technical report (arXiv 2501.12599), section "Sampling Strategies": curriculum
sampling goes from easy to hard; prioritised sampling draws problem i with a probability
proportional to 1 - s_i, s_i its tracked success rate. How s_i is tracked, how fast the curriculum
opens and the least weight of a solved problem are ours; the report does not say.

    admitted = curriculum_pool(difficulties, progress)
    indices = draw(success_rates.rates, admitted, count, seed, step)
    success_rates.record(indices, pass_rates)

Nothing here keeps a random state: a step's draw follows from its arguments alone, so a run that
resumes with the same success rates draws what the undisturbed run would have drawn. Uniform
sampling, for comparison: `draw` with equal success rates and every problem admitted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kimisys.rl.groups import check_vector

UNSEEN_SUCCESS_RATE = 0.5
"""s_i of a problem that was never sampled: taken neither for solved nor for hopeless."""

LEAST_WEIGHT = 0.05
"""Of a solved problem, where an unsolved one has 1: it is still visited, lest it be forgotten."""

_NEWEST_SHARE = 0.5


class SuccessRates:
    """The tracked success rate s_i of each problem, float64 [problems].

    An exponential moving average with a half-life of one visit, s_i ← (s_i + new)/2, starting at
    UNSEEN_SUCCESS_RATE: the policy that earned an old rate is gone, and a problem is visited only a
    few times in a run, so a cumulative mean would still tell of the start at the end.
    """

    def __init__(self, problems: int) -> None:
        """All of `problems` problems unseen. Raises ValueError unless there is at least one."""
        if problems < 1:
            raise ValueError(f"problems is {problems}; success rates need at least one problem")
        self._rates = torch.full((problems,), UNSEEN_SUCCESS_RATE, dtype=torch.float64)

    @classmethod
    def from_state(cls, state: Sequence[float]) -> SuccessRates:
        """What `state()` of the same problems in the same order returned; ValueError for others."""
        rates = torch.tensor(list(state), dtype=torch.float64)
        _check_rates("state", rates)
        restored = cls(len(rates))
        restored._rates = rates
        return restored

    def state(self) -> list[float]:
        """One number for each problem, exact through JSON."""
        return self._rates.tolist()

    @property
    def rates(self) -> Tensor:
        """A copy of all s_i, float64 [problems]."""
        return self._rates.clone()

    def record(self, indices: Tensor, rates: Tensor) -> None:
        """Note the share of right answers that each drawn problem got in one step.

        indices: integer [n]. rates: float [n], within 0 to 1. A problem that occurs several times
        counts once, with the mean of its rates, so that the order does not matter. Raises
        ValueError when a shape, a dtype or a value is wrong, and then notes nothing.
        """
        check_vector("indices", indices, floating=False)
        _check_rates("rates", rates)
        if indices.shape != rates.shape:
            raise ValueError(
                f"indices has shape {tuple(indices.shape)} and rates {tuple(rates.shape)}; "
                "each takes one value per drawn problem"
            )
        problems = len(self._rates)
        if bool(((indices < 0) | (indices >= problems)).any()):
            raise ValueError(
                f"indices reach from {int(indices.min())} to {int(indices.max())}; "
                f"there are {problems} problems"
            )
        visited, place, times = torch.unique(indices, return_inverse=True, return_counts=True)
        total = torch.zeros(len(visited), dtype=torch.float64)
        mean = total.index_add_(0, place, rates.to(torch.float64)) / times
        self._rates[visited] = torch.lerp(self._rates[visited], mean, _NEWEST_SHARE)


def curriculum_pool(
    difficulties: Tensor, progress: float, start: float = 0.25, full_at: float = 0.5
) -> Tensor:
    """Which problems are admitted at `progress`: the easiest, more with every step, then all.

    difficulties: float [problems], larger is harder, any scale: only the order counts. progress:
    the fraction of the run that is done, within 0 to 1. start: the share of problems admitted at
    progress 0, above 0. full_at: the fraction of the run from which all are admitted; 0 means no
    curriculum. Between them the share grows linearly. Problems of equal difficulty are admitted
    together, so the pool may be larger than the share, and no problem ever leaves it. Returns bool
    [problems], at least one of them true. Raises ValueError when an argument is out of its range.
    """
    check_vector("difficulties", difficulties, floating=True)
    problems = len(difficulties)
    if problems == 0:
        raise ValueError("difficulties is empty; a curriculum needs at least one problem")
    finite = torch.isfinite(difficulties)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise ValueError(f"difficulties[{bad}] is {difficulties[bad].item()}; it must be finite")
    for name, value in (("progress", progress), ("start", start), ("full_at", full_at)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}; it is a fraction, within 0 to 1")
    if start == 0.0:
        raise ValueError("start is 0, which admits no problem at first; choose a positive share")

    if progress >= full_at:
        return torch.ones(problems, dtype=torch.bool)
    share = start + (1.0 - start) * (progress / full_at)
    hardest = difficulties.sort().values[min(math.ceil(share * problems), problems) - 1]
    return difficulties <= hardest


def draw(success_rates: Tensor, admitted: Tensor, count: int, seed: int, step: int) -> Tensor:
    """The problems that `step` samples: without replacement, by weight max(1 - s_i, LEAST_WEIGHT).

    success_rates: float [problems], s_i within 0 to 1. admitted: bool [problems]; no other problem
    is drawn. count: at least 1. seed, step: any integers; another seed or step is another draw. The
    next problem drawn is, of those left, i with a probability proportional to its weight. When
    fewer than `count` are admitted, each occurs count // admitted times or once more; the
    remainder goes to the first drawn. Returns int64 [count], a pure function of the arguments.
    Raises ValueError when an argument is wrong or nothing is admitted.

    Each problem's key is an exponential variable at the rate of its weight, and the least keys are
    drawn (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir").
    """
    _check_rates("success_rates", success_rates)
    if admitted.dtype != torch.bool or admitted.shape != success_rates.shape:
        raise ValueError(
            f"admitted must be bool {tuple(success_rates.shape)}, as success_rates is, "
            f"got {admitted.dtype} {tuple(admitted.shape)}"
        )
    if count < 1:
        raise ValueError(f"count is {count}; a step draws at least one problem")
    eligible = int(admitted.sum())
    if eligible == 0:
        raise ValueError(
            f"none of {len(admitted)} problems is admitted, so there is nothing to draw from; "
            "pass what curriculum_pool returns, or all true for no curriculum"
        )

    # one variable for every problem, admitted or not: a problem's luck depends on itself alone
    uniform = torch.rand(len(admitted), generator=_generator(seed, step), dtype=torch.float64)
    weights = (1.0 - success_rates.to(torch.float64)).clamp(min=LEAST_WEIGHT)
    keys = (-torch.log1p(-uniform) / weights).masked_fill(~admitted, float("inf"))
    order = keys.argsort(stable=True)[:eligible]
    return order.repeat(-(-count // eligible))[:count]


def _generator(seed: int, step: int) -> torch.Generator:
    # hashed, because torch's CPU generator reads no more than the low 32 bits of its seed
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=4, person=b"prompts").digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _check_rates(name: str, rates: Tensor) -> None:
    check_vector(name, rates, floating=True)
    inside = (rates >= 0.0) & (rates <= 1.0)
    if not bool(inside.all()):
        bad = int((~inside).nonzero()[0])
        raise ValueError(f"{name}[{bad}] is {rates[bad].item()}; a rate lies within 0 to 1")
