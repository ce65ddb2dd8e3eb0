"""Kimi-K2 as a whole: from Megatron's ranks to vLLM's, planned and proven in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from bench.harness import Case
from bench.kimi_k2 import places
from kimisys.adapters.megatron.offline import offline_layout
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.adapters.vllm.offline import engine_layout
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.reshard import SymbolicLayout, route, symbolic_plan
from kimisys.reshard.bound import bound
from kimisys.trainer.plan_config import model_config

T = TypeVar("T")


@dataclass
class World:
    """Two traced sides, on nodes of their own, in files; and what was measured of them."""

    folder: Path
    source: SymbolicLayout
    destination: SymbolicLayout
    traced: dict[str, float]
    said: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """What all plans took together: a clock that the children's start does not move."""
        return sum(said["plan_seconds"] for said in self.said)

    def plan(self) -> None:
        """Plan and prove in a child."""
        command = [sys.executable, "-m", "bench.planning.child"]
        files = [str(self.folder / name) for name in ("source", "destination")]
        done = subprocess.run(
            [*command, *files], check=True, capture_output=True, text=True, timeout=600
        )
        self.said.append(json.loads(done.stdout))

    def right(self) -> bool:
        """Whether the plan writes all of the engines' memory, and its slices are its parts."""
        said = self.said[-1]
        return bool(said["whole"] and said["slices_agree"])

    def planning(self) -> dict[str, float]:
        """What tracing and planning needed beside the time of planning."""
        said = self.said
        return {
            **self.traced,
            "load layouts, s": median(one["load_seconds"] for one in said),
            "peak RSS of the child, MiB": max(one["peak_bytes"] for one in said) / 2**20,
            "copies": float(said[-1]["copies"]),
            "written, GB": said[-1]["bytes"] / 1e9,
        }

    def routing(self) -> dict[str, float]:
        """`planning`, and what the routed plan takes in the time model."""
        made = symbolic_plan(self.source, self.destination)
        routed, seconds = timed(lambda: route(made))
        direct = route(made, relay=False)
        least = bound(routed).seconds
        simulated = routed.simulate().seconds
        return {
            **self.planning(),
            "route, s": seconds,
            "simulated sync, s": simulated,
            "lower bound, s": least,
            "simulated / bound": simulated / least,
            "all from the source, planned order, s": direct.simulate().seconds,
            "all from the source, natural order, s": direct.simulate("natural").seconds,
        }


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    made = call()
    return made, time.perf_counter() - start


def world(folder: Path, model: str, train: str, infer: str) -> World:
    """Trace a model's two sides; a trace that is kept from before takes no time."""
    _, config = model_config(model)
    parallel, engine = Parallel.parse(train), EngineParallel.parse(infer)
    source, of_megatron = timed(lambda: offline_layout(config, parallel))
    destination, of_vllm = timed(lambda: engine_layout(config, source.tensors, engine, "bfloat16"))
    on_nodes = places(parallel.world_size, 0)
    source = SymbolicLayout(source.blocks, on_nodes)
    next_node = on_nodes[-1].node + 1
    destination = SymbolicLayout(destination.blocks, places(engine.world_size, next_node))
    folder.mkdir()
    (folder / "source").write_bytes(source.to_bytes())
    (folder / "destination").write_bytes(destination.to_bytes())
    traced = {"trace Megatron, s": of_megatron, "trace vLLM, s": of_vllm}
    return World(folder, source, destination, traced)


def whole(folder: Path, model: str, train: str, infer: str, routed: bool = True) -> Case:
    """Plan and proof of a whole model; no peer could plan it. routed: simulate its sync too."""
    here = world(folder, model, train, infer)
    return Case(
        f"{model}, {train} ({len(here.source.ranks)} ranks) → {infer} "
        f"({len(here.destination.ranks)}): plan + proof",
        here.plan,
        {},
        here.right,
        clock=lambda: here.seconds,
        figures=here.routing if routed else here.planning,
    )
