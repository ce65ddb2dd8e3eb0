"""The detector of loops against its definition, looked at for every period at every token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimisys._core.rollout import Repetition, RepetitionConfig, RepetitionDetector
from kimisys.errors import SchedulerError

many = settings(deadline=None, max_examples=200)


def window(config: RepetitionConfig, period: int) -> int:
    return max(config.min_tokens, config.min_repeats * period)


def holding(tokens: np.ndarray, config: RepetitionConfig) -> np.ndarray:
    """bool[periods + 1, tokens + 1]: whether the text up to a position loops with a period."""
    found = np.zeros((config.max_period + 1, len(tokens) + 1), bool)
    for period in range(1, config.max_period + 1):
        width = window(config, period)
        if width > len(tokens):
            continue
        equal = np.concatenate([[0], np.cumsum(tokens[period:] == tokens[:-period])])
        ends = np.arange(width, len(tokens) + 1)
        shares = equal[ends - period] - equal[ends - width]
        found[period, ends] = shares >= config.agreement * (width - period) - 1e-9
    return found


def first_of(tokens: np.ndarray, config: RepetitionConfig) -> tuple[int, int] | None:
    """The first position that loops, and its shortest period."""
    found = holding(tokens, config)
    if not found.any():
        return None
    position = int(found.any(axis=0).argmax())
    return position, int(found[:, position].argmax())


def proposed(tokens: np.ndarray, config: RepetitionConfig, position: int, period: int) -> bool:
    """Whether a gram of the window proposes the period: its place a period before is one of the
    last 8 (kPlaces). All else that the detector does loses nothing."""
    pairs = {p: window(config, p) - p for p in range(1, config.max_period + 1)}
    wrong = {p: n - math.ceil(config.agreement * n - 1e-9) for p, n in pairs.items()}
    gram = min(16, *(max(1, n // (wrong[p] + 1)) for p, n in pairs.items()))
    for end in range(position - pairs[period] + gram, position + 1):
        last = tokens[end - gram : end]
        before = tokens[max(0, end - gram - period) : end - 1]
        places = (np.lib.stride_tricks.sliding_window_view(before, gram) == last).all(axis=1)
        if places[0] and len(places) == period and places.sum() <= 8:
            return True
    return False


configs = st.builds(
    RepetitionConfig,
    max_period=st.integers(1, 40),
    min_tokens=st.integers(8, 60),
    min_repeats=st.integers(2, 5),
    agreement=st.sampled_from([1.0, 0.95, 0.9, 0.8]),
)


@st.composite
def texts(draw: st.DrawFn, vocabulary: int) -> np.ndarray:
    """Random text and loops one after the other, some of them with changes, some nested."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        loop = rng.integers(0, vocabulary, rng.integers(1, 50))
        if draw(st.booleans()):
            loop = np.concatenate([np.tile(loop[:4], 5), loop])
        part = np.tile(loop, draw(st.integers(1, 9)))
        changed = rng.random(len(part)) < draw(st.sampled_from([0.0, 0.02, 0.06, 0.2]))
        parts.append(np.where(changed, rng.integers(0, vocabulary, len(part)), part))
    return np.concatenate(parts)


@many
@given(st.sampled_from([3, 10, 1000]).flatmap(texts), configs)
def test_it_finds_what_the_definition_says_and_where(
    tokens: np.ndarray, config: RepetitionConfig
) -> None:
    """Where a gram proposes it, and at sizes at which counting is not put off: the position is the
    first, and the period its shortest."""
    found = RepetitionDetector(config).feed(tokens)
    wanted = first_of(tokens, config)
    if wanted is None:
        assert found is None
    elif proposed(tokens, config, *wanted):
        assert found is not None and (found.position, found.period) == wanted


@many
@given(st.sampled_from([2, 3, 10]).flatmap(texts), configs)
def test_what_it_finds_is_never_wrong(tokens: np.ndarray, config: RepetitionConfig) -> None:
    """Of two or three different tokens every gram is everywhere, and a loop that the definition
    has for a moment may be missed: but nothing is found that is not one."""
    detector = RepetitionDetector(config)
    found = detector.feed(tokens)
    held = holding(tokens, config)
    if found is None:
        assert detector.position == len(tokens)
        return
    assert held[:, found.position].argmax() == found.period
    pairs = window(config, found.period) - found.period
    last = tokens[found.position - pairs : found.position]
    before = tokens[found.position - pairs - found.period : found.position - found.period]
    assert found.agreement == pytest.approx((last == before).mean())
    assert found.position - pairs - found.period <= found.start < found.position


@many
@given(texts(10), configs, st.lists(st.integers(0, 30), min_size=1))
def test_how_the_tokens_come_does_not_matter(
    tokens: np.ndarray, config: RepetitionConfig, sizes: Sequence[int]
) -> None:
    whole, pieces = RepetitionDetector(config), RepetitionDetector(config)
    whole.feed(tokens)
    start = 0
    for i in range(len(tokens)):
        size = sizes[i % len(sizes)]
        pieces.feed([int(token) for token in tokens[start : start + size]])
        start += size
    pieces.feed(tokens[start:].astype(np.int32))
    assert repr(pieces.found) == repr(whole.found)
    assert pieces.position == whole.position


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 100_000),
    st.integers(1, 512),
    st.sampled_from([50, 50_000]),
    st.integers(0, 2**32 - 1),
)
def test_a_loop_is_found_within_its_window(
    before: int, period: int, vocabulary: int, seed: int
) -> None:
    """With the defaults, after much text: no later than when the loop has filled its window, with
    the start it has; a tenth of the window may be text before it, so a little earlier."""
    rng = np.random.default_rng(seed)
    config = RepetitionConfig()
    loop = rng.integers(0, vocabulary, period)
    text = rng.integers(0, vocabulary, before)
    rounds = 1 + window(config, period) // period
    found = RepetitionDetector().feed(np.concatenate([text, np.tile(loop, rounds)]))
    assert found is not None
    assert before + 0.8 * window(config, period) <= found.position
    assert found.position <= before + window(config, period)
    # twice a period has fewer tokens to compare, and may hold a token before it
    assert max(found.period, period) % min(found.period, period) == 0
    assert abs(found.start - before) <= 0.15 * window(config, period)


def test_where_every_period_nearly_loops_the_one_that_does_is_found() -> None:
    """Two tokens with changes, just too many of them: all even periods are counted again and again,
    as far as the work per token goes, and put off beyond that; then a loop begins."""
    config = RepetitionConfig(max_period=512, agreement=0.9)
    rng = np.random.default_rng(0)
    noisy = np.tile([1, 2], 20_000)
    noisy[rng.random(len(noisy)) < 0.13] = 3
    text = np.concatenate([noisy, np.tile([1, 2], 2000)])
    first = first_of(text, config)
    assert first is not None and first[0] > len(noisy)
    found = RepetitionDetector(config).feed(text)
    assert found is not None and first[0] <= found.position <= first[0] + 512


def test_a_loop_longer_than_max_period_is_none() -> None:
    loop = np.random.default_rng(1).integers(0, 50_000, 513)
    assert RepetitionDetector().feed(np.tile(loop, 20)) is None
    found = RepetitionDetector(RepetitionConfig(max_period=513)).feed(np.tile(loop, 20))
    assert found is not None and found.period == 513


def test_counters_are_near_repeats() -> None:
    """A line of which a number changes, by characters: until it grows by a digit, which makes the
    line one longer and so another loop."""
    text = "".join(f"Wait, let me check line {i} of the table again.\n" for i in range(100, 400))
    found = RepetitionDetector().feed([ord(character) for character in text])
    assert found is not None and found.period == len(text) // 300
    assert found.agreement < 1.0
    exact = RepetitionConfig(agreement=1.0)
    assert RepetitionDetector(exact).feed([ord(character) for character in text]) is None


def test_what_is_found_stays() -> None:
    detector = RepetitionDetector()
    assert detector.found is None
    found = detector.feed([7] * 1000)
    assert isinstance(found, Repetition)
    assert repr(found) == "Repetition(position=512, start=0, period=1, agreement=1)"
    assert repr(detector.feed(range(10_000))) == repr(detector.found) == repr(found)
    assert detector.position == 512


def test_configurations_are_values() -> None:
    config = RepetitionConfig(max_period=64)
    assert config == RepetitionConfig(max_period=64) != RepetitionConfig()
    assert hash(config) == hash(RepetitionConfig(max_period=64))
    assert repr(config) == (
        "RepetitionConfig(max_period=64, min_tokens=512, min_repeats=6, agreement=0.9)"
    )
    assert RepetitionDetector(config).config == config


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_period": 0}, "max_period is 0; give 1 to"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_repeats": 1}, "min_repeats is 1; give 2 to"),
        ({"agreement": 0.0}, "agreement is 0; give a share above 0"),
        ({"agreement": math.nan}, "agreement is nan"),
        ({"max_period": 2**20, "min_repeats": 2**20}, "make one of them smaller"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, float], said: str) -> None:
    with pytest.raises(SchedulerError, match=said):
        RepetitionConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([0.5, 1.0], "tokens are float64; give integers"),
        ([[1, 2], [3, 4]], "one dimension"),
        (7, "one dimension"),
        ([1, -1], "token 1 is -1; token ids are 0 to"),
        ([2**31], "token 0 is 2147483648"),
        (["a"], "give integers"),
    ],
)
def test_what_is_no_tokens_is_refused(tokens: object, said: str) -> None:
    detector = RepetitionDetector()
    with pytest.raises(SchedulerError, match=said):
        detector.feed(tokens)  # type: ignore[arg-type]
    assert detector.position == 0
    assert detector.feed([]) is None
