"""examples/embed_rollout.py runs, and docs/rollout.md shows its loop."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "embed_rollout.py"


def test_the_example_makes_its_batches() -> None:
    run = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "3 batches; Ledger(" in run.stdout
    assert len(re.findall(r"^group \d+: train it", run.stdout, re.MULTILINE)) >= 3


def test_the_page_shows_its_loop() -> None:
    _, start, rest = EXAMPLE.read_text().partition("async def main(")
    loop = start + rest
    assert len(loop.strip().splitlines()) <= 40
    page = (ROOT / "docs" / "rollout.md").read_text()
    assert any(block.strip().endswith(loop.strip())
               for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL))  # fmt: skip
