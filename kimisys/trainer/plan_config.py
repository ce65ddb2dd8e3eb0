"""The options of `kimisys plan`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from kimisys.trainer.config import MANY, ConfigError, check_ranges


@dataclass(frozen=True)
class PlanConfig:
    """Plan a weight sync from configurations alone: no weights, no GPU, no processes."""

    model: str
    """A Hugging Face folder or config.json, or one of the shipped names: kimi-k2, deepseek-v3,
    qwen3-235b-a22b, qwen3-0.6b."""
    train: str
    """Megatron's layout: tp, pp, vpp, ep, etp, cp, dp, world, layout; first and last are the layers
    of the first and the last stage. For example tp=8,pp=8,ep=32,etp=1,first=7,last=6"""
    infer: str
    """vLLM's layout: tp, pp, dp, replicas (independent engines), ep=on (whole experts, spread over
    tp x dp ranks) or ep=off (every expert cut). For example tp=16,dp=8,ep=on,replicas=1"""
    nic: Annotated[float, tyro.conf.arg(metavar="BYTES/S")] = 50e9
    """What one NIC carries each way; 50e9 is 400 Gb/s."""
    ranks_per_node: int = 8
    """Ranks on a node, each with a device and a NIC of its own."""
    colocated: bool = False
    """Training and inference share their nodes and devices, rank by rank; otherwise inference has
    nodes of its own."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights on both sides."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Draw who sends what to whom, and what each NIC carries."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write everything that is printed, and the bytes of each pair of ranks and each NIC."""

    def check(self) -> None:
        """Raise ConfigError for options that cannot be, whatever the model."""
        check_ranges(
            [("--nic", self.nic, 1, 1e15), ("--ranks-per-node", self.ranks_per_node, 1, MANY)]
        )
        for option, file in (("--plot", self.plot), ("--json", self.json)):
            if file is not None and not file.absolute().parent.is_dir():
                raise ConfigError(f"{option}: there is no folder {file.absolute().parent}")
            if file is not None and file.is_dir():
                raise ConfigError(f"{option}: {file} is a folder; name a file")
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise ConfigError(f"--plot: {self.plot} is drawn as PNG; name it *.png")


def shipped() -> dict[str, Traversable]:
    """The configurations that come with the package, by name."""
    folder = files("kimisys") / "configurations"
    names = (file for file in folder.iterdir() if file.name.endswith(".json"))
    return {file.name.removesuffix(".json"): file for file in sorted(names, key=lambda f: f.name)}


def model_config(model: str) -> tuple[str, Mapping[str, Any]]:
    """What to call a model, and its config.json: of a shipped name, a file, or a folder. Raises
    ConfigError, naming the shipped ones, if there is no such thing."""
    known = shipped()
    if model in known:
        return model, json.loads(known[model].read_text())
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    name = file.parent.name if file.name == "config.json" else file.stem
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"--model: there is no {file}, and no shipped configuration of that name; shipped are "
            f"{', '.join(known)}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model: {file} is not a config.json: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--model: {file} is not a config.json: it holds no object")
    return name or file.absolute().parent.name, config
