"""Families x Megatron layouts x engines: every combination synced, by digest and bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import FAMILIES

SCRIPT = Path(__file__).parent / "matrix_process.py"
MODELS = Path(__file__).parent.parent / "models"


@pytest.mark.parametrize("tied", ["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_reaches_both_engines(family: str, tied: str, tmp_path: Path) -> None:
    paths = [str(MODELS), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, SCRIPT, family, tied, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stdout + run.stderr
