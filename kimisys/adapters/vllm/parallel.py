"""How an engine, or several of one kind, is split over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kimisys.errors import LayoutError

_SIZES = {"tp": "tensor", "pp": "pipeline", "dp": "data", "replicas": "replicas"}
_SWITCH = {"on": True, "off": False}


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands: its replica, and its indices within that replica."""

    replica: int
    data: int
    pipeline: int
    tensor: int


@dataclass(frozen=True)
class EngineParallel:
    """Sizes of vLLM's kinds of parallelism; all default to one.

    tensor, pipeline: as vLLM's `--tensor-parallel-size` and `--pipeline-parallel-size`.
    data: ranks of one engine that share experts: vLLM's `--data-parallel-size`. Attention is
    replicated over them, experts are split over tensor x data ranks.
    expert: `--enable-expert-parallel`: whole experts on each rank, instead of a slice of each.
    replicas: independent engines, each with all weights.

    Ranks count as vLLM's do: ((replica * data + d) * pipeline + p) * tensor + t.
    Raises LayoutError for sizes that are not positive integers.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: bool = False
    replicas: int = 1

    def __post_init__(self) -> None:
        for key, name in _SIZES.items():
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise LayoutError(f"{key}={size!r} is not a size; give an integer of at least 1")
        if not isinstance(self.expert, bool):
            raise LayoutError(f"ep={self.expert!r} is neither on nor off; give ep=on or ep=off")

    @property
    def engine_size(self) -> int:
        """Ranks of one replica."""
        return self.tensor * self.pipeline * self.data

    @property
    def world_size(self) -> int:
        """Ranks of all replicas."""
        return self.engine_size * self.replicas

    @property
    def engine(self) -> EngineParallel:
        """One replica alone."""
        return replace(self, replicas=1)

    def place(self, rank: int) -> Coordinates:
        """Where a rank stands. Raises LayoutError for a rank that does not exist."""
        if not 0 <= rank < self.world_size:
            raise LayoutError(
                f"rank {rank} of {self} does not exist; ranks are 0 to {self.world_size - 1}"
            )
        rest, tensor = divmod(rank, self.tensor)
        rest, pipeline = divmod(rest, self.pipeline)
        replica, data = divmod(rest, self.data)
        return Coordinates(replica, data, pipeline, tensor)

    @staticmethod
    def parse(text: str) -> EngineParallel:
        """From "tp=16,dp=8,ep=on,replicas=1,pp=1", in any order; what is not given is one, or off.

        Raises LayoutError saying what would be legal.
        """
        legal = f"{', '.join(f'{key}=SIZE' for key in _SIZES)} and ep=on or ep=off"
        given: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = (each.strip() for each in part.partition("="))
            if not equals or key not in (*_SIZES, "ep"):
                raise LayoutError(f"{part!r} in {text!r} is not known; legal are {legal}")
            name = _SIZES.get(key, "expert")
            if name in given:
                raise LayoutError(f"{key!r} is given twice in {text!r}; give it once")
            given[name] = _switch(value) if key == "ep" else _size(key, value)
        return EngineParallel(**given)

    @staticmethod
    def of_config(parallel: Any) -> EngineParallel:
        """That of a running vLLM: from its `ParallelConfig`."""
        return EngineParallel(
            tensor=parallel.tensor_parallel_size,
            pipeline=parallel.pipeline_parallel_size,
            data=parallel.data_parallel_size,
            expert=parallel.enable_expert_parallel,
        )

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises LayoutError where vLLM could not split a model so, saying what would be legal.

        config: the text model's config.json. vLLM itself refuses what this does not see, later.
        """
        layers = config.get("num_hidden_layers")
        if layers is not None and self.pipeline > layers:
            raise LayoutError(
                f"pp={self.pipeline} stages for {layers} layers: each stage needs one; "
                f"legal are pp=1 to pp={layers}"
            )
        heads = config.get("num_attention_heads")
        if heads is not None and heads % self.tensor:
            legal = [str(size) for size in range(1, heads + 1) if heads % size == 0]
            raise LayoutError(
                f"tp={self.tensor} does not divide the {heads} attention heads; "
                f"legal are tp={', '.join(legal)}"
            )

    def __str__(self) -> str:
        return (
            f"tp={self.tensor},pp={self.pipeline},dp={self.data},"
            f"ep={'on' if self.expert else 'off'},replicas={self.replicas}"
        )


def _size(key: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise LayoutError(f"{key}={value!r} is not a size; give an integer of at least 1")
    return int(value)


def _switch(value: str) -> bool:
    if value not in _SWITCH:
        raise LayoutError(f"ep={value!r} is neither on nor off; give ep=on or ep=off")
    return _SWITCH[value]
