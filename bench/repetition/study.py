"""Alarms on texts that do not loop, and what becomes of loops that are planted into them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kimisys.rollout import RepetitionConfig, RepetitionDetector

PERIODS = (1, 7, 40, 150, 400)
ROUNDS_LATER = 30_000  # tokens of a loop: beyond it a response would be at its limit


@dataclass(frozen=True)
class Alarms:
    """What a configuration made of one kind of text. alarms: in all, the detector beginning anew
    after each. alarmed: documents with at least one."""

    kind: str
    encoding: str
    tokens: int
    documents: int
    alarms: int
    alarmed: int

    @property
    def per_million(self) -> float:
        """Alarms per million tokens."""
        return 1e6 * self.alarms / max(self.tokens, 1)


@dataclass(frozen=True)
class Planted:
    """Loops of one kind and period in tokens, planted at random places of prose. delay: median
    tokens from the loop's begin until it was found, and the most; window: what the configuration
    asks for. earlier: of those not found, in how many the text before the loop raised an alarm."""

    kind: str
    period: int
    loops: int
    found: int
    earlier: int
    window: int
    delay: float
    longest_delay: int


def alarms(
    kind: str, encoding: str, texts: Sequence[np.ndarray], config: RepetitionConfig
) -> Alarms:
    """Feed each text to a detector of its own."""
    counts = [_alarms_in(text, config) for text in texts]
    return Alarms(
        kind,
        encoding,
        sum(map(len, texts)),
        len(texts),
        sum(counts),
        sum(count > 0 for count in counts),
    )


def _alarms_in(text: np.ndarray, config: RepetitionConfig) -> int:
    count = start = 0
    while (found := RepetitionDetector(config).feed(text[start:])) is not None:
        count, start = count + 1, start + found.position
    return count


def planted(
    texts: Sequence[np.ndarray], config: RepetitionConfig, loops: int, seed: int
) -> Iterator[Planted]:
    """Cut a phrase out of a text, and let it go round and round after some other text: as it is;
    with one token in it that counts up (as it makes a difference in 1 of `period` tokens, from 40
    on); and with 3 of 100 tokens replaced by chance."""
    rng = np.random.default_rng(seed)
    stream = np.concatenate(texts)
    kinds: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Sequence[int]]] = {
        "exact": (lambda loop: loop, PERIODS),
        "counter": (_counting, [period for period in PERIODS if period >= 40]),
        "3 % replaced": (lambda loop: _replaced(loop, rng), PERIODS),
    }
    for kind, (change, periods) in kinds.items():
        for period in periods:
            delays, earlier = [], 0
            for _ in range(loops):
                before = int(rng.integers(0, min(20_000, len(stream) // 2)))
                start, phrase = rng.integers(0, len(stream) - max(before, period), 2)
                rounds = -(-ROUNDS_LATER // period)
                loop = np.tile(stream[phrase : phrase + period], (rounds, 1))
                text = np.concatenate([stream[start : start + before], change(loop).reshape(-1)])
                found = RepetitionDetector(config).feed(text)
                if found is not None and found.position > before:
                    delays.append(found.position - before)
                earlier += found is not None and found.position <= before
            window = max(config.min_tokens, config.min_repeats * period)
            middle = statistics.median(delays) if delays else float("nan")
            yield Planted(
                kind, period, loops, len(delays), earlier, window, middle, max(delays, default=0)
            )


def _counting(loop: np.ndarray) -> np.ndarray:
    """int32[rounds, period], the token in the middle another one in each round."""
    loop = loop.copy()
    loop[:, loop.shape[1] // 2] = 2_000_000 + np.arange(len(loop))
    return loop


def _replaced(loop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    other = rng.integers(0, 1000, loop.shape, np.int32)
    return np.where(rng.random(loop.shape) < 0.03, other, loop)
