"""A task of one's own: write a number backwards, `123=` → `#321`.

    kimisys train --task examples/my_task.py:task

Half of the demonstrations copy the number instead; that is left for RL to unlearn.
"""

import random

from kimisys.trainer.task import Demonstration, Problem, Task


def check(problem: Problem, completion: str, finished: bool) -> float:
    """1 for the digits in reverse order behind a `#`, and nothing else."""
    return 1.0 if finished and completion == "#" + problem.answer else 0.0


def task() -> Task:
    """Numbers of two to four digits, equally many of each; the longer, the harder."""
    source = random.Random("backwards")
    numbers = [n for digits in (2, 3, 4) for n in _some_numbers(source, digits, 80)]
    source.shuffle(numbers)
    problems = [Problem(f"{n}=", str(n)[::-1], difficulty=len(str(n))) for n in numbers]
    held_out, trained = problems[:40], problems[40:]
    demonstrations = [
        Demonstration(problem.prompt, "#" + source.choice([problem.answer, problem.answer[::-1]]))
        for problem in trained * 10
    ]
    return Task(trained, held_out, check, max_completion_tokens=6, demonstrations=demonstrations)


def _some_numbers(source: random.Random, digits: int, count: int) -> list[int]:
    return source.sample(range(10 ** (digits - 1), 10**digits), count)
