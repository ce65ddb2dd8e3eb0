"""The picture of where a sync's time goes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.sync.plot import COLORS, main, parts_of

PHASES = {"publish": 30.0, "land": 20.0, "repack": 200.0, "calls and waiting": 10.0}


def record(case: str, parts: dict[str, float] | None) -> dict[str, Any]:
    return {"case": case, "correct": True, "machine": "a machine", "parts": parts}


def records() -> list[dict[str, Any]]:
    parts = {f"kimisys full: {phase}": value for phase, value in PHASES.items()}
    parts |= {"kimisys full: all": 260.0, "load_weights: gather": 1600.0, "load_weights: all": 1600}
    return [record("digest", None), record("sync, full, served", parts), record("moved", None)]


def test_a_way_is_named_and_its_time_written_beside_its_bar(tmp_path: Path) -> None:
    file, picture = tmp_path / "r.json", tmp_path / "p.svg"
    file.write_text(json.dumps(records()))
    assert main(file, picture) == 0
    texts = re.findall(r">([^<>]+)</text>", picture.read_text())
    texts = [text.strip() for text in texts]
    for text in ("kimisys full", "load_weights", "260", "1,600", "sync, full", "gather", "land"):
        assert text in texts
    assert "save" not in texts  # a phase that nobody had
    first = picture.read_bytes()
    assert main(file, picture) == 0
    assert picture.read_bytes() == first


def test_every_phase_of_a_way_is_read() -> None:
    (ways,) = parts_of(records()).values()
    assert ways["kimisys full"] == PHASES | {"all": 260.0}


def test_what_cannot_be_drawn_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps([record("digest", None)]))
    assert main(file, tmp_path / "p.svg") == 2
    assert "no record says where its time goes" in capsys.readouterr().err
    file.write_text(json.dumps([record("sync", {"a way: a phase": 1.0, "a way: all": 1.0})]))
    assert "a phase" not in COLORS
    assert main(file, tmp_path / "p.svg") == 2
    assert "no colour for the phases ['a phase'] of a way" in capsys.readouterr().err
