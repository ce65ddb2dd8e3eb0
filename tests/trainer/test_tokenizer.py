"""The bundled tokenizer, and any other that transformers can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kimisys.trainer.tokenizer import (
    ARITHMETIC,
    Tokenizer,
    TokenizerError,
    arithmetic_files,
    read_files,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    for name, text in arithmetic_files().items():
        (made / name).write_text(text)
    return made


@pytest.fixture(scope="module", params=["bundled", "read"])
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    return Tokenizer.arithmetic() if request.param == "bundled" else Tokenizer.read(folder)


def test_a_character_is_a_token_and_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(ARITHMETIC)
    assert ids == list(range(2, 2 + len(ARITHMETIC)))
    assert tokenizer.decode(ids) == ARITHMETIC
    assert len(tokenizer) == len(ARITHMETIC) + 2
    assert tokenizer.encode_prompt("12+3=") == tokenizer.encode("12+3=")


def test_specials_are_written_out(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode([4, 1, 0]) == "2<eos><pad>"


def test_what_has_no_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="cannot encode '1x2'"):
        tokenizer.encode("1x2")
    with pytest.raises(TokenizerError, match="no token for ''"):
        tokenizer.encode("")


def test_the_files_travel_with_a_model(folder: Path) -> None:
    assert read_files(folder) == arithmetic_files()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor vocab\.json"):
        Tokenizer.read(tmp_path)


def test_a_tokenizer_must_say_how_a_text_ends(folder: Path, tmp_path: Path) -> None:
    for name, text in read_files(folder).items():
        (tmp_path / name).write_text(text)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match="no end-of-sequence token"):
        Tokenizer.read(tmp_path)
