"""Plans two layouts that lie in files, in a process of its own: its memory is that of planning.

`python -m bench.planning.child SOURCE DESTINATION` prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from kimisys.reshard import SymbolicLayout, SymbolicPlan, prove, symbolic_plan


def peak_bytes() -> int:
    """The most resident memory this program had. Not getrusage's: that counts what the parent held
    before the program was started."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel tells no VmHWM")


def slices_agree(plan: SymbolicPlan) -> bool:
    """Whether three ranks' slices, proven anew, write what the whole plan says."""
    traffic = plan.traffic()
    ranks = plan.destination.ranks
    for rank in {ranks[0], ranks[len(ranks) // 2], ranks[-1]}:
        proof = prove(plan.of_rank(rank))
        here = traffic["destination_rank"] == rank
        if proof.copied_bytes != traffic["bytes"][here].sum():
            return False
        if proof.copies != traffic["copies"][here].sum():
            return False
    return True


def main(source_file: str, destination_file: str) -> None:
    """Load, plan, and say how long it took and how much memory."""
    started = time.perf_counter()
    source, destination = (
        SymbolicLayout.from_bytes(Path(file).read_bytes())
        for file in (source_file, destination_file)
    )
    loaded = time.perf_counter()
    plan = symbolic_plan(source, destination)
    planned = time.perf_counter()
    peak = peak_bytes()
    print(
        json.dumps(
            {
                "load_seconds": loaded - started,
                "plan_seconds": planned - loaded,
                "peak_bytes": peak,
                "copies": plan.proof.copies,
                "bytes": plan.proof.copied_bytes,
                "whole": plan.proof.destination_bytes == destination.nbytes,
                "slices_agree": slices_agree(plan),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
