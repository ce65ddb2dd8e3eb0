"""The weight-transfer backend ``kimisys``: how a vLLM worker takes over a published version.

Weights are pulled into a shadow of the worker's shard and verified there. Only then are they packed
into the model. Whatever refuses an update before that leaves the worker serving what it had.

A worker that was broken while it packed, or still has the random weights it started with
(``load_format="dummy"``), refuses to compute: a forward pass raises EngineError, which ends a stock
vLLM engine. Engines of kimisys refuse sooner, and live.

Limits: engines on the CPU, of tensor and expert parallelism alone. The refusal is a hook of the
model's forward; a CUDA graph of the whole model would be replayed past it. Weights that vLLM itself
loaded from a checkpoint are served until the first update, as version None. With a stock vLLM each
rank commits for itself: one that breaks refuses, the others do not know.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.forward_context import get_forward_context, is_forward_context_available

from kimisys.adapters.vllm import plugin
from kimisys.adapters.vllm.layout import build_model, trace_model, trace_vllm_layout
from kimisys.adapters.vllm.loop import EngineError
from kimisys.adapters.vllm.pack import Packer
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.broadcast import Peers, Pulled, Subscriber, connect
from kimisys.errors import LayoutError, SnapshotError, VersionError
from kimisys.reshard import Layout

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_log = logging.getLogger(__name__)

# vLLM imports this module in every worker, as WorkerReport's, before it looks the backend up.
plugin.register()

Digests = npt.NDArray[np.uint64]


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Where the publishers of all trainer ranks are.

    addresses: their socket paths. timeout_seconds: for connecting to all of them.
    """

    addresses: list[str]
    timeout_seconds: float = 30.0


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Which version to take over.

    version: published, and newer than the one served. timeout_seconds: for each of the two waits
    for the other ranks of this engine.
    """

    version: int
    timeout_seconds: float = 120.0


@dataclass
class Status:
    """What a worker serves, and how its last update went; plain values, as it crosses processes.

    version: committed, None before the first update. broken: why the worker refuses to compute, or
    "".
    seconds, nbytes, digests: of the last update: wall time by phase, bytes of tensor elements
    landed, tensors compared by digest.
    """

    version: int | None = None
    broken: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    nbytes: int = 0
    digests: int = 0


class KimisysWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """One worker's end of kimisys.broadcast. Errors are those of kimisys.errors."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._parallel = EngineParallel.of_config(vllm_config.parallel_config)
        if self._parallel.pipeline > 1 or self._parallel.data > 1:
            raise LayoutError(
                "the kimisys backend updates engines of tensor and expert parallelism; this one is "
                f"{self._parallel}. Give it pp=1 and dp=1, and start further engines for more ranks"
            )
        self._group = get_tp_group()
        self._size, self._rank = self._group.world_size, self._group.rank_in_group
        self._fresh = build_model(vllm_config, self._parallel, self._rank)
        constants = build_model(vllm_config, self._parallel, self._rank, "cpu")
        self._packer = Packer(model, constants.module, vllm_config)
        self._shadow = {
            name: torch.empty_like(meta, device=device)
            for name, meta in self._packer.shapes.items()
        }
        self._peers: Peers | None = None
        self._subscriber: Subscriber | None = None
        self._pulled: Pulled | None = None
        self.status = Status()
        self._random = vllm_config.load_config.load_format == "dummy"
        model.register_forward_pre_hook(self._check_serving)

    def _check_serving(self, *_: Any) -> None:
        """Before each forward pass of the model. Raises EngineError where it must not be served."""
        if self.status.broken:
            raise EngineError(f"{self.status.broken}; restart the engine")
        if not self._random or self.status.version is not None:
            return
        # vLLM's own trial runs at start have no attention to compute.
        if is_forward_context_available() and get_forward_context().attn_metadata is not None:
            raise EngineError(
                "no version is served yet: the engine started with random weights; publish one and "
                "update to it"
            )

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Connects to the publishers and plans the pull; again replaces the former peers."""
        self.shutdown()
        peers = connect(init_info.addresses, init_info.timeout_seconds)
        self._subscriber = Subscriber(peers, self._layout(peers), self._rank)
        self._peers = peers
        if self._subscriber.absent:
            _log.warning("published, but not loaded by vLLM: %s", self._subscriber.absent)

    def _layout(self, peers: Peers) -> Layout:
        """Of all ranks of this engine: replicas and splits are verified over all of them."""
        tensors = peers.layout.tensors
        return Layout.merge(
            [
                trace_model(self._fresh, tensors)
                if rank == self._rank
                else trace_vllm_layout(self.vllm_config, tensors, self._parallel, rank)
                for rank in range(self._size)
            ]
        )

    def start_weight_update(self) -> None:
        """Nothing: the model is not touched before the new weights are verified."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Pulls a version into the shadow and verifies it there. All ranks succeed or all raise.

        Raises VersionError, DigestError, SnapshotError. The model is untouched.
        """
        self._pulled = None
        self._pulled = self._receive(update_info.version, update_info.timeout_seconds)

    def _receive(self, version: int, timeout_seconds: float) -> Pulled:
        def total(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            return sum_over_ranks(values, self._group.cpu_group, timeout_seconds)

        agreement = Agreement(self._size, self._rank, total)
        try:
            self._check_receivable(version)
            assert self._subscriber is not None  # as that was checked
            buffers = {
                (self._rank, name): tensor.view(torch.uint8).numpy()
                for name, tensor in self._shadow.items()
            }
            combine = agreement.combine if self._size > 1 else None
            return self._subscriber.pull(version, buffers, combine)
        except BaseException as error:
            try:
                agreement.fail()
            except PeerTimeoutError as late:  # this rank's own error tells more
                error.add_note(str(late))
            raise

    def _check_receivable(self, version: int) -> None:
        if self.status.broken:
            raise EngineError(f"{self.status.broken}; restart the engine")
        if self._subscriber is None:
            raise SnapshotError("no publisher is known; connect to their addresses first")
        if self.status.version is not None and version <= self.status.version:
            raise VersionError(
                f"version {self.status.version} is served, asked was {version}; versions only "
                "increase"
            )

    def finish_weight_update(self) -> None:
        """Packs what was received into the model and commits its version.

        Raises SnapshotError when nothing was received. After any other error the worker is broken.
        """
        pulled, self._pulled = self._pulled, None
        if pulled is None:
            raise SnapshotError("nothing to finish: no version was received since the last finish")
        started = time.perf_counter()
        self.status.version = None
        try:
            self._packer.pack(self._shadow)
        except BaseException as error:
            self.status.broken = f"packing version {pulled.version} failed: {error}"
            raise
        packed = time.perf_counter() - started
        self.status = Status(
            version=pulled.version,
            seconds={
                "pull": pulled.total_seconds - pulled.seconds["verify"],
                "digest": pulled.seconds["verify"],
                "pack": packed,
            },
            nbytes=pulled.nbytes,
            digests=pulled.digests_checked,
        )

    def shutdown(self) -> None:
        """Lets go of the publishers' shared memory; the weights stay. Idempotent."""
        self._subscriber = None
        if self._peers is not None:
            self._peers.close()
            self._peers = None


class PeerFailedError(SnapshotError):
    """Another rank of the same engine failed; its own error says why."""


class PeerTimeoutError(SnapshotError):
    """Other ranks of the same engine did not come to where this one waited, or were lost there."""


def sum_over_ranks(
    values: npt.NDArray[np.int64], group: torch.distributed.ProcessGroup, timeout_seconds: float
) -> npt.NDArray[np.int64]:
    """Sums over the ranks of an engine, wrapping around.

    Raises PeerTimeoutError naming the ranks waited for; the group cannot be used after it.
    """
    summed = torch.from_numpy(values.copy())
    options = torch.distributed.AllreduceOptions()
    options.timeout = timedelta(seconds=timeout_seconds)
    try:
        group.allreduce([summed], options).wait(options.timeout)
    except RuntimeError as error:
        others = [rank for rank in range(group.size()) if rank != group.rank()]
        raise PeerTimeoutError(
            f"rank {group.rank()} of the engine waited up to {timeout_seconds:g} s for its ranks "
            f"{others} to compare digests ({error}); see what became of them, and restart the "
            "engine: its ranks are out of step"
        ) from error
    return summed.numpy()


class Agreement:
    """One collective decision of all ranks of an engine: sum digests together, or fail together.

    A rank that fails on the way says so in the sum that the others wait in, so none waits for it.
    """

    def __init__(
        self,
        size: int,
        rank: int,
        total: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]],
    ) -> None:
        self._size, self._rank, self._total = size, rank, total
        self._said = False

    def combine(self, digests: Digests) -> Digests:
        """Sums over ranks. Raises PeerFailedError naming the ranks that failed."""
        failed = self._say(False)
        if failed:
            raise PeerFailedError(
                f"rank {self._rank} received its weights, but ranks {failed} of the engine did "
                "not; their own errors say why"
            )
        return self._total(digests.view(np.int64)).view(np.uint64)

    def fail(self) -> None:
        """Tells the others, unless this rank has taken part already."""
        if self._size > 1 and not self._said:
            self._say(True)

    def _say(self, failed: bool) -> list[int]:
        self._said = True
        flags = np.zeros(self._size, np.int64)
        flags[self._rank] = failed
        return [int(rank) for rank in np.flatnonzero(self._total(flags))]


class WorkerReport:
    """Methods that vLLM's workers get beside their own (``worker_extension_cls``)."""

    weight_transfer_engine: KimisysWeightTransferEngine

    def kimisys_call(self, method: str, arguments: dict[str, Any]) -> tuple[str, str, str] | None:
        """Calls a method of the worker. Returns None, or class, message, trace of what it raised.

        A method that raises through vLLM's RPC leaves the answers of the ranks after it unread, and
        each later call gets the answer to an earlier one.
        """
        try:
            getattr(self, method)(**arguments)
        except Exception as error:
            return type(error).__name__, str(error), traceback.format_exc()
        return None

    def kimisys_status(self) -> dict[str, Any]:
        """The worker's Status as a dictionary."""
        return dict(vars(self.weight_transfer_engine.status))

    def kimisys_seed(self, seed: int) -> None:
        """Seeds the generator that samples tokens."""
        torch.manual_seed(seed)
