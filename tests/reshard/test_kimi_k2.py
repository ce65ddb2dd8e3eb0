"""Whole-model numbers at Kimi-K2's scale, by counting on paper. Nothing here is spelled out."""

import numpy as np
import pytest

from bench import kimi_k2
from kimisys.reshard import SymbolicLayout, SymbolicPlan, plan, symbolic_plan

EXPERT_BYTES = 3 * 2048 * 7168 * 2
ATTENTION_BYTES = 16384 * 1536 * 2
# A rank's part of the attention is half of one that the source holds: one copy each.
ATTENTION_COPIES = 128


@pytest.mark.parametrize(
    ("destination", "copies_of_a_layer", "replicas", "times"),
    [
        (kimi_k2.inference(), 3 * 384, 8, 1),
        (kimi_k2.inference(expert=1, slices=128), 3 * 384 * 128, 8, 1),
        (kimi_k2.inference(expert=1, slices=16), 3 * 384 * 128, 8, 8),
    ],
    ids=["experts whole", "experts sliced", "replicas"],
)
def test_the_whole_model(
    destination: SymbolicLayout, copies_of_a_layer: int, replicas: int, times: int
) -> None:
    made = symbolic_plan(kimi_k2.training(), destination)
    assert made.proof.copies == 60 * (copies_of_a_layer + ATTENTION_COPIES)
    assert made.proof.copied_bytes == 60 * (times * 384 * EXPERT_BYTES + replicas * ATTENTION_BYTES)
    assert made.proof.destination_bytes == made.proof.copied_bytes == destination.nbytes
    traffic = made.traffic()
    assert traffic["bytes"].sum() == made.proof.copied_bytes
    assert traffic["copies"].sum() == made.proof.copies
    # Four of the 32 ranks of a stage hold the same part of the attention, and share the work.
    sent = np.bincount(traffic["source_rank"], traffic["bytes"])
    for stage in sent.reshape(8, 32):
        assert stage.max() == stage.min()
    assert SymbolicPlan.from_bytes(made.to_bytes()).fingerprint == made.fingerprint


def test_the_routed_experts_as_a_plan_of_concrete_layouts() -> None:
    source = kimi_k2.training(expert=16, attention=False)
    destination = kimi_k2.inference(ranks=32, expert=32, attention=False)
    made = symbolic_plan(source, destination)
    assert made.proof.copies == 69_120
    assert made.proof == plan(source.concrete(), destination.concrete()).proof
    part = made.of_rank(31)
    assert part.proof.copies == 60 * 12 * 3
    assert len(part.source.fragments) == 60 * 12 * 3


def test_a_share_of_sliced_experts_holds_no_more_than_it_writes() -> None:
    made = symbolic_plan(kimi_k2.training(), kimi_k2.inference(expert=1, slices=128))
    share = made.of_source(100)
    traffic = made.traffic()
    mine = traffic["source_rank"] == 100
    assert share.proof.copies == len(share.destination.fragments) == traffic["copies"][mine].sum()
    assert share.proof.destination_bytes == traffic["bytes"][mine].sum()
    experts, layers = 384 // 32, 8
    assert len(share.source.fragments) == layers * (3 * experts + 1)
    # Of each buffer it has the size, and of the 3 * 384 fragments there those of its own experts.
    written = share.destination
    whole = made.destination.of_rank(0)
    assert {b.nbytes for b in written.buffers} <= {b.nbytes for b in whole.buffers}
