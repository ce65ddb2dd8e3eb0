"""The tokenizer: a bijection between its symbols and 0 .. vocab_size - 1."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimisys.trainer.arithmetic import ArithmeticConfig, arithmetic_task
from kimisys.trainer.tokenizer import EOS, PAD, SYMBOLS, Tokenizer

TOKENIZER = Tokenizer()


def test_ids_are_fixed() -> None:
    """Saved weights depend on these numbers."""
    assert TOKENIZER.vocab_size == 16
    assert (TOKENIZER.pad_id, TOKENIZER.eos_id) == (0, 1)
    assert TOKENIZER.encode("0123456789+=,#") == list(range(2, 16))
    assert len(set(SYMBOLS)) == len(SYMBOLS)


@settings(deadline=None)
@given(st.text(alphabet="".join(SYMBOLS[2:])))
def test_decode_inverts_encode(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not {TOKENIZER.pad_id, TOKENIZER.eos_id} & set(ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, len(SYMBOLS) - 1)))
def test_every_sequence_decodes_and_specials_stay_visible(ids: list[int]) -> None:
    text = TOKENIZER.decode(ids)
    assert text.count(PAD) == ids.count(TOKENIZER.pad_id)
    assert text.count(EOS) == ids.count(TOKENIZER.eos_id)


def test_it_writes_all_that_the_task_writes() -> None:
    task = arithmetic_task(ArithmeticConfig(demonstrations=200))
    for shown in task.demonstrations:
        text = shown.prompt + shown.completion
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("text", ["1 2", "a", "<eos>", "-1", "\uff11"])
def test_an_unknown_character_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="has no token"):
        TOKENIZER.encode(text)


@pytest.mark.parametrize("token", [-1, len(SYMBOLS)])
def test_an_id_outside_the_vocabulary_is_named(token: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token} is outside"):
        TOKENIZER.decode([2, token])
