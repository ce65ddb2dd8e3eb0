"""Texts as token ids: by characters, by bytes, and by a BPE that is trained on the texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 8192

Encode = Callable[[str], np.ndarray]


def characters(text: str) -> np.ndarray:
    """Code points, int32."""
    return np.frombuffer(text.encode("utf-32-le", "replace"), np.int32)


def utf8_bytes(text: str) -> np.ndarray:
    """Bytes of UTF-8, int32."""
    return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int32)


def trained_bpe(texts: Iterable[str]) -> Encode:
    """Byte-level BPE with digits one by one, as language models have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text).ids, np.int32)

    return encode
