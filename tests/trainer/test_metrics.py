"""What a run writes down, read back: after crashes, resumes, and by other versions."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import samples, step_metrics, write_lines

from kimisys.trainer.metrics import (
    RunFolderError,
    append_record,
    open_records,
    read_metrics,
    read_samples,
)

STEPS = [step_metrics(i, shaped=i % 2 == 0) for i in range(1, 5)]


def written(path: Path) -> bytes:
    with open_records(path) as stream:
        for metrics in STEPS:
            append_record(stream, asdict(metrics))
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl") == STEPS


@given(st.data())
def test_a_file_cut_anywhere_gives_its_whole_lines_and_can_be_continued(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    content = written(path)
    kept = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(kept)
    whole = kept.count(b"\n")
    assert read_metrics(path) == STEPS[:whole]
    with open_records(path) as stream:
        append_record(stream, asdict(replace(STEPS[-1], step=9)))
    assert read_metrics(path) == [*STEPS[:whole], replace(STEPS[-1], step=9)]


def test_a_resumed_run_drops_the_steps_that_it_will_do_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path)
    open_records(path, last_step=2).close()
    assert read_metrics(path) == STEPS[:2]
    path.write_text("no record\n")
    with pytest.raises(RunFolderError, match="delete that line"):
        open_records(path, last_step=2)


def test_a_later_record_of_a_step_replaces_the_earlier(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    again = replace(STEPS[1], reward=-1.0)
    write_lines(path, [*STEPS[:3], again, STEPS[3]])
    assert read_metrics(path) == [STEPS[0], again, STEPS[2], STEPS[3]]


def test_keys_of_newer_versions_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({**asdict(STEPS[0]), "temperature": [1]}) + "\n")
    assert read_metrics(path) == STEPS[:1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 2}', "line 2 .*version"),
        ("{", "line 2 is no JSON"),
        ("", "line 2 is no JSON"),
        ("7", "line 2 .*object"),
        (json.dumps({**asdict(STEPS[0]), "loss": "low"}), r"line 2 .*\$\.loss"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(asdict(STEPS[0]))
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(RunFolderError, match=rf"metrics\.jsonl, {message}"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_samples_measured_again_replace_the_earlier(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    found = samples(2)
    again = replace(found[0], completion="another")
    write_lines(path, [*found, again])
    path.write_text(path.read_text() + '{"when": "af')
    assert read_samples(path) == [again, *found[1:]]
