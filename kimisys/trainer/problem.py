"""What a task is made of: problems to solve and demonstrations to imitate."""

from __future__ import annotations

from dataclasses import dataclass

from kimisys.errors import KimisysError


class TaskError(KimisysError):
    """A task that cannot be loaded or trained on. The message names the place and the remedy."""


@dataclass(frozen=True)
class Problem:
    """A prompt and what is known about its answer; the task's checker compares the two."""

    prompt: str
    answer: str
    difficulty: float = 0.0
    """Larger is harder, on any scale; the curriculum goes by the order."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and a text that follows it, without its end-of-sequence token."""

    prompt: str
    completion: str
