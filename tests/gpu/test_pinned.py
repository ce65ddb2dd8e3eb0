"""Weights that land in pinned memory reach the GPU with every bit: their digests, taken of what
comes back, are those of the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pinned import Arrays, arrays, pinned, through

from bench.reshard import matrix
from kimisys.broadcast import Publisher, Subscriber, connect, digest, snapshot_layout
from kimisys.reshard import Layout, implementations, plan

ROWS = 257


def random(layout: Layout) -> Arrays:
    generator = np.random.default_rng(0)
    return {(b.rank, b.name): generator.integers(0, 256, b.nbytes, "u1") for b in layout.buffers}


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("columns", [6, 4096])  # odd rows of a few bytes, whole cache lines
def test_what_a_plan_wrote_comes_back_from_the_gpu(
    device: torch.device, implementation: str, dtype: str, columns: int
) -> None:
    source = matrix(ROWS, columns, dtype, rank=0, parts=2, axis=1)
    whole = matrix(ROWS, columns, dtype, rank=0, parts=1, axis=1)
    shards, landed = random(source), pinned(whole)
    plan(source, whole).execute(shards, arrays(landed), implementation=implementation)
    back = through(device, landed)
    np.testing.assert_array_equal(digest(whole, back), digest(source, shards))


def test_what_was_pulled_comes_back_from_the_gpu(device: torch.device, tmp_path: Path) -> None:
    live = matrix(ROWS, 4096, "bfloat16", rank=0, parts=1, axis=0)
    weights, landed = random(live), pinned(live)
    with Publisher(live, snapshot_layout(live, "bfloat16"), 0, tmp_path / "rank0") as publisher:
        publisher.publish(1, weights)
        with connect([tmp_path / "rank0"]) as peers:
            Subscriber(peers, live, rank=0).pull(1, arrays(landed))
    np.testing.assert_array_equal(digest(live, through(device, landed)), digest(live, weights))


def test_a_single_changed_bit_is_seen(device: torch.device) -> None:
    whole = matrix(ROWS, 4096, "bfloat16", rank=0, parts=1, axis=0)
    landed = pinned(whole)
    before = digest(whole, arrays(landed))
    landed[0, "w"][12345] ^= 1
    assert (digest(whole, through(device, landed)) != before).all()
