"""Two Megatron ranks, one vLLM engine, and four ways of bringing the ranks' weights to it."""

from __future__ import annotations

import json
import mmap
import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.sync.child import Child
from kimisys.adapters.megatron.families import family_of, padded_vocab_size
from kimisys.adapters.vllm.environment import environment
from kimisys.broadcast import connect, digest
from kimisys.broadcast.wire import Deadline
from kimisys.reshard import Buffer, Fragment, Layout, Region

RANKS = 2
CORES = 2  # threads of torch, of vLLM's packing and of the pull, of all ranks of an engine together

_START_SECONDS = 300.0
_PROBE = [1, 20, 300, 17]


class NotADeltaError(RuntimeError):
    """An update was to bring what had been changed, and brought something else."""


class World:
    """The processes, and all ways.

    hf_config: the contents of config.json; its vocabulary must need no padding on RANKS ranks.
    folder: for config.json and sockets; its owner's alone. disk: for the safetensors; on a RAM
    disk. engine_ranks: tensor parallelism of the engine. density: of what `change` changes.

    Attributes:
        engine_ranks, density: as given.
        nbytes: of all tensors.
        gathered: uint8[nbytes], the shared memory that `load_weights` goes through.
        seconds: of every run since the last check, by way and phase.
        packing: seconds that all runs so far, of any way, spent in vLLM's packing.
        figures: of the last update by a delta.
    """

    def __init__(
        self,
        hf_config: Mapping[str, Any],
        folder: Path,
        disk: Path,
        engine_ranks: int = 1,
        density: float = 0.01,
    ) -> None:
        self.tensors = family_of(hf_config).hf_tensors("bfloat16")
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)
        self.engine_ranks = engine_ranks
        self.seconds: defaultdict[str, defaultdict[str, list[float]]]
        self.seconds = defaultdict(lambda: defaultdict(list))
        self.packing = 0.0
        self.figures: dict[str, float] = {}
        self._prepared: list[int] = []
        self.density = density
        self._version = 0
        self._addresses = [str(folder / f"rank{rank}") for rank in range(RANKS)]
        self._disk = disk
        self._vocabulary = int(hf_config["vocab_size"])
        if padded_vocab_size(self._vocabulary, RANKS) != self._vocabulary:
            raise ValueError(
                f"vocab_size {self._vocabulary} needs padding on {RANKS} ranks, of which mbridge "
                "knows nothing here: give a size that needs none"
            )
        self._open = ExitStack()
        try:
            self._start(dict(hf_config), folder)
        except BaseException:
            self.close()
            raise

    def _start(self, hf_config: dict[str, Any], folder: Path) -> None:
        for place in (folder, self._disk):
            (place / "config.json").write_text(json.dumps(hf_config))
        # One buffer for all versions, its pages there before the first is timed.
        memory = os.memfd_create("gathered")
        self._open.callback(os.close, memory)
        os.posix_fallocate(memory, 0, self.nbytes)
        self.gathered = np.frombuffer(mmap.mmap(memory, self.nbytes), np.uint8)
        port = _free_port()
        self._ranks = [
            self._child(
                "bench.sync.rank",
                {"rank": r, "world": RANKS, "port": port, "hf_config": hf_config, "memory": memory},
                {"OMP_NUM_THREADS": "1"},
                memory,
            )
            for r in range(RANKS)
        ]
        self._engine = self._child(
            "bench.sync.engine",
            {
                "model": str(folder),
                "ranks": self.engine_ranks,
                "threads": CORES // self.engine_ranks,
                "memory": memory,
            },
            environment(CORES // self.engine_ranks),
            memory,
        )
        for child in (*self._ranks, self._engine):
            child.receive(_START_SECONDS)
        snapshots = _together(self._ranks, "snapshot")
        for rank, address in zip(self._ranks, self._addresses, strict=True):
            rank.call("open_publisher", snapshots=snapshots, address=address)
        _together(self._ranks, "publish", version=self._version, full=True)
        self._engine.call("connect", addresses=self._addresses)
        self._table = _together(self._ranks, "gather")[0]["table"]
        self._engine.call("know", table=self._table)
        self.full()  # from now on the engine serves

    def _child(
        self, module: str, arguments: dict[str, Any], variables: dict[str, str], memory: int
    ) -> Child:
        child = Child(module, arguments, variables, [memory])
        self._open.callback(child.close)
        return child

    def change(self) -> None:
        """At the ranks, other weights: a share of `density` of the elements gets other bits."""
        _together(self._ranks, "change")

    def full(self) -> None:
        """Our way: both ranks publish; the engine pulls everything, verifies and packs."""
        self._kimisys("kimisys full", True)

    def delta(self) -> None:
        """Our way: both ranks publish; the engine pulls what changed, verifies and packs."""
        self._kimisys("kimisys delta", False)

    def load_weights(self) -> None:
        """The usual way: both ranks gather every tensor, rank 0 into shared memory; the engine
        loads from there.

        One after the other: the gather takes 1.6 s of processor time on each of two cores, so there
        is little to win by loading meanwhile.
        """
        began = time.perf_counter()
        gathered = _together(self._ranks, "gather")[0]["seconds"]
        loaded = self._engine.call("load")
        self._note("load_weights", time.perf_counter() - began, gathered | loaded)

    def reload_weights(self) -> None:
        """The other usual way: gathered as before, saved as safetensors on a RAM disk; the engine
        reloads the file."""
        began = time.perf_counter()
        saved = _together(self._ranks, "save", folder=str(self._disk))[0]
        loaded = self._engine.call("load_file", folder=str(self._disk))
        self._note("reload_weights", time.perf_counter() - began, saved | loaded)

    def _kimisys(self, way: str, full: bool) -> None:
        began = time.perf_counter()
        self._version += 1
        published = _together(self._ranks, "publish", version=self._version, full=full)
        updated = self._engine.call("update", version=self._version, full=full)
        whole = time.perf_counter() - began
        publishing = max(rank["seconds"] for rank in published)
        self._note(way, whole, {"publish": publishing, **updated["seconds"]})
        if full:
            if updated["digests"] != len(self.tensors):
                raise AssertionError("the engine did not compare every tensor's digest")
            return
        changed = [rank["changed"] for rank in published]
        if changed != self._prepared:
            raise NotADeltaError(f"{changed} changes were found where {self._prepared} were made")
        if updated["base"] != self._version - 1:
            raise NotADeltaError("the engine did not take the version as a delta of the last one")
        self.figures = {
            "density (%)": 1e2 * updated["changed"] * 2 / self.nbytes,
            "wire bytes of the delta (MB)": updated["wire_nbytes"] / 1e6,
            "wire bytes of a full pull (MB)": updated["full_nbytes"] / 1e6,
            "records at the publishers (MB)": sum(rank["nbytes"] for rank in published) / 1e6,
        }

    def faults(self) -> list[str]:
        """What is wrong with how each way brings the ranks' weights; empty: nothing.

        Two sets of weights are drawn; `full` brings the first, `load_weights` and then `full` the
        second: the log-probabilities must be the trainer's, within a twentieth of how much they
        differ between the sets, and the two ways must make the engine compute the same bits. Then
        a share of the second set is changed, changed back and changed again, and brought by
        `reload_weights`, `load_weights` and `delta`: others than before, the same as before, the
        same as `reload_weights` brought. What was gathered must have the published digests.
        """
        trainer = [self._scrambled(1)]
        self.full()
        engine = [self._probe()]
        trainer.append(self._scrambled(2))
        self.load_weights()
        engine.append(self._probe())
        self.full()
        again = self._probe()
        self._prepared = _together(self._ranks, "prepare", density=self.density, seed=3)
        self.change()
        self.reload_weights()
        changed = self._probe()
        self.change()
        self.load_weights()
        back = self._probe()
        faults = []
        if unequal := self._unequal():
            faults.append(f"gathered and published tensors differ: {unequal[:8]}")
        self.change()
        try:
            self.delta()
        except NotADeltaError as error:
            faults.append(str(error))
        same = {
            "full": (again == engine[1]).all(),
            "load_weights": (back == engine[1]).all(),
            "reload_weights": (changed != engine[1]).any(),
            "delta": (self._probe() == changed).all(),
        }
        gap = max(float(np.abs(a - b).max()) for a, b in zip(trainer, engine, strict=True))
        change = float(np.abs(trainer[0] - trainer[1]).max())
        if not gap < change / 20:
            faults.append(
                f"log-probabilities of engine and trainer differ by {gap}, where those of the two "
                f"sets of weights differ by {change}"
            )
        if wrong := [way for way, right in same.items() if not right]:
            faults.append(f"the engine computes other bits than it should after {wrong}")
        self.seconds.clear()  # runs that warmed up
        return faults

    def close(self) -> None:
        """Ends all processes. Idempotent."""
        self._open.close()

    def _note(self, way: str, whole: float, phases: Mapping[str, float]) -> None:
        self.packing += phases["repack"]
        for phase, seconds in phases.items():
            self.seconds[way][phase].append(seconds)
        # Each phase is that of the slowest rank: together they may be longer than the whole.
        self.seconds[way]["calls and waiting"].append(max(0.0, whole - sum(phases.values())))
        self.seconds[way]["all"].append(whole)

    def _scrambled(self, seed: int) -> np.ndarray:
        """New weights at the ranks; what they compute with them, float32[tokens - 1, vocab]."""
        _together(self._ranks, "scramble", seed=seed)
        tokens = [token % self._vocabulary for token in _PROBE]
        return np.array(_together(self._ranks, "probe", tokens=tokens)[0], np.float32)

    def _probe(self) -> np.ndarray:
        tokens = [token % self._vocabulary for token in _PROBE]
        return np.array(self._engine.call("probe", tokens=tokens), np.float32)

    def _unequal(self) -> list[str]:
        """Tensors of which the last gathered and the last published bits have unequal digests."""
        with connect(self._addresses) as peers:
            deadline = Deadline(_START_SECONDS)
            remotes = [remote for remote, _ in peers.remotes(deadline).values()]
            states = [remote.readable(self._version, deadline) for remote in remotes]
            digests = [r.digests(s, deadline) for r, s in zip(remotes, states, strict=True)]
            published = np.add.reduce(digests, dtype=np.uint64)
            names = [tensor.name for tensor in peers.layout.tensors]
            layout = self._gathered_layout(peers.layout)
        found = digest(layout, {(0, "gathered"): self.gathered})
        return [n for n, a, b in zip(names, published, found, strict=True) if a != b]

    def _gathered_layout(self, published: Layout) -> Layout:
        fragments = []
        for name, offset, shape in self._table:
            strides = [2 * int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
            fragments.append(
                Fragment(name, Region([0] * len(shape), shape), 0, "gathered", offset, strides)
            )
        return Layout(published.tensors, [Buffer(0, "gathered", self.nbytes)], fragments)


def _together(children: Iterable[Child], method: str, **arguments: Any) -> list[Any]:
    """The same call of all children at the same time."""
    children = list(children)
    for child in children:
        child.send(method, **arguments)
    return [child.receive(_START_SECONDS) for child in children]


def _slowest(phases: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Each phase of the rank whose phases take longest together."""
    return dict(max(phases, key=lambda rank: sum(rank.values())))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
