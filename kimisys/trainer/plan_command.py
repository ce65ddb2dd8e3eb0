"""`kimisys plan`: what a weight sync would move, from configurations alone."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from kimisys.adapters.megatron.offline import offline_layout
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.adapters.vllm.offline import engine_layout
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.reshard import Place, SymbolicLayout, route, symbolic_plan
from kimisys.reshard.bound import bound
from kimisys.trainer.metrics import write_json
from kimisys.trainer.plan_config import PlanConfig, model_config
from kimisys.trainer.plan_plot import plot_plan
from kimisys.trainer.plan_report import Nics, PlanReport


def run(config: PlanConfig, console: Console) -> None:
    """Plan, print a table, and write the files of --json and --plot if they were asked for.

    Raises LayoutError for a layout that is illegal or that the model cannot have.
    """
    report = investigate(config, console)
    console.print(report.table())
    if config.json is not None:
        write_json(config.json, report.to_json())
    if config.plot is not None:
        with console.status(f"drawing {config.plot}"):
            plot_plan(config.plot, report)


@dataclass
class Lap:
    """How long a piece of work took."""

    seconds: float = 0.0


@contextmanager
def timed(console: Console, what: str) -> Iterator[Lap]:
    """Shows `what` while the work inside goes on, and takes its time."""
    lap = Lap()
    started = time.perf_counter()
    with console.status(what):
        yield lap
    lap.seconds = time.perf_counter() - started


def investigate(config: PlanConfig, console: Console) -> PlanReport:
    """Trace both sides, plan, route and simulate."""
    train, infer = Parallel.parse(config.train), EngineParallel.parse(config.infer)
    name, model = model_config(config.model)
    with (
        timed(console, f"asking Megatron what {train.world_size:,} ranks hold") as asking_megatron,
        warnings.catch_warnings(),
    ):
        # Megatron's advice to who trains so; nothing is trained here
        warnings.filterwarnings("ignore", message="When using expert parallelism")
        source = offline_layout(model, train, config.dtype)
    with timed(console, f"asking vLLM what {infer.world_size:,} ranks want") as asking_vllm:
        destination = engine_layout(model, source.tensors, infer, config.dtype)
    source, destination = placed(source, destination, config)
    with timed(console, "planning and proving") as planning:
        made = symbolic_plan(source, destination)
    with timed(console, "routing") as routing:
        routed = route(made, nic_bandwidth=config.nic)
    with timed(console, "simulating the sync"):
        simulation = routed.simulate()
    with timed(console, "solving for the lower bound"):
        least = bound(routed)
    nics = routed.nics()
    return PlanReport(
        model=name,
        train=config.train,
        infer=config.infer,
        source_ranks=train.world_size,
        destination_ranks=infer.world_size,
        tensors=destination.tensor_count,
        trace_train=asking_megatron.seconds,
        trace_infer=asking_vllm.seconds,
        planning=planning.seconds,
        groups=made.groups,
        copies=made.proof.copies,
        nbytes=made.proof.copied_bytes,
        padding=made.proof.padding_bytes,
        fingerprint=made.fingerprint,
        pairs=made.traffic(),
        nics=Nics(nics["node"], nics["nic"], nics["egress_bytes"], nics["ingress_bytes"]),
        nic_bandwidth=config.nic,
        local=routed.local_bytes,
        remote=routed.remote_bytes,
        relayed=routed.relayed_bytes,
        routing=routing.seconds,
        simulated=simulation.seconds,
        bound=least.seconds,
        messages=simulation.message_count,
        peak_staging=int(simulation.staging_bytes.max(initial=0)),
    )


def placed(
    source: SymbolicLayout, destination: SymbolicLayout, config: PlanConfig
) -> tuple[SymbolicLayout, SymbolicLayout]:
    """Both sides on nodes: the destination's after the source's, or the same if colocated."""
    # not how many there are: a rank that holds nothing has its seat too
    last = max(source.ranks, default=-1) // config.ranks_per_node
    first = 0 if config.colocated else last + 1
    return (
        SymbolicLayout(source.blocks, _places(source, 0, config.ranks_per_node)),
        SymbolicLayout(destination.blocks, _places(destination, first, config.ranks_per_node)),
    )


def _places(side: SymbolicLayout, first_node: int, ranks_per_node: int) -> list[Place]:
    places = []
    for rank in side.ranks:
        node, device = divmod(rank, ranks_per_node)
        places.append(Place(rank, first_node + node, device, nic=device))
    return places
