"""Prompts are drawn lazily, each with a number of its own, and none is lost by a resume."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from kimisys.rl.prompt_sampling import SuccessRates, curriculum_pool, draw
from kimisys.trainer.config import TrainConfig
from kimisys.trainer.progress import Progress
from kimisys.trainer.prompts import Prompts
from kimisys.trainer.task import Problem, Task
from kimisys.trainer.tokenizer import Tokenizer
from kimisys.trainer.watch import Watch

TOKENIZER = Tokenizer.arithmetic()
PROBLEMS = [Problem(f"{i}+1=", str(i + 1), difficulty=i) for i in range(40)]
TASK = Task(PROBLEMS, [Problem("99+1=", "100")], lambda *_: 1.0, 16)


def progress() -> Progress:
    return Progress(Watch(1e-3), TASK.fingerprint)


def prompts(made: Progress, **changes: Any) -> Prompts:
    options = {"prompts": 4, "samples": 2, "steps": 10, **changes}
    return Prompts(dataclasses.replace(TrainConfig(), **options), TASK, TOKENIZER, made)


def places(made: Prompts, count: int) -> list[int]:
    return [made.place(prompt.key) for prompt in made.offer(count)]


def test_a_prompt_is_what_the_task_says() -> None:
    made = prompts(progress())
    (prompt,) = made.offer(1)
    problem = made.problem(prompt.key)
    assert list(prompt.token_ids) == TOKENIZER.encode_prompt(problem.prompt)
    assert (prompt.samples, prompt.limit) == (2, 16)


def test_a_step_of_whole_groups_draws_as_one_draw_of_the_step() -> None:
    """Draw b is the draw of step b when every step takes --prompts problems."""
    made = prompts(progress())
    rates = SuccessRates(len(PROBLEMS))
    difficulties = torch.tensor([p.difficulty for p in PROBLEMS], dtype=torch.float64)
    for step in (1, 2, 3):
        made.begin(step)
        offered = made.offer(4)
        admitted = curriculum_pool(difficulties, (step - 1) / 10, full_at=0.3)
        expected = draw(rates.rates, admitted, 4, 1, step)
        assert [made.place(prompt.key) for prompt in offered] == expected.tolist()
        shares = torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=torch.float64)
        rates.record(expected, shares)
        made.trained([prompt.key for prompt in offered], shares)


def test_what_is_not_trained_is_offered_first_after_a_resume() -> None:
    state = progress()
    made = prompts(state)
    offered = made.offer(6)
    keys = [prompt.key for prompt in offered]
    made.trained([keys[1], keys[4]], torch.ones(2, dtype=torch.float64))
    made.dropped([keys[0]])
    left = [made.place(keys[i]) for i in (2, 3, 5)]
    made.save()
    rest = places(made, 2)  # of the second draw of four
    again = prompts(Progress(**{f.name: getattr(state, f.name) for f in dataclasses.fields(state)}))
    offered_again = again.offer(5)
    assert [again.place(prompt.key) for prompt in offered_again] == [*left, *rest]
    assert {prompt.key for prompt in offered_again}.isdisjoint(keys)


@given(st.data())
def test_each_drawn_problem_is_trained_once_or_dropped_or_waits(data: st.DataObject) -> None:
    """Whatever is offered, trained, dropped, and however often the run is killed."""
    state = progress()
    made = prompts(state)
    live: list[tuple[int, int]] = []
    seen: set[int] = set()
    given_out = done = 0
    for _ in range(data.draw(st.integers(1, 12))):
        act = data.draw(st.sampled_from(["offer", "train", "drop", "kill"]))
        if act == "offer":
            for prompt in made.offer(data.draw(st.integers(1, 7))):
                assert prompt.key not in seen
                seen.add(prompt.key)
                live.append((prompt.key, made.place(prompt.key)))
                given_out += 1
        elif act == "kill":
            made.save()
            assert state.waiting[: len(live)] == [place for _, place in live]
            assert done + len(state.waiting) == 4 * state.draws
            made, live = prompts(state), []
        elif live:
            count = data.draw(st.integers(1, len(live)))
            chosen = data.draw(st.permutations(range(len(live))))[:count]
            keys = [live[i][0] for i in chosen]
            if act == "train":
                made.trained(keys, torch.ones(count, dtype=torch.float64))
            else:
                made.dropped(keys)
            done += count
            live = [one for i, one in enumerate(live) if i not in chosen]
