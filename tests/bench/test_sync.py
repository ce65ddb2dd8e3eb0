"""The sync benchmark end to end at a tiny shape: real Megatron ranks, a real vLLM engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bench.harness import measure
from bench.sync.cases import QWEN3_0_6B, cases
from bench.sync.child import Child, ChildError
from bench.sync.world import World

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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    before = children()
    with closing(World(TINY, tmp_path_factory.mktemp("sync"))) as running:
        assert len(children() - before) == 3
        yield running
    assert children() == before, "a process is left"


def test_every_case_gives_a_right_answer_and_says_where_its_time_goes(world: World) -> None:
    records = [measure("b", case, repeats=2) for case in cases(world, "tiny")]
    assert all(record.correct for record in records)
    assert [(record.case.rpartition(", ")[2], len(record.peers)) for record in records] == [
        ("served", 1),
        ("moved", 1),
        ("against one copy", 2),
    ]
    parts = records[0].parts
    assert parts is not None
    for way in ("kimisys", "usual"):
        ours = {name: value for name, value in parts.items() if name.startswith(way)}
        assert min(ours.values()) >= 0
        whole = ours.pop(f"{way}: all")
        assert ours[f"{way}: repack"] > 0 and whole > max(ours.values())
    assert world.packing > 0


@pytest.mark.parametrize("way", ["kimisys", "usual"])
def test_a_way_that_brings_nothing_is_found_out(
    world: World, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(world, way, lambda: None)
    faults = world.faults()
    assert any("log-probabilities of engine and trainer differ" in fault for fault in faults)
    timed = next(cases(world, "tiny"))
    assert not measure("b", timed, repeats=1).correct


def test_gathered_bits_that_differ_are_found_out_by_name(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = world.usual

    def damaged() -> None:
        usual()
        world.gathered[-1] ^= 1  # the last tensor, after the engine has loaded it

    monkeypatch.setattr(world, "usual", damaged)
    faults = world.faults()
    assert len(faults) == 1 and "gathered and published tensors differ: ['model.norm" in faults[0]


def test_a_case_that_was_never_looked_at_is_wrong(world: World) -> None:
    _, *others = cases(world, "tiny")
    assert [case.correct() for case in others] == [False, False]
    assert len({case.name for case in cases(world, "tiny")}) == 3


def test_a_vocabulary_that_needs_padding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 513 needs padding on 2 ranks"):
        World({**TINY, "vocab_size": 513}, tmp_path)


def test_a_process_that_fails_says_what_it_printed() -> None:
    child = Child("no.such.module", {}, {})
    with closing(child), pytest.raises(ChildError, match="No module named"):
        child.receive(60.0)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
