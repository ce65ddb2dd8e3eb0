"""A character-level tokenizer with a fixed vocabulary: just what the arithmetic task writes."""

from collections.abc import Iterable

PAD, EOS = "<pad>", "<eos>"
SYMBOLS: tuple[str, ...] = (PAD, EOS, *"0123456789", *"+=,#")


class Tokenizer:
    """Text to token ids and back. A symbol's id is its place in `SYMBOLS`, so it never changes."""

    def __init__(self) -> None:
        self._ids = {symbol: i for i, symbol in enumerate(SYMBOLS)}

    @property
    def vocab_size(self) -> int:
        """The number of symbols; ids are 0 .. vocab_size - 1."""
        return len(SYMBOLS)

    @property
    def pad_id(self) -> int:
        """Fills a row behind a sequence; never part of a text."""
        return self._ids[PAD]

    @property
    def eos_id(self) -> int:
        """Ends a completion."""
        return self._ids[EOS]

    def encode(self, text: str) -> list[int]:
        """One id for each character, no <eos>. Raises ValueError at a character without a token."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as unknown:
            raise ValueError(
                f"{unknown.args[0]!r} in {text!r} has no token; "
                f"the vocabulary is {''.join(SYMBOLS[2:])}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Specials are written out, as <pad> and <eos>: a checker must see them.

        Raises ValueError at an id outside the vocabulary.
        """
        ids = list(ids)
        for i in ids:
            if not 0 <= i < len(SYMBOLS):
                raise ValueError(f"token id {i} is outside the vocabulary 0..{len(SYMBOLS) - 1}")
        return "".join(SYMBOLS[i] for i in ids)
