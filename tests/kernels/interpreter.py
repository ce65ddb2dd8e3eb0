"""Tests in Triton's interpreter, in a process of their own: Triton reads the variable when it is
imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_interpreted(name: str) -> None:
    """Runs a file of this folder, of which every test must pass and none may be skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parent.parent,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in ", run.stdout, re.MULTILINE), run.stdout
