"""Checks of the tensors that are given for the buffers of a layout, and their memory."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kimisys.errors import BufferMismatchError, LayoutError
from kimisys.reshard import Buffer

Tensors: TypeAlias = Mapping[tuple[int, str], torch.Tensor]
"""(rank, buffer name) to a contiguous tensor of any dtype."""

_REMEDY = "install triton, and unset TRITON_INTERPRET"


def with_triton(on_cpu: Sequence[str], device: torch.device | str) -> list[str]:
    """The implementations of a kernel on this device: "triton" on a GPU, ``on_cpu`` on the CPU.
    Where Triton's interpreter is on (``TRITON_INTERPRET=1`` when Triton is imported), "triton" is
    for the CPU instead."""
    has_triton = importlib.util.find_spec("triton") is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if torch.device(device).type == "cuda":
        # the interpreter runs on the host, where the tables' addresses would not be memory
        return ["triton"] if has_triton and not interpreted else []
    return [*on_cpu, "triton"] if has_triton and interpreted else list(on_cpu)


def chosen(
    what: str, asked: str | None, variable: str, known: Sequence[str], device: torch.device
) -> str:
    """The implementation asked for, by argument or else by the environment variable, or the first.

    Raises:
        LayoutError: the device has no such implementation, or none at all.
    """
    name = asked or os.environ.get(variable) or (known[0] if known else "triton")
    if name not in known:
        raise LayoutError(
            f"unknown {what} implementation '{name}' (argument or {variable}) on {device}: "
            f"there {'is ' + ', '.join(known) if known else 'is none: ' + _REMEDY}"
        )
    return name


def one_device(**sides: Tensors) -> torch.device:
    """The one device of all tensors; the CPU where there are none. sides: by what they are called.

    Raises:
        BufferMismatchError: they are on two devices, or on one that is no CPU or CUDA device.
    """
    first: tuple[str, tuple[int, str], torch.device] | None = None
    for side, tensors in sides.items():
        for key, tensor in tensors.items():
            if first is None:
                first = (side, key, tensor.device)
            elif tensor.device != first[2]:
                raise BufferMismatchError(
                    f"{side} buffer '{key[1]}' of rank {key[0]} is on {tensor.device}, and "
                    f"{first[0]} buffer '{first[1][1]}' of rank {first[1][0]} on {first[2]}; bring "
                    "all tensors to one device"
                )
    if first is not None and first[2].type not in ("cpu", "cuda"):
        raise BufferMismatchError(f"tensors on {first[2]}: only CPU and CUDA devices are supported")
    return torch.device("cpu") if first is None else first[2]


def check_contiguous(tensors: Tensors, side: str) -> None:
    """Raises BufferMismatchError for a tensor that is not."""
    for (rank, name), tensor in tensors.items():
        if not tensor.is_contiguous():
            raise BufferMismatchError(
                f"{side} buffer '{name}' of rank {rank} is a tensor of shape {tuple(tensor.shape)} "
                f"with strides {tensor.stride()}; pass a contiguous one (a fragment of the layout "
                "may have strides instead)"
            )


def needed(buffers: Iterable[Buffer], tensors: Tensors, side: str) -> Tensors:
    """The tensors of these buffers.

    Raises:
        BufferMismatchError: one is missing, not contiguous, or not of the buffer's size.
    """
    found = {}
    for buffer in buffers:
        key = buffer.rank, buffer.name
        text = f"{side} buffer '{buffer.name}' of rank {buffer.rank}"
        if key not in tensors:
            raise BufferMismatchError(f"{text} is missing; pass it under {key}")
        if tensors[key].nbytes != buffer.nbytes:
            raise BufferMismatchError(
                f"{text} has {tensors[key].nbytes} bytes where the layout says {buffer.nbytes}; "
                "pass the buffer that the layout describes"
            )
        found[key] = tensors[key]
    check_contiguous(found, side)
    return found


def check_apart(written: Tensors, read: Tensors, what: str) -> None:
    """Raises BufferMismatchError where two tensors that are written, or one of each kind, share
    memory. what: both of them, for the message."""
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes, key, True) for key, t in written.items()]
    spans += [(t.data_ptr(), t.data_ptr() + t.nbytes, key, False) for key, t in read.items()]
    ends: dict[bool, tuple[int, tuple[int, str]]] = {}
    for begin, until, key, writes in sorted(spans):
        for other, (end, before) in ends.items():
            if begin < end and begin < until and (writes or other):
                raise BufferMismatchError(
                    f"{what}: buffer '{key[1]}' of rank {key[0]} overlaps buffer '{before[1]}' of "
                    f"rank {before[0]}; give each memory of its own"
                )
        ends[writes] = max(ends.get(writes, (0, key)), (until, key))


def arrays(tensors: Tensors) -> dict[tuple[int, str], npt.NDArray[np.uint8]]:
    """The bytes of tensors on the CPU."""
    return {
        key: tensor.detach().reshape(-1).view(torch.uint8).numpy()
        for key, tensor in tensors.items()
    }


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Where Triton is to launch: on the current device, wherever its tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
