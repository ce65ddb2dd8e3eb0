"""The study of the repetition detector counts right: alarms, planted loops, texts and tokens."""

from __future__ import annotations

import numpy as np
import pytest

from bench.repetition.study import PERIODS, alarms, planted
from bench.repetition.texts import documents
from bench.repetition.tokens import characters, trained_bpe, utf8_bytes
from kimisys.rollout import RepetitionConfig

GENERATED = ("additions", "columns", "tables", "logs")


def test_each_alarm_counts_and_the_detector_begins_anew() -> None:
    """A window is 512 tokens: 2,000 of a loop hold three."""
    plain = np.random.default_rng(0).integers(0, 50_000, 2000).astype(np.int32)
    loop = np.tile(np.arange(10, dtype=np.int32), 200)
    found = alarms("loops", "none", [plain, loop], RepetitionConfig())
    assert (found.alarms, found.alarmed, found.documents, found.tokens) == (3, 1, 2, 4000)
    assert found.per_million == 750


def test_planted_loops_are_found_and_their_delay_is_that_of_the_window() -> None:
    stream = np.random.default_rng(1).integers(0, 50_000, 60_000).astype(np.int32)
    rows = list(planted([stream], RepetitionConfig(), loops=3, seed=0))
    assert len(rows) == 2 * len(PERIODS) + sum(period >= 40 for period in PERIODS)
    for row in rows:
        assert (row.found, row.earlier) == (3, 0), row
        if row.kind == "exact":  # a tenth may differ, so a tenth of the window is not waited for
            assert 0.8 * row.window <= row.delay <= row.longest_delay <= row.window
    # Where nothing can be found nothing is said to be.
    deaf = RepetitionConfig(max_period=1, min_tokens=40_000)
    assert not any(row.found for row in planted([stream], deaf, loops=1, seed=0))


@pytest.mark.parametrize("kind", GENERATED)
def test_generated_texts_follow_their_seed(kind: str) -> None:
    texts = documents(kind, 20_000, seed=3)
    assert sum(map(len, texts)) >= 20_000
    assert all(len(text) >= 200 for text in texts)
    assert len(set(texts)) == len(texts)
    assert documents(kind, 20_000, seed=3) == texts
    assert documents(kind, 20_000, seed=4) != texts


def test_encodings() -> None:
    assert characters("aé").tolist() == [97, 233]
    assert utf8_bytes("aé").tolist() == [97, 195, 169]
    encode = trained_bpe(["the rain in the plain, 2026"] * 20)
    assert len(encode("the the")) < len("the the")
    assert len(encode("2026")) == 4  # digits one by one
