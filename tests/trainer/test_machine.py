"""The record of the machine."""

from __future__ import annotations

import json

import msgspec
import numpy as np

from kimisys.trainer.machine import MachineRecord, machine_record


def test_the_record_says_what_the_report_shows() -> None:
    record = msgspec.convert(json.loads(json.dumps(machine_record())), MachineRecord)
    assert record["cpu"]
    assert record["cores"] >= 1
    assert record["memory_gib"] > 0.1
    assert record["packages"]["numpy"] == np.__version__
    assert {"torch", "ray", "megatron-core"} <= record["packages"].keys()
