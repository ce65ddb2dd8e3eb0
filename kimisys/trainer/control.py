"""The control of deltas: an engine that always takes the weights whole must compute, bit for bit,
what the engines that follow by deltas compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kimisys.trainer.engines import Engines, Sampling
from kimisys.trainer.task import Task
from kimisys.trainer.tokenizer import Tokenizer
from kimisys.trainer.watch import EngineMismatchError

PROMPTS = 8  # of held-out problems: each is probed, and completed greedily
_MAX_TOKENS = 32  # of a greedy completion


class Control:
    """Compares `engines` with `whole`, one engine of the same layout and threads that pulls every
    version in full and samples nothing for the run."""

    def __init__(self, engines: Engines, whole: Engines, tokenizer: Tokenizer, task: Task) -> None:
        self._engines, self._whole = engines, whole
        asked = task.held_out[:PROMPTS]
        self._prompts = [tokenizer.encode_prompt(problem.prompt) for problem in asked]
        most = min(task.max_completion_tokens, _MAX_TOKENS)
        self._greedy = Sampling(1, 0.0, most, [tokenizer.eos_id], seed=0)
        self._eos = tokenizer.eos_id

    def connect(self, addresses: Sequence[Path]) -> None:
        """As Engines.connect, for both sides; digests are compared in full at every version."""
        self._engines.connect(addresses, verify_every=1)
        self._whole.connect(addresses)

    def follow(self, version: int) -> None:
        """Let the control take `version` whole, and compare. Raises EngineMismatchError naming what
        differs, DigestError when the control refuses the version."""
        self._whole.update(version, full=True)
        for prompt in self._prompts:
            probe = [*prompt, self._eos]
            (expected,) = self._whole.probe(probe, version)
            for i, found in enumerate(self._engines.probe(probe, version)):
                if not np.array_equal(expected.view(np.int32), found.view(np.int32)):
                    gap = float(np.abs(expected - found).max())
                    raise EngineMismatchError(
                        f"version {version}: the log-probabilities of engine {i}, which followed "
                        f"by deltas, differ by up to {gap:.1e} from those of the control, which "
                        "took the version whole: one of them does not hold what it verified"
                    )
        self._compare_greedy(version)

    def _compare_greedy(self, version: int) -> None:
        (expected,) = self._complete(self._whole, version)
        for i, completions in enumerate(self._complete(self._engines, version)):
            for place, ids in enumerate(completions):
                if ids != expected[place]:
                    raise EngineMismatchError(
                        f"version {version}: engine {i} and the control complete held-out problem "
                        f"{place} with other tokens, though their log-probabilities are equal"
                    )

    def _complete(self, engines: Engines, version: int) -> list[list[list[int]]]:
        """Greedy tokens of each prompt, by each of the engines."""
        count = engines.count
        dealt = [prompt for prompt in self._prompts for _ in range(count)]  # each engine gets each
        answers = [
            list(group[0].token_ids) for group in engines.generate(dealt, self._greedy, version)
        ]
        return [answers[i::count] for i in range(count)]
