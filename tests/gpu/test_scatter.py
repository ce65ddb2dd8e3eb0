"""The scatter on the device: from a diff there to the shards of an engine there, the result is that
of the plan that copies everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.reshard import matrix
from kimisys.broadcast import digest, snapshot_layout
from kimisys.kernels.delta import blocks_of, decode
from kimisys.kernels.diff import bind as bind_diff
from kimisys.kernels.scatter import bind, implementations
from kimisys.reshard import plan

ROWS, COLUMNS = 512, 8192


def test_there_is_one(device: torch.device) -> None:
    assert implementations(device) == ["triton"]


@pytest.mark.parametrize("density", [0.0005, 0.02, 1.0])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn"])
def test_from_a_diff_to_the_shards(
    device: torch.device, dtype: str, axis: int, density: float
) -> None:
    live = matrix(ROWS, COLUMNS, dtype, 0, 1, 0)
    snapshot = snapshot_layout(live)
    shards = matrix(ROWS, COLUMNS, dtype, 0, 4, axis)
    made, blocks = plan(snapshot, shards), blocks_of(snapshot)
    random = np.random.default_rng(0)
    into = torch.from_numpy(random.integers(0, 256, snapshot.buffers[0].nbytes, "u1")).to(device)
    weights = into.clone()
    bound = bind_diff(live, snapshot, snapshot, {(0, "w"): weights}, into)
    held = {(b.rank, b.name): np.zeros(b.nbytes, np.uint8) for b in shards.buffers}
    made.execute({(0, "snapshot"): into.cpu().numpy()}, held)
    there = {key: torch.from_numpy(array.copy()).to(device) for key, array in held.items()}

    changed = torch.rand(weights.shape, device=device) < density
    weights[changed] = ~weights[changed]
    changes = decode(bound.run(), snapshot, blocks)
    scatter = bind(made, 0, blocks, there)
    before = digest(shards, held)
    made.execute({(0, "snapshot"): into.cpu().numpy()}, held)
    np.testing.assert_array_equal(scatter.measure(changes), changes.increments)
    np.testing.assert_array_equal(digest(shards, held) - before, changes.increments)
    assert scatter.run(changes) == sum(map(len, changes.positions))
    for key, array in held.items():
        assert torch.equal(there[key].cpu(), torch.from_numpy(array)), key
    assert not scatter.measure(changes).any()
