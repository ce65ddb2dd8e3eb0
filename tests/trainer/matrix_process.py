"""One family under every Megatron layout, followed by two engines, by digest and bit for bit.

A script, as Megatron's process groups are no company for vLLM's, which other tests leave behind.
Arguments: the family, "tied" or "untied", a folder to work in.

Two real engines, of one rank and of two, follow at once. For each layout all Megatron ranks are
built in this process (a fragment needs memory, not a process), loaded from a checkpoint by plan and
published; forward and backward over real ranks are tested in adapters/megatron. Two sets of weights
take turns, so that an engine which kept the former ones would be seen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import torch
from tiny_models import tiny_config

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import build_model
from kimisys.broadcast import Publisher, snapshot_layout
from kimisys.reshard import Layout, plan
from kimisys.reshard.safetensors import open_checkpoint
from kimisys.trainer.engines import Engines
from kimisys.trainer.initial import write_initial_checkpoint
from kimisys.trainer.processes import processes

LAYOUTS = [(tp, pp) for pp in (1, 2) for tp in (1, 2, 4)]
PROBE = [5, 17, 99, 3, 42, 42, 7]
VERSIONS = count(1)

Config = dict[str, object]


@contextmanager
def published_by_megatron(
    config: Config, folder: Path, tensor_parallel: int, pipeline_parallel: int, sockets: Path
) -> Iterator[list[Publisher]]:
    """Publishers of all ranks of a layout, that hold the weights of `folder`."""
    world = tensor_parallel * pipeline_parallel
    checkpoint = open_checkpoint(folder)
    layouts, buffers = [], {}
    for rank in range(world):
        with runtime.offline(tensor_parallel, pipeline_parallel, rank, world):
            model = build_model(config, torch.float32)
            layouts.append(model_layout(model, config, rank))
            mine = model_buffers(model, rank)
        plan(checkpoint.layout, layouts[-1]).execute(checkpoint.buffers, mine)
        buffers |= mine
    snapshots = snapshot_layout(Layout.merge(layouts))
    version = next(VERSIONS)
    with ExitStack() as open_ones:
        made = []
        for rank, layout in enumerate(layouts):
            publisher = Publisher(layout, snapshots, rank, sockets / f"{version}-{rank}")
            made.append(open_ones.enter_context(publisher))
            publisher.publish(version, buffers)
        yield made


@contextmanager
def published_from(folder: Path, sockets: Path) -> Iterator[list[Publisher]]:
    """One publisher, of a checkpoint as it lies on disk."""
    checkpoint = open_checkpoint(folder)
    version = next(VERSIONS)
    snapshot = snapshot_layout(checkpoint.layout)
    with Publisher(checkpoint.layout, snapshot, 0, sockets / f"{version}-0") as publisher:
        publisher.publish(version, checkpoint.buffers)
        yield [publisher]


def followed(engines: Engines, publishers: list[Publisher]) -> tuple[int, list[np.ndarray]]:
    """Digests compared, and what each engine computes of the probe, after a sync."""
    version = publishers[0].version
    assert version is not None
    engines.connect([publisher.address for publisher in publishers])
    sync = engines.update(version)
    return sync.digests, engines.probe(PROBE, version)


def main(family: str, tied: bool, folder: Path) -> None:
    config = tiny_config(family, tied=tied, num_key_value_heads=4)
    folders = [folder / name for name in ("some", "other")]
    for seed, folder in enumerate(folders):
        write_initial_checkpoint(folder, config, seed)
    tensors = len(open_checkpoint(folders[0]).layout.tensors)
    with processes(240.0, "") as (actors, sockets):
        sides = [
            Engines(actors, folders[0], "float32", 64, tensor_parallel=tp, name=f"engine of {tp}")
            for tp in (1, 2)
        ]
        for engines in sides:
            engines.start()
        expected = {}
        for folder in folders:
            with published_from(folder, sockets) as publishers:
                expected[folder] = [followed(engines, publishers)[1][0] for engines in sides]
        whole, split = expected[folders[0]]
        np.testing.assert_allclose(whole, split, atol=1e-5)  # the same model, otherwise summed
        assert np.abs(whole - expected[folders[1]][0]).max() > 1e-2
        for i, (tp, pp) in enumerate(LAYOUTS):
            folder = folders[i % 2]
            with published_by_megatron(config, folder, tp, pp, sockets) as publishers:
                for engines, bits in zip(sides, expected[folder], strict=True):
                    digests, found = followed(engines, publishers)
                    assert digests >= tensors
                    np.testing.assert_array_equal(found[0], bits, err_msg=f"TP {tp}, PP {pp}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "tied", Path(sys.argv[3]))
