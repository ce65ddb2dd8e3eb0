"""The sync benchmark end to end at a tiny shape: real Megatron ranks, a real vLLM engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bench.harness import measure, measure_all
from bench.sync.cases import QWEN3_0_6B, cases
from bench.sync.child import Child, ChildError
from bench.sync.world import NotADeltaError, World

TINY = {
    **QWEN3_0_6B,
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
"""vLLM's attention on the CPU knows no smaller heads."""


@pytest.fixture(scope="module", params=[2])
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    before = children()
    folders = tmp_path_factory.mktemp("sync"), tmp_path_factory.mktemp("disk")
    with closing(World(TINY, *folders, engine_ranks=request.param)) as running:
        assert len(children() - before) == 3
        yield running
    assert children() == before, "a process is left"


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_every_case_gives_a_right_answer_and_says_where_its_time_goes(world: World) -> None:
    records = [r for case in cases(world, "tiny") for r in measure_all("b", case, repeats=2)]
    assert all(record.correct for record in records)
    assert [(record.case.partition(", TP ")[2], len(record.peers)) for record in records] == [
        (f"2 to TP {world.engine_ranks}, {what}, {how}", 2)
        for what in ("full", "1 % delta")
        for how in ("served", "moved")
    ]
    for record, ours in ((records[0], "kimisys full"), (records[2], "kimisys delta")):
        for way in (ours, "load_weights", "reload_weights"):
            parts = record.parts or {}
            mine = {name: value for name, value in parts.items() if name.startswith(f"{way}: ")}
            assert min(mine.values()) >= 0
            whole = mine.pop(f"{way}: all")
            assert mine[f"{way}: repack"] > 0 and whole > max(mine.values())
    assert world.packing > 0
    figures = records[2].figures
    assert figures is not None and 0.8 < figures["density (%)"] < 1.2
    wire, full = (figures[f"wire bytes of {each} (MB)"] for each in ("the delta", "a full pull"))
    assert 0 < wire < full / 10


@pytest.mark.parametrize("way", ["full", "load_weights", "reload_weights", "delta"])
def test_a_way_that_brings_nothing_is_found_out(
    world: World, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def nothing() -> None:
        """Under the way's name, by which `faults` tells them apart."""

    monkeypatch.setattr(world, way, nothing)
    faults = world.faults()
    assert any(repr(way) in fault or "log-probabilities" in fault for fault in faults), faults
    timed = next(cases(world, "tiny"))
    assert not measure("b", timed, repeats=1).correct


def test_gathered_bits_that_differ_are_found_out_by_name(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = world.load_weights

    def damaged() -> None:
        usual()
        world.gathered[-1] ^= 1  # the last tensor, after the engine has loaded it

    monkeypatch.setattr(world, "load_weights", damaged)
    faults = world.faults()
    assert len(faults) == 1 and "gathered and published tensors differ: ['model.norm" in faults[0]


def test_a_delta_of_other_elements_than_were_changed_is_found_out(world: World) -> None:
    assert world.faults() == []
    world.change()
    world.change()  # back: nothing is left to publish
    with pytest.raises(NotADeltaError, match="changes were found where"):
        world.delta()


def test_a_case_that_was_never_looked_at_is_wrong(world: World) -> None:
    _, *others = cases(world, "tiny")
    assert [case.correct() for case in others] == [False]
    assert len({case.name for case in cases(world, "tiny")}) == 2


def test_a_vocabulary_that_needs_padding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 513 needs padding on 2 ranks"):
        World({**TINY, "vocab_size": 513}, tmp_path, tmp_path)


def test_a_process_that_fails_says_what_it_printed() -> None:
    child = Child("no.such.module", {}, {})
    with closing(child), pytest.raises(ChildError, match="No module named"):
        child.receive(60.0)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
