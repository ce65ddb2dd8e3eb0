"""The README's code and commands are what the project has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_is_the_one_in_the_readme() -> None:
    example = ROOT / "examples" / "embed.py"
    _, _, code = example.read_text().partition("\n\n")
    assert re.findall(r"```python\n(.*?)```", README, re.DOTALL) == [code]
    run = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "version=1" in run.stdout


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert named
    assert named <= targets


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_no_placeholder_is_left() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not re.findall(r"@@\w+@@", path.read_text()), path
