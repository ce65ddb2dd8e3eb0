"""examples/fsdp_publish.py: two FSDP2 ranks, and a plain torch module that follows them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp_publish.py"


def test_the_module_follows_every_step_to_the_bit() -> None:
    run = subprocess.run(
        [sys.executable, EXAMPLE],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    found = re.findall(
        r"version (\d) from (\w+): read ([\d,]+) of ([\d,]+) bytes; equal to the bit", run.stdout
    )
    assert [(version, base) for version, base, _, _ in found] == [
        ("1", "None"),
        ("2", "1"),
        ("3", "2"),
        ("4", "3"),
    ]
    for _, base, read, full in found:
        near = int(read.replace(",", "")) < int(full.replace(",", "")) / 4
        assert near == (base != "None"), "few rows of the embedding change in a step"
