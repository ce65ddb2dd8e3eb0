"""Runs every bench_*.py of this folder and writes the records as JSON: `python measure.py FILE`.

A process of its own, so that a crash on the device leaves gpu-check its report.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from bench.harness import measure

REPEATS = 9

if __name__ == "__main__":
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    records = [
        asdict(measure(name, case, REPEATS))
        for name in names
        for case in importlib.import_module(name).cases()
    ]
    Path(sys.argv[1]).write_text(json.dumps(records))
