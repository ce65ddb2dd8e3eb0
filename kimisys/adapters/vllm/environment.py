"""The environment that an engine's process is best started with, and why."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress


def environment(threads: int = 2) -> dict[str, str]:
    """Variables for the process that will hold an Engine, best set before it starts.

    OpenMP and malloc read theirs once, when they are loaded; ``Engine.start`` sets the others too.

    threads: OpenMP threads of the engine. Measured numbers are in docs/log.md.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        # Threads that spin for each other collapse when cores are shared: beside other work two of
        # them made 700 to 1,400 tokens/s with the default, 6,000 to 10,000 with a short spin, and
        # alone 12,000 with either.
        "GOMP_SPINCOUNT": "10000",
        # Activations of a step are a few MB each; without this every one is mapped, faulted in and
        # unmapped again (15 % of a rollout's time).
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
        "MALLOC_TOP_PAD_": str(1 << 28),
        # The engine's thread would get an arena of its own, whose blocks end at 64 MB: every update
        # would map and fault in the packed head anew (of a Qwen3-0.6B: 311 MB, 76,000 faults, which
        # cost 70 to 400 ms where all of packing takes 400).
        "MALLOC_ARENA_MAX": "1",
        # Huge pages where the machine leaves them to madvise, as most do.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        **VARIABLES,
    }


VARIABLES = {
    # Scheduler and worker in this process: one import of vLLM instead of three, no IPC per step.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # vLLM compiles one comparison of the sampler with inductor: 18 to 24 s in the first generate,
    # for nothing that a rollout uses.
    "TORCHDYNAMO_DISABLE": "1",
    # An engine is on one machine: its sockets stay on the loopback interface.
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""What vLLM and torch read when they are imported or later."""


def apply(tensor_parallel: int) -> None:
    """Sets VARIABLES in this process where they are not set, before vLLM is imported."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    if tensor_parallel > 1:
        # The CPU build wants one NUMA node per rank, or to be told whose cores are whose.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _binding(tensor_parallel))


def pin(cpus: Collection[int]) -> None:
    """Lets this process' threads, present and future, and its future children run on `cpus` alone.

    Of no effect when there are none. The CPUs must be among those that the caller may use.
    """
    if not cpus:
        return
    os.sched_setaffinity(0, cpus)  # inherited by the threads that this one starts
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended since
            os.sched_setaffinity(int(thread), cpus)


def _binding(ranks: int) -> str:
    """The cores that this process may use, in equal parts: "0,1|2,3". Too few are shared."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    parts = [cores[(r * share) % len(cores) :][:share] for r in range(ranks)]
    return "|".join(",".join(map(str, part)) for part in parts)
