"""Supervised steps on a task's demonstrations, in an order that follows from the seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kimisys.trainer.batch import Batch, make_batch
from kimisys.trainer.task import Demonstration
from kimisys.trainer.tokenizer import Tokenizer


class Demonstrations:
    """A task's demonstrations as batches: step after step through a new order each epoch."""

    def __init__(
        self, demonstrations: Sequence[Demonstration], tokenizer: Tokenizer, size: int, seed: int
    ) -> None:
        """size: sequences of a batch."""
        self._demonstrations, self._tokenizer = demonstrations, tokenizer
        self._size, self._seed = size, seed

    def batch(self, step: int) -> Batch:
        """What step `step` (from 0) trains on; a function of the seed and the step."""
        count = len(self._demonstrations)
        places = range(step * self._size, (step + 1) * self._size)
        orders = {epoch: self._order(epoch) for epoch in {place // count for place in places}}
        chosen = [self._demonstrations[orders[place // count][place % count]] for place in places]
        encode, eos = self._tokenizer.encode, self._tokenizer.eos_id
        return make_batch(
            [self._tokenizer.encode_prompt(one.prompt) for one in chosen],
            [[*encode(one.completion), eos] for one in chosen],
            self._tokenizer.pad_id,
        )

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._demonstrations))
