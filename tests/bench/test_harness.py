"""The benchmark harness: what it writes, and that it refuses to time a wrong answer."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import pytest

import bench
from bench.__main__ import names, run
from bench.harness import Case, Peer, Record, measure, measure_all

KEYS = [
    "bench",
    "case",
    "metric",
    "unit",
    "value",
    "low",
    "high",
    "peers",
    "correct",
    "machine",
    "parts",
    "figures",
    "rounds",
]
OLDEST = KEYS[:11]  # what the first kept results have


def case(answer: bool, nbytes: int | None = None) -> Case:
    def work() -> int:
        return sum(range(1000))

    return Case("c", work, {"peer": work, "other": work}, lambda: answer, nbytes)


def test_a_record_has_every_field() -> None:
    record = asdict(measure("b", case(True, nbytes=10), repeats=3))
    assert list(record) == KEYS
    assert record["unit"] == "GB/s"
    assert record["low"] <= record["value"] <= record["high"]
    assert [peer["name"] for peer in record["peers"]] == ["peer", "other"]
    assert all(peer["ratio"] > 0 and peer["value"] > 0 for peer in record["peers"])


def test_kept_results_have_the_fields_of_a_record() -> None:
    """Studies keep something else, each with a test of its own in this folder."""
    results = Path(bench.__file__).parent / "results"
    studies = ("density", "hybrid", "repetition", "schedules")
    kept = sorted(
        file for file in results.glob("*.json") if not any(name in file.name for name in studies)
    )
    assert kept
    for file in kept:
        for record in json.loads(file.read_text()):
            assert list(record) in (KEYS, OLDEST), file.name
            assert record["correct"] and (record["peers"] or record["figures"]), file.name
            for peer in record["peers"]:
                known = [field.name for field in fields(Peer)]
                assert list(peer) in (known, known[:3]), file.name


def test_the_keys_are_the_fields_of_a_record() -> None:
    assert [field.name for field in fields(Record)] == KEYS


def test_a_slow_peer_gets_the_rounds_that_its_case_says() -> None:
    calls = []
    slow = Case(
        "c",
        lambda: sum(range(1000)),
        {"slow": lambda: calls.append("slow"), "fast": lambda: calls.append("fast")},
        lambda: True,
        peer_rounds={"slow": 2},
        figures=lambda: {"calls": float(len(calls))},
    )
    record = measure("b", slow, repeats=4)
    assert (calls.count("slow"), calls.count("fast")) == (2, 5)
    assert [(peer.name, peer.rounds) for peer in record.peers] == [("slow", 2), ("fast", 4)]
    assert (record.rounds, record.figures) == (4, {"calls": 7.0})


def test_peers_that_made_something_else_get_no_time() -> None:
    other = Case("c", lambda: None, {"peer": lambda: None}, lambda: True, agree=lambda: False)
    record = measure("b", other, repeats=1)
    assert (record.correct, record.value, record.peers) == (False, None, ())


def test_a_wrong_answer_gets_no_time() -> None:
    record = measure("b", case(False), repeats=3)
    assert record.correct is False
    assert (record.value, record.low, record.high, record.peers) == (None, None, None, ())


def test_every_benchmark_is_listed_and_defines_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    listed = capsys.readouterr().out
    for name in names():
        assert name in listed
        assert all(map(callable, importlib.import_module(f"bench.{name}").GROUPS.values()))
    assert {"reshard", "broadcast"} <= set(names())


def test_json_and_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("bench.reshard")
    monkeypatch.setattr(module, "GROUPS", {"all": lambda: iter([case(True), case(False)])})
    assert run("reshard", tmp_path / "out.json", repeats=2) == 1
    records = json.loads((tmp_path / "out.json").read_text())
    assert [r["correct"] for r in records] == [True, False]
    assert list(records[0]) == KEYS
    assert run("no-such-benchmark") == 2
    assert run("reshard", repeats=0) == 2


def test_who_waits_is_told_how_far_it_is_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases() -> Iterator[Case]:
        yield case(True)
        raise RuntimeError("the second case cannot be made")

    monkeypatch.setattr(importlib.import_module("bench.reshard"), "GROUPS", {"all": cases})
    with pytest.raises(RuntimeError, match="second case"):
        run("reshard", tmp_path / "out.json", repeats=2)
    assert "case 1: c" in capsys.readouterr().err
    assert [r["case"] for r in json.loads((tmp_path / "out.json").read_text())] == ["c"]


def test_what_comes_next_is_told() -> None:
    told: list[str] = []
    slow = Case("c", lambda: None, {"peer": lambda: None}, lambda: True, peer_rounds={"peer": 1})
    measure("b", slow, repeats=2, tell=told.append)
    assert [what for what in told if what.endswith(("kimisys", "peer"))] == [
        "round 1 of 2, kimisys",
        "round 1 of 1, peer",
        "round 2 of 2, kimisys",
    ]


def test_groups_can_be_chosen_and_a_wrong_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def named(name: str) -> Case:
        return Case(name, lambda: None, {}, lambda: True)

    groups = {name: lambda name=name: iter([named(name)]) for name in ("a", "b", "c")}
    monkeypatch.setattr(importlib.import_module("bench.reshard"), "GROUPS", groups)
    assert run("reshard", tmp_path / "out.json", repeats=1, only=("c", "a")) == 0
    assert [r["case"] for r in json.loads((tmp_path / "out.json").read_text())] == ["c", "a"]
    assert run("reshard", repeats=1, only=("d",)) == 2
    assert "no group 'd'; it has: a, b, c" in capsys.readouterr().out


def test_what_comes_before_a_call_is_not_timed_and_every_clock_gets_a_record() -> None:
    now, told = [0.0], []

    def tick(seconds: float) -> None:
        now[0] += seconds

    both = Case(
        "c",
        lambda: tick(1.0),
        {"peer": lambda: tick(3.0)},
        lambda: True,
        clock=lambda: now[0],
        before=lambda: told.append(tick(100.0)),
        also={"half": lambda: now[0] / 2},
        parts=lambda: {"all": 1.0},
    )
    whole, half = measure_all("b", both, repeats=3)
    assert (whole.case, whole.value, whole.peers[0].ratio, whole.parts) == ("c", 1e3, 3, {"all": 1})
    assert (half.case, half.value, half.peers[0].ratio, half.parts) == ("half", 500, 3, None)
    assert len(told) == 4
    assert [r.correct for r in measure_all("b", case(False), repeats=1)] == [False]


def test_a_digest_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    broadcast = importlib.import_module("bench.broadcast")
    right = broadcast.digest

    def constant(layout: object, buffers: object, implementation: str | None = None) -> object:
        return right(layout, buffers, implementation=implementation) * (implementation == "naive")

    monkeypatch.setattr(broadcast, "digest", constant)
    assert not measure("b", broadcast.digesting("bfloat16", 1 << 16), repeats=1).correct


def test_the_shipped_cases_give_right_answers() -> None:
    reshard = importlib.import_module("bench.reshard")
    broadcast = importlib.import_module("bench.broadcast")
    small = [
        reshard.whole(1 << 16),
        reshard.gather(256, 1 << 16),
        reshard.scatter(256, 1 << 16),
        reshard.scatter(256, 1 << 16, shards=1),
        reshard.cast("float32", "bfloat16", 1 << 16),
        reshard.cast("bfloat16", "float32", 1 << 16),
        reshard.strided("transposed", 1 << 16),
        reshard.strided("spread", 1 << 16),
        reshard.thin_transpose(1 << 15, 2),
        reshard.thin_transpose(2, 1 << 15),
        reshard.small_copies(50, 1024, bound=False),
        reshard.small_copies(50, 1024, bound=True),
        broadcast.digesting("bfloat16", 1 << 16),
        broadcast.digesting("float32", 1 << 16),
    ]
    for each in small:
        assert measure("b", each, repeats=1).correct, each.name
    for each in broadcast.publish_and_pull(1 << 16):
        assert measure("b", each, repeats=1).correct, each.name
