"""Which problems the rollouts get next: drawn lazily, by curriculum and priority; none is lost."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import torch

from kimisys.rl.prompt_sampling import UNSEEN_SUCCESS_RATE, SuccessRates, curriculum_pool, draw
from kimisys.rollout import Prompt
from kimisys.trainer.config import TrainConfig
from kimisys.trainer.progress import Progress
from kimisys.trainer.task import Problem, Task
from kimisys.trainer.tokenizer import Tokenizer


class Prompts:
    """The problems of a run as prompts for its rollouts. Each keeps its number until it is trained
    or dropped; until then it is in `Progress.waiting`, and a run that resumes offers it first.

    Problems are drawn --prompts at a time: a draw follows from the seed, its number and the success
    rates at that time. The rollouts may ask from another thread.
    """

    def __init__(
        self, config: TrainConfig, task: Task, tokenizer: Tokenizer, progress: Progress
    ) -> None:
        self._config, self._task, self._progress = config, task, progress
        # encoded here: a tokenizer is not for two threads
        self._encoded = [tokenizer.encode_prompt(problem.prompt) for problem in task.problems]
        self._difficulties = torch.tensor(
            [p.difficulty for p in task.problems], dtype=torch.float64
        )
        rates = progress.success_rates
        self._success = (
            SuccessRates.from_state(rates) if rates else SuccessRates(len(self._encoded))
        )
        self._drawn: deque[int] = deque(progress.waiting)
        self._draws, self._count = progress.draws, progress.offered
        self._offered: dict[int, int] = {}  # number → place of the problem
        self._lock = threading.Lock()
        self._step = 1

    def begin(self, step: int) -> None:
        """RL step `step`, counted from 1, begins: the curriculum goes by it."""
        with self._lock:
            self._step = step

    def offer(self, count: int) -> list[Prompt]:
        """The next `count` prompts. Their keys are numbers that no other prompt of the run has."""
        with self._lock:
            return [self._next() for _ in range(count)]

    def place(self, key: int) -> int:
        """Which of the task's problems an offered prompt is."""
        return self._offered[key]

    def problem(self, key: int) -> Problem:
        """The problem of an offered prompt."""
        return self._task.problems[self._offered[key]]

    def trained(self, keys: Sequence[int], pass_rates: torch.Tensor) -> None:
        """These prompts are trained: their shares of right answers, float64[keys], count in coming
        draws."""
        places = torch.tensor([self._offered[key] for key in keys])
        with self._lock:
            self._success.record(places, pass_rates)
            self._forget(keys)

    def dropped(self, keys: Sequence[int]) -> None:
        """These prompts will not be trained."""
        with self._lock:
            self._forget(keys)

    def save(self) -> None:
        """Note in the progress what a resumed run needs."""
        with self._lock:
            progress = self._progress
            progress.success_rates = self._success.state()
            progress.draws, progress.offered = self._draws, self._count
            progress.waiting = [*self._offered.values(), *self._drawn]

    @property
    def success_rate(self) -> float:
        """Mean tracked success rate of the admitted problems."""
        return float(self._success.rates[self._admitted()].mean())

    @property
    def admitted(self) -> int:
        """How many problems the curriculum admits in this step."""
        return int(self._admitted().sum())

    def _next(self) -> Prompt:
        if not self._drawn:
            self._draw()
        config = self._config
        place, key = self._drawn.popleft(), self._count
        self._count += 1
        self._offered[key] = place
        return Prompt(key, self._encoded[place], config.samples, self._task.max_completion_tokens)

    def _draw(self) -> None:
        config, rates = self._config, self._success.rates
        if config.sampling == "uniform":
            rates = torch.full_like(rates, UNSEEN_SUCCESS_RATE)
        self._draws += 1
        places = draw(rates, self._admitted(), config.prompts, config.seed, self._draws)
        self._drawn.extend(places.tolist())

    def _admitted(self) -> torch.Tensor:
        done = min(1.0, (self._step - 1) / self._config.steps)
        return curriculum_pool(self._difficulties, done, full_at=self._config.curriculum)

    def _forget(self, keys: Sequence[int]) -> None:
        for key in keys:
            del self._offered[key]
