"""Process groups: a Megatron rank joins its peers, or pretends to.

`initialize` joins real ranks over gloo, on the loopback interface unless told otherwise. `offline`
gives one process the view of any rank of any world (torch's fake process group), to ask for layouts
without starting anything.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kimisys.adapters.megatron import cpu
from kimisys.adapters.megatron.core import parallel_state
from kimisys.adapters.megatron.families import check_model, family_of
from kimisys.adapters.megatron.parallel import Parallel, of_world
from kimisys.errors import LayoutError


def initialize(
    tensor_parallel: int,
    pipeline_parallel: int,
    rank: int,
    world_size: int,
    address: str,
    port: int,
    seed: int,
    timeout_seconds: float = 60.0,
    hf_config: Mapping[str, Any] | None = None,
) -> None:
    """`join` with shards and stages alone: tensor-parallel groups of `tensor_parallel` neighbours;
    the pipeline's stages take the ranks in order, so stage 0 has the first ones."""
    parallel = of_world(tensor_parallel, pipeline_parallel, world_size)
    join(parallel, rank, address, port, seed, timeout_seconds, hf_config)


def join(
    parallel: Parallel,
    rank: int,
    address: str,
    port: int,
    seed: int,
    timeout_seconds: float = 60.0,
    hf_config: Mapping[str, Any] | None = None,
) -> None:
    """Join the other ranks and form Megatron's groups.

    Rank 0 listens at `address`:`port` (an IP address; loopback keeps every socket on the loopback
    interface). `seed`, equal on all ranks, seeds torch's generator: alike for the ranks of one
    stage, because each cuts its shards out of the same initial weights; 100 further for each stage,
    as Megatron has it, or all stages would begin with the same layers. `timeout_seconds` bounds the
    meeting here and every later collective. Raises LayoutError for an impossible layout (with
    `hf_config`, also of the model) before anything starts; TimeoutError, naming the ranks that did
    not come.
    """
    world_size = parallel.world_size
    if hf_config is not None:
        check_model(family_of(hf_config), parallel)
    _check_rank(rank, world_size)
    if ipaddress.ip_address(address).is_loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"

    timeout = timedelta(seconds=timeout_seconds)
    store = _meet(rank, world_size, address, port, timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    _form_groups(parallel, timeout)
    torch.manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())


def shutdown() -> None:
    """Leave the process groups; does nothing where there are none."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def offline(
    tensor_parallel: int, pipeline_parallel: int, rank: int, world_size: int
) -> Iterator[None]:
    """`as_rank` with shards and stages alone."""
    with as_rank(of_world(tensor_parallel, pipeline_parallel, world_size), rank):
        yield


@contextmanager
def as_rank(parallel: Parallel, rank: int) -> Iterator[None]:
    """Be `rank` of `parallel` inside the block, alone: collectives do nothing, but groups have
    their sizes.

    For building models on the meta device and asking them for their layout: afterwards the process
    is as it was, CUDA included. Raises LayoutError for an impossible layout, RuntimeError where
    process groups exist already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _check_rank(rank, parallel.world_size)
    hook = sys.excepthook  # torch wraps it at each start: errors would name every rank we were
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
    try:
        with cpu.applied():
            _form_groups(parallel, timedelta(seconds=60))
            yield
    finally:
        shutdown()
        sys.excepthook = hook


def _check_rank(rank: int, world_size: int) -> None:
    if dist.is_initialized():
        raise RuntimeError("this process has process groups already: call runtime.shutdown() first")
    if not 0 <= rank < world_size:
        raise LayoutError(f"rank {rank} is not one of the {world_size} ranks 0..{world_size - 1}")


def _form_groups(parallel: Parallel, timeout: timedelta) -> None:
    cpu.apply()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
        create_gloo_process_groups=False,  # beside NCCL ones; ours are gloo already
    )


def _meet(rank: int, world_size: int, address: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """The store of rank 0, once every rank has checked in there."""
    deadline = time.monotonic() + timeout.total_seconds()
    waited = f"rank {rank} of {world_size} waited {timeout.total_seconds():g} s"
    listener = _listen(address, port) if rank == 0 else None
    try:
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0,
            timeout=timeout,
            wait_for_workers=False,
            # left to itself the store listens on all interfaces
            master_listen_fd=listener.detach() if listener else None,
        )
    except dist.DistError as error:
        raise TimeoutError(
            f"{waited} for rank 0 at {address}:{port}: see whether that process started"
        ) from error
    store.set(f"kimisys/arrived/{rank}", "1")
    for peer in range(world_size):
        left = timedelta(seconds=max(deadline - time.monotonic(), 0.001))
        try:
            store.wait([f"kimisys/arrived/{peer}"], left)
        except dist.DistError as error:
            raise TimeoutError(
                f"{waited} for rank {peer}, which did not come to {address}:{port}: "
                "see whether that process started"
            ) from error
    return store


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno,
            f"rank 0 cannot listen at {address}:{port}: {error.strerror}; choose another port",
        ) from error
    return listener
