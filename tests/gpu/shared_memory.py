"""A snapshot in shared memory that the GPU reads and writes where it lies: page-locked and mapped,
as a publisher with its live weights on a GPU would have it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MAPPED = 2  # cudaHostRegisterMapped


@contextmanager
def registered(nbytes: int) -> Iterator[torch.Tensor]:
    """uint8[nbytes] of a memfd, zero, registered with the driver until the end."""
    descriptor = os.memfd_create("snapshot")
    try:
        os.ftruncate(descriptor, nbytes)
        memory = mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    code = runtime.cudaHostRegister(tensor.data_ptr(), nbytes, _MAPPED)
    assert int(code) == 0, f"cudaHostRegister: error {code}"
    try:
        yield tensor
    finally:
        torch.cuda.synchronize()
        runtime.cudaHostUnregister(tensor.data_ptr())
