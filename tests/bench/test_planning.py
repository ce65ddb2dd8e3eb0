"""The planning benchmark's cases on placements small enough to count by hand."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_config

from bench.harness import measure
from bench.planning import megatron_peer, mooncake_peer
from bench.planning.cases import experts
from bench.planning.experts import ExpertPlacement, traffic_of
from bench.planning.whole import whole
from kimisys.reshard import plan

SMALL = ExpertPlacement(
    layers=5,
    experts=8,
    hidden=16,
    width=4,
    source_expert_ranks=4,
    source_stages=2,
    destination_ranks=2,
)


def test_all_three_planners_move_the_same_bytes_between_the_same_ranks() -> None:
    ours = traffic_of(plan(*SMALL.layouts()))
    given = megatron_peer.setting(SMALL)
    assert ours == SMALL.traffic()
    assert ours == megatron_peer.traffic_of(megatron_peer.planned(given), given)
    manifests = mooncake_peer.manifests(SMALL)
    assert ours == mooncake_peer.traffic_of(mooncake_peer.planned(*manifests), 4)
    # layers 0, 1 and 2 are stage 0: rank 0 holds experts 0 and 1 of them, 3 matrices of 128 bytes
    assert ours[0, 0] == 3 * 2 * 3 * 128
    assert sum(ours.values()) == 5 * 8 * 3 * 128


def test_stacked_experts_are_the_same_bytes_in_fewer_copies() -> None:
    stacked = replace(SMALL, stacked=True)
    made = plan(*stacked.layouts())
    assert traffic_of(made) == SMALL.traffic()
    assert made.proof.copies == stacked.copies == 5 * 3 * 4
    manifests = mooncake_peer.manifests(stacked)
    assert mooncake_peer.traffic_of(mooncake_peer.planned(*manifests), 4) == SMALL.traffic()


@pytest.mark.parametrize("stacked", [False, True])
def test_our_layouts_are_the_pieces_that_the_peers_are_given(stacked: bool) -> None:
    placement = replace(SMALL, stacked=stacked)
    sides = zip(placement.layouts(), (placement.source(), placement.destination()), strict=True)
    for layout, pieces in sides:
        shapes = {tensor.name: tuple(tensor.shape) for tensor in layout.tensors}
        held = [
            (f.tensor, shapes[f.tensor], f.rank, tuple(f.region.offset), tuple(f.region.extent))
            for f in layout.fragments
        ]
        assert held == [(p.tensor, p.shape, p.rank, p.offset, p.extent) for p in pieces]


def test_the_cases_give_right_answers() -> None:
    for case in [*experts(SMALL), *experts(replace(SMALL, stacked=True))]:
        record = measure("reshard", case, repeats=3)
        assert record.correct, case.name
        assert {peer.rounds for peer in record.peers} <= {1, 3}


def test_a_peer_that_plans_other_transfers_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_peer, "traffic_of", lambda plan, ranks: Counter())
    for case in experts(SMALL):
        assert not measure("reshard", case, repeats=2).correct, case.name


def test_a_whole_model_is_planned_in_a_child_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "tiny" / "config.json"
    model.parent.mkdir()
    model.write_text(json.dumps(tiny_config("qwen3_moe")))
    case = whole(tmp_path / "files", str(model), "tp=1,ep=2,etp=1", "tp=2,ep=on,replicas=2")
    record = measure("reshard", case, repeats=2)
    assert record.correct and record.value is not None and record.value > 0
    assert record.figures is not None
    assert 10 < record.figures["peak RSS of the child, MiB"] < 500
    assert record.figures["simulated / bound"] >= 1
    assert record.figures["copies"] > 0
