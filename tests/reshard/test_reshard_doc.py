"""The ten lines that docs/reshard.md shows run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOC = Path(__file__).parents[2] / "docs" / "reshard.md"


def test_the_lines_that_embed_it_run() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S)
    exec(compile(code, str(DOC), "exec"), {})


@pytest.mark.parametrize("word", ["mooncake.reshard", "megatron.core", "nccl_m2n", "NeMo-RL"])
def test_every_row_says_something_of_every_peer(word: str) -> None:
    table = DOC.read_text(encoding="utf-8").partition("| layout feature |")[2].partition("\n\n")[0]
    rows = ("| layout feature |" + table).splitlines()
    assert word in rows[0] and len(rows) > 20
    assert all(len([cell for cell in row.split("|")[1:-1] if cell.strip()]) == 6 for row in rows)
