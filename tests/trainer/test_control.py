"""The control of deltas: what it lets pass, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kimisys.trainer.control import Control
from kimisys.trainer.engines import Sampling, Sync
from kimisys.trainer.task import Problem, Task
from kimisys.trainer.tokenizer import Tokenizer
from kimisys.trainer.watch import EngineMismatchError

TOKENIZER = Tokenizer.arithmetic()


class Scripted:
    """Engines that say the same of every prompt, except where they are told to err."""

    def __init__(self, count: int = 1, wrong_probe: int = -1, wrong_tokens: int = -1) -> None:
        self.count, self.wrong_probe, self.wrong_tokens = count, wrong_probe, wrong_tokens
        self.updates: list[tuple[int, bool]] = []
        self.verify_every = 0

    def connect(self, addresses: Sequence[Path], verify_every: int = 16) -> None:
        self.verify_every = verify_every

    def update(self, version: int, full: bool = False) -> Sync:
        self.updates.append((version, full))
        return Sync(version, 0, 0, 0, 0)

    def probe(self, tokens: Sequence[int], version: int) -> list[np.ndarray]:
        found = np.linspace(-3, 0, 16 * len(tokens), dtype=np.float32)
        return [
            np.nextafter(found, np.float32(1)) if engine == self.wrong_probe else found
            for engine in range(self.count)
        ]

    def generate(self, prompts: Sequence[Any], how: Sampling, version: int) -> list[list[Any]]:
        """As Engines deals them out: prompt i to engine i mod count."""
        assert how.temperature == 0.0
        return [
            [SimpleNamespace(token_ids=[*prompt, i % self.count == self.wrong_tokens])]
            for i, prompt in enumerate(prompts)
        ]


def control(engines: Scripted) -> tuple[Control, Scripted]:
    held_out = [Problem(f"{i}+{i}=", str(2 * i)) for i in range(1, 20)]
    task = Task([Problem("1+2=", "3")], held_out, lambda *_: 1.0, 16)
    whole = Scripted()
    return Control(engines, whole, TOKENIZER, task), whole  # type: ignore[arg-type]


def test_engines_that_agree_pass_and_the_control_takes_each_version_whole() -> None:
    engines = Scripted(count=3)
    made, whole = control(engines)
    made.connect([])
    assert (engines.verify_every, whole.verify_every) == (1, 16)
    for version in (1, 2):
        made.follow(version)
    assert whole.updates == [(1, True), (2, True)]


@pytest.mark.parametrize("engine", [0, 2])
def test_one_bit_of_one_engine_is_seen(engine: int) -> None:
    made, _ = control(Scripted(count=3, wrong_probe=engine))
    with pytest.raises(EngineMismatchError, match=f"version 7: .* engine {engine}"):
        made.follow(7)


@pytest.mark.parametrize("engine", [0, 2])
def test_another_greedy_token_is_seen(engine: int) -> None:
    made, _ = control(Scripted(count=3, wrong_tokens=engine))
    with pytest.raises(EngineMismatchError, match=f"engine {engine} and the control complete"):
        made.follow(7)
