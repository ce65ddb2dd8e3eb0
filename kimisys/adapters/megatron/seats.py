"""Where each rank sits: its numbers in its tensor-parallel, expert and pipeline groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.core import parallel_state
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.errors import LayoutError

_GROUPS = {
    "tensor": "TENSOR_MODEL_PARALLEL_GROUP",
    "expert": "EXPERT_MODEL_PARALLEL_GROUP",
    "expert_tensor": "EXPERT_TENSOR_PARALLEL_GROUP",
    "stage": "PIPELINE_MODEL_PARALLEL_GROUP",
}
"""What Megatron calls the groups that decide which weights a rank holds."""


@dataclass(frozen=True)
class Seat:
    """A rank's number in each of those groups."""

    tensor: int
    expert: int
    expert_tensor: int
    stage: int

    @property
    def share(self) -> tuple[int, int, int]:
        """What decides which share of a layer the rank holds, whatever its stage."""
        return self.tensor, self.expert, self.expert_tensor


def seats(parallel: Parallel) -> list[Seat]:
    """The seat of each rank, as Megatron's `initialize_model_parallel` hands them out.

    Any rank forms all groups, also those that it is not in, so one rank can tell of all. Raises as
    `runtime.as_rank`.
    """
    found: dict[str, dict[int, int]] = {}
    with _overhear(found), runtime.as_rank(parallel, 0):
        pass
    numbers = {name: found.get(group, {}) for name, group in _GROUPS.items()}
    for name, own in numbers.items():
        if set(own) != set(range(parallel.world_size)):
            raise LayoutError(
                f"Megatron formed no {_GROUPS[name]} for some of the {parallel.world_size} ranks: "
                "this version of megatron-core is not supported"
            )
    return [
        Seat(**{name: own[rank] for name, own in numbers.items()})
        for rank in range(parallel.world_size)
    ]


@contextmanager
def _overhear(found: dict[str, dict[int, int]]) -> Iterator[None]:
    """Inside, note every group that Megatron forms: {its kind: {rank: number in its group}}."""
    create = parallel_state.create_group

    def noted(ranks: Sequence[int], *arguments: Any, group_desc: str, **options: Any) -> Any:
        numbers = found.setdefault(group_desc, {})
        numbers.update((rank, number) for number, rank in enumerate(sorted(ranks)))
        return create(ranks, *arguments, group_desc=group_desc, **options)

    parallel_state.create_group = noted
    try:
        yield
    finally:
        parallel_state.create_group = create
