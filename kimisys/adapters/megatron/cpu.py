"""The one place where megatron-core's CUDA calls are answered on a machine without CUDA.

megatron-core 0.16.1 runs forward and backward on gloo once its habits are answered: it asks CUDA
for the device of new buffers, keeps CUDA generator states for dropout, and warns unless a CUDA
variable is set. Its pipeline schedules make a counter on `device="cuda"` and wait for the device;
a tied embedding is moved to it. A token dispatcher copies its counts on a CUDA stream, the router
asks for a Transformer Engine kernel by name, and latent attention for its linear layer. Its default
causal mask is the last, also `device="cuda"`; layers.py needs no mask.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kimisys.adapters.megatron.core import (
    moe_utils,
    multi_latent_attention,
    random_states,
    schedules,
    token_dispatcher,
)
from kimisys.adapters.megatron.layers import DuplicatedLinear


class NoRandomStates:
    """Stands in for megatron-core's CudaRNGStatesTracker. We train without dropout and
    initialise from the CPU generator, so there is no state to track: a fork changes nothing."""

    def is_initialized(self) -> bool:
        return True

    def reset(self) -> None:
        """Nothing is tracked."""

    def add(self, name: str, seed: int) -> None:
        """Nothing is tracked."""

    def get_states(self) -> dict[str, torch.Tensor]:
        return {}

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Nothing is tracked."""

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        yield


class SchedulesTorch:
    """`torch` as megatron-core's schedules see it: what they make on `device="cuda"` (a counter of
    tokens) is made on the CPU. A TorchFunctionMode would do, but it taxes every call of the model:
    9 % of a micro-batch of 8 rows, 128 wide."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, **options)


_ABSENT = object()
_SPLITS = ("input_splits", "output_splits", "output_splits_tp")


def _counts_on_host(
    dispatcher: Any, point: str, tokens_per_expert: torch.Tensor | None = None
) -> torch.Tensor | None:
    """What the token dispatcher copies to the host on a stream of its own is there already; how
    many tokens go where it wants as numpy arrays."""
    for name in _SPLITS:
        value = getattr(dispatcher, name, None)
        if isinstance(value, torch.Tensor):
            setattr(dispatcher, name, value.numpy())
    return tokens_per_expert


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _synchronize(device: Any = None) -> None:
    """What runs on the CPU is done when it returns."""


def _stay(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def apply() -> None:
    """Answer megatron-core's CUDA calls with the CPU.

    Idempotent. Must run before a model is built, which is refused where CUDA is available. It
    changes `torch.cuda.current_device`, `torch.cuda.synchronize` and `torch.Tensor.cuda` for the
    whole process: a Megatron rank is a process of its own. `applied` puts all back.
    """
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    torch.cuda.synchronize = _synchronize
    torch.Tensor.cuda = _stay  # type: ignore[assignment,method-assign]
    schedules.torch = SchedulesTorch()
    # without Transformer Engine, this name is asked for and not there
    moe_utils.__dict__.setdefault("te_general_gemm", None)
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = "host"  # anything but None, for which a CUDA stream is made
    dispatcher._maybe_dtoh_and_synchronize = _counts_on_host
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.TELinear = DuplicatedLinear
    if not isinstance(random_states._CUDA_RNG_STATE_TRACKER, NoRandomStates):
        random_states._CUDA_RNG_STATE_TRACKER = NoRandomStates()
        random_states._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    os.environ.setdefault(_CONNECTIONS, "1")


@contextmanager
def applied() -> Iterator[None]:
    """As `apply` inside the block alone: a process that only asks for layouts may use CUDA, and
    Megatron on it, afterwards."""
    owners: list[tuple[Any, tuple[str, ...]]] = [
        (torch.cuda, ("current_device", "synchronize")),
        (torch.Tensor, ("cuda",)),
        (schedules, ("torch",)),
        (moe_utils, ("te_general_gemm",)),
        (
            token_dispatcher.MoEAlltoAllTokenDispatcher,
            ("cuda_dtoh_stream", "_maybe_dtoh_and_synchronize"),
        ),
        (multi_latent_attention, ("TELinear",)),
        (
            random_states,
            ("_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED"),
        ),
    ]
    before = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, ns in owners for name in ns]
    connections = os.environ.get(_CONNECTIONS)
    apply()
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is not _ABSENT:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)
        if connections is None:
            os.environ.pop(_CONNECTIONS, None)
