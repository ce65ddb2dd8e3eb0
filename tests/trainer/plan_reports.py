"""A report of `kimisys plan`, made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from kimisys.trainer.plan_report import Nics, PlanReport

GB = 10**9

REPORT = PlanReport(
    model="made-up",
    train="tp=4",
    infer="tp=2,replicas=1",
    source_ranks=4,
    destination_ranks=2,
    tensors=3,
    trace_train=0.5,
    trace_infer=0.25,
    planning=0.01,
    groups=1,
    copies=5,
    nbytes=12 * GB,
    padding=0,
    fingerprint="ab" * 16,
    pairs={
        "source_rank": np.array([0, 1, 3]),
        "destination_rank": np.array([0, 0, 1]),
        "bytes": np.array([2 * GB, 4 * GB, 6 * GB]),
        "copies": np.array([1, 2, 2]),
    },
    nics=Nics(
        node=np.array([0, 0, 0, 0, 1, 1]),
        nic=np.array([0, 1, 2, 3, 0, 1]),
        sent=np.array([2 * GB, 4 * GB, 0, 6 * GB, 0, 0]),
        received=np.array([0, 0, 0, 0, 6 * GB, 6 * GB]),
    ),
    nic_bandwidth=50e9,
    local=0,
    remote=12 * GB,
    relayed=0,
    routing=0.02,
    simulated=0.15,
    bound=0.12,
    messages=400,
    peak_staging=64 << 20,
)


def report(**other: Any) -> PlanReport:
    """The report, other in some figures."""
    return replace(REPORT, **other)
