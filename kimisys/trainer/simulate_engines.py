"""Engine models to simulate with: derived from a device and a model, or read from a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimisys.trainer.config import ConfigError
from kimisys.trainer.metrics import read_object

FIELDS = (
    "step", "sequence", "kv_token", "prefill_token", "kv_capacity", "max_sequences", "update",
)  # fmt: skip


@dataclass(frozen=True)
class Roofline:
    """A decoder on devices, as its data sheets have them. Bytes are those of bfloat16.

    A decode step reads the weights once and every KV entry once; arithmetic adds 2 operations a
    parameter and token. bandwidth_share, compute_share: what is reached of the peaks; launch:
    seconds of a step in which nothing is read.
    """

    parameters: float
    layers: int
    kv_heads: int
    head_dim: int
    devices: int = 1
    bandwidth: float = 3.35e12  # bytes/s: H100 SXM
    flops: float = 989e12  # bfloat16, dense
    memory: float = 80e9
    bandwidth_share: float = 0.8
    compute_share: float = 0.6
    launch: float = 1e-3
    max_sequences: int = 256

    @property
    def kv_bytes(self) -> int:
        """Of one token: keys and values, all layers."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def fields(self) -> dict[str, Any]:
        """Of an EngineModel; seconds and tokens."""
        reads = self.bandwidth * self.bandwidth_share * self.devices
        computes = self.flops * self.compute_share * self.devices
        weights = 2 * self.parameters
        return {
            "step": self.launch + weights / reads,
            "sequence": 2 * self.parameters / computes,
            "kv_token": self.kv_bytes / reads,
            "prefill_token": 2 * self.parameters / computes,
            "kv_capacity": int((0.9 * self.memory * self.devices - weights) / self.kv_bytes),
            "max_sequences": self.max_sequences,
            "update": 1.0,
        }


SHIPPED = {
    "h100-7b": Roofline(7.6e9, layers=28, kv_heads=4, head_dim=128),
    "2xh100-32b": Roofline(32.8e9, layers=64, kv_heads=8, head_dim=128, devices=2),
}


def engine_fields(name: str) -> dict[str, Any]:
    """Of a shipped model, or of the JSON file that `kimisys simulate --calibrate RUN --json FILE`
    wrote. Raises ConfigError."""
    if name in SHIPPED:
        return SHIPPED[name].fields()
    if not Path(name).is_file():
        raise ConfigError(
            f"--engine: there is no file {name}, and no shipped engine of that name; shipped are "
            f"{', '.join(SHIPPED)}"
        )
    record = read_object(Path(name)).get("engine")
    if not isinstance(record, dict) or set(record) != set(FIELDS):
        raise ConfigError(
            f"--engine: {name} holds no engine ({', '.join(FIELDS)}); kimisys simulate --calibrate "
            "RUN --json FILE writes one"
        )
    for field, value in record.items():
        whole = field in {"kv_capacity", "max_sequences"}
        kinds: tuple[type, ...] = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ConfigError(
                f"--engine: {field} of {name} is {value!r}; it must be "
                f"{'a whole number' if whole else 'a number of seconds'}"
            )
    return record
