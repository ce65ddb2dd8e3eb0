"""A trainer host or an engine host of the namespace test: the two share a folder and a wire.

python far_process.py publish|subscribe FOLDER HOST TESTS: obeys lines on stdin, answers in JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np


def world() -> Any:
    from worlds import split, whole

    from kimisys.reshard import Layout

    live = Layout.merge(
        [
            split("rows", "float32", (512, 768), 0, 2),
            split("columns", "float32", (640, 1024), 1, 2),
            whole("norm", "float32", (4096,), 2),
        ]
    )
    engine = Layout.merge(
        [
            split("rows", "bfloat16", (512, 768), 1, 1),
            split("columns", "bfloat16", (640, 1024), 0, 1),
            whole("norm", "bfloat16", (4096,), 1),
        ]
    )
    return live, engine


def values(live: Any, version: int) -> dict[str, np.ndarray]:
    """Of a version: those of the one before, with one element in fifty changed."""
    random = np.random.default_rng(0)
    made = {t.name: random.standard_normal(t.shape, np.float32) for t in live.tensors}
    for _ in range(version):
        for array in made.values():
            where = random.random(array.shape) < 0.02
            array[where] = random.standard_normal(int(where.sum()), np.float32)
    return {name: array.view(np.uint32) for name, array in made.items()}


def publish(folder: Path, host: str) -> None:
    from worlds import scatter

    from kimisys.adapters.mooncake import Engine, Export
    from kimisys.broadcast import Publisher, snapshot_layout

    live, _ = world()
    snapshot = snapshot_layout(live, "bfloat16")
    engine = Engine(host)
    with contextlib.ExitStack() as stack:
        publishers = []
        for rank in live.ranks:
            publisher = Publisher(live, snapshot, rank, folder / f"{rank}.sock")
            publishers.append(stack.enter_context(publisher))
            stack.enter_context(Export(publisher, engine, folder / f"{rank}.card"))
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            version = int(line)
            buffers = scatter(live, values(live, version))
            for publisher in publishers:
                publisher.publish(version, buffers, 1)
            print(json.dumps(version), flush=True)


def subscribe(folder: Path, host: str) -> None:
    from worlds import allocate, assert_holds, rounded

    from kimisys.adapters.mooncake import Engine, connect
    from kimisys.broadcast import Subscriber

    live, destination = world()
    engine = Engine(host, staging_nbytes=1 << 18)
    landed = allocate(destination)
    with connect([folder / "0.card", folder / "1.card"], engine, 20) as peers:
        subscriber = Subscriber(peers, destination, 0)
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            version = int(line)
            try:
                pulled = subscriber.pull(version, landed, threads=1, timeout_seconds=20)
            except Exception as error:
                print(traceback.format_exc(), file=sys.stderr)
                print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
                continue
            expected = {name: rounded(bits) for name, bits in values(live, version).items()}
            assert_holds(destination, landed, expected)
            fields = pulled.version, pulled.base, pulled.wire_nbytes, pulled.full_nbytes
            print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[4])
    {"publish": publish, "subscribe": subscribe}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
