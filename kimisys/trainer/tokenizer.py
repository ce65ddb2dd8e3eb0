"""Text to token ids and back, by the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kimisys.errors import KimisysError

ARITHMETIC = "0123456789+=,#"
"""What the arithmetic task writes; the bundled tokenizer has one token for each character."""

_PAD, _EOS = "<pad>", "<eos>"
_NOTHING = ""  # stands for no token: an unknown character is an error

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""What makes up a tokenizer in a model folder; a folder holds some of these."""


class TokenizerError(KimisysError):
    """A folder without a usable tokenizer, or a text that it cannot encode; the message says
    which."""


class Tokenizer:
    """A tokenizer of transformers, with no more than the trainer needs of it."""

    def __init__(self, inner: Any, whose: str) -> None:
        """inner: a transformers tokenizer. whose: for error messages."""
        self._inner, self._whose = inner, whose
        if inner.eos_token_id is None:
            raise TokenizerError(
                f"{whose} has no end-of-sequence token; name it as `eos_token` in "
                "tokenizer_config.json"
            )
        self.eos_id: int = int(inner.eos_token_id)
        """Ends a completion."""
        pad = inner.pad_token_id
        self.pad_id: int = self.eos_id if pad is None else int(pad)
        """Fills a row behind a sequence; what it is does not matter."""

    @classmethod
    def read(cls, folder: Path) -> Tokenizer:
        """The tokenizer in `folder`; nothing is fetched. Raises TokenizerError."""
        from transformers import AutoTokenizer  # takes seconds to import

        if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
            raise TokenizerError(
                f"{folder} has neither tokenizer.json nor vocab.json; other kinds of tokenizer "
                "cannot be copied along with the weights: save it once with transformers' "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        try:
            inner = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers raises nothing narrower
            raise TokenizerError(
                f"{folder} has no tokenizer that transformers can read ({error}); copy the files "
                "of the model's tokenizer there"
            ) from error
        return cls(inner, f"the tokenizer of {folder}")

    @classmethod
    def arithmetic(cls) -> Tokenizer:
        """The bundled tokenizer: one token for each character of `ARITHMETIC`."""
        from transformers import PreTrainedTokenizerFast

        inner = PreTrainedTokenizerFast(
            tokenizer_object=_arithmetic(), eos_token=_EOS, pad_token=_PAD
        )
        return cls(inner, f"the bundled tokenizer, which knows {ARITHMETIC!r},")

    def __len__(self) -> int:
        """The number of tokens, special ones included."""
        return len(self._inner)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt, with what the model expects at the start of a text."""
        return self._encode(text, True)

    def encode(self, text: str) -> list[int]:
        """The ids of a text that goes on: no special tokens are added."""
        return self._encode(text, False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Specials are written out: a checker must see them."""
        return str(
            self._inner.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            ids = list(self._inner.encode(text, add_special_tokens=special))
        except Exception as error:  # tokenizers raises nothing narrower
            raise TokenizerError(
                f"{self._whose} cannot encode {text!r}: it has no token for some of its "
                "characters; use others, or a model whose tokenizer knows them"
            ) from error
        if not ids:
            raise TokenizerError(
                f"{self._whose} has no token for {text!r}; give a text that is not empty"
            )
        return ids


def read_files(folder: Path) -> dict[str, str]:
    """The tokenizer's files in `folder`, by name, to be written into another model folder."""
    return {name: (folder / name).read_text() for name in FILES if (folder / name).exists()}


def arithmetic_files() -> dict[str, str]:
    """The files of the bundled tokenizer, as a model folder has them."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _EOS,
        "pad_token": _PAD,
    }
    return {
        "tokenizer.json": _arithmetic().to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def _arithmetic() -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    symbols = (_PAD, _EOS, *ARITHMETIC)
    fast = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, _NOTHING))
    fast.add_special_tokens([AddedToken(_PAD), AddedToken(_EOS)])
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast.decoder = decoders.Fuse()
    return fast
