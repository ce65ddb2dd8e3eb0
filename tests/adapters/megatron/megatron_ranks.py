"""Megatron ranks in processes of their own, for tests: started together, ended by a deadline."""

from __future__ import annotations

import ipaddress
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import tiny_config

from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor

TINY = tiny_config("qwen3", head_dim=16, vocab_size=29, max_position_embeddings=64)
"""Two KV heads of 16; 29 rows of vocabulary, which Megatron pads."""


def run_ranks(world: int, work: Callable[..., None], *arguments: Any, deadline: float) -> None:
    """Run `work(rank, world, port, *arguments)` in `world` fresh processes; fail when one fails,
    or is not done after `deadline` seconds. None survives."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    ranks = [
        context.Process(target=_run_rank, args=(work, rank, world, port, *arguments), daemon=True)
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + deadline
    try:
        for number, rank in enumerate(ranks):
            rank.join(max(end - time.monotonic(), 0.0))
            assert rank.exitcode is not None, f"rank {number} was not done after {deadline} s"
            assert rank.exitcode == 0, f"rank {number} ended with exit code {rank.exitcode}"
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _run_rank(work: Callable[..., None], rank: int, world: int, port: int, *arguments: Any) -> None:
    torch.set_num_threads(1)
    work(rank, world, port, *arguments)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening_addresses() -> set[str]:
    """Addresses at which this process listens for TCP connections, from /proc/self/net."""
    descriptors = Path("/proc/self/fd")
    ours = {os.readlink(entry) for entry in descriptors.iterdir() if entry.is_symlink()}
    found = set()
    for table, width in (("tcp", 8), ("tcp6", 32)):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[column] for column in (1, 3, 9))
            if state == "0A" and f"socket:[{inode}]" in ours:
                packed = bytes.fromhex(local[:width])
                words = [packed[at : at + 4][::-1] for at in range(0, len(packed), 4)]
                found.add(str(ipaddress.ip_address(b"".join(words))))
    return found


def memory_layout(arrays: Mapping[str, np.ndarray]) -> Layout:
    """Contiguous tensors in the memory of rank 0, one buffer each, under their own names."""
    tensors = [Tensor(name, str(a.dtype), a.shape) for name, a in arrays.items()]
    buffers = [Buffer(0, name, a.nbytes) for name, a in arrays.items()]
    fragments = [
        Fragment(name, Region([0] * a.ndim, a.shape), 0, name, 0, a.strides)
        for name, a in arrays.items()
    ]
    return Layout(tensors, buffers, fragments)


def memory_buffers(arrays: Mapping[str, np.ndarray]) -> dict[tuple[int, str], np.ndarray]:
    return {(0, name): array for name, array in arrays.items()}
