"""The weight-transfer backend ``kimisys``: how a vLLM worker takes over a published version.

Weights are pulled into a shadow of the worker's shard and verified there: what changed since the
shadow's version, or all. Only then are the touched layers packed into the model. Whatever refuses
an update before that leaves the worker serving what it had.

A worker that was broken while it packed, or still has the random weights it started with
(``load_format="dummy"``), refuses to compute: a forward pass raises EngineError, which ends a stock
vLLM engine. Engines of kimisys refuse sooner, and live.

Limits: engines on the CPU, of tensor and expert parallelism alone. The refusal is a hook of the
model's forward; a CUDA graph of the whole model would be replayed past it. Weights that vLLM itself
loaded from a checkpoint are served until the first update, as version None. With a stock vLLM each
rank commits for itself: one that breaks refuses, the others do not know. A worker cannot reach the
scheduler: who updates a stock engine resets its prefix cache, and gives `finish_weight_update` the
version that completions report (docs/vllm.md shows both).
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
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
from kimisys.adapters.vllm.ranks import check_together, sum_over_ranks
from kimisys.adapters.vllm.status import Status
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

    addresses: their socket paths. timeout_seconds: for connecting to all of them. verify_every:
    after so many updates by deltas everything that has landed is digested.
    """

    addresses: list[str]
    timeout_seconds: float = 30.0
    verify_every: int = 16


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Which version to take over.

    version: published, and newer than the one served. full: pull all of it, whatever is here.
    timeout_seconds: for each wait for the other ranks of this engine, and for all waits for
    publishers together.
    """

    version: int
    full: bool = False
    timeout_seconds: float = 120.0


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
        self._behind = Behind()
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
        layout = self._layout(peers)
        self._subscriber = Subscriber(peers, layout, self._rank, init_info.verify_every)
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
        self._pulled = self._receive(update_info)
        self._behind.pulled(self._pulled)

    def _receive(self, update: UpdateInfo) -> Pulled:
        seconds = update.timeout_seconds

        def total(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            return sum_over_ranks(values, self._group.cpu_group, seconds)

        def combine(digests: Digests) -> Digests:
            return total(digests.view(np.int64)).view(np.uint64)

        check_together(
            lambda: self._check_receivable(update.version), self._size, self._rank, total
        )
        assert self._subscriber is not None  # as that was checked
        return self._subscriber.pull(
            update.version,
            self._buffers(self._shadow),
            combine if self._size > 1 else None,
            full=update.full,
            timeout_seconds=seconds,
        )

    def _buffers(self, tensors: Mapping[str, torch.Tensor]) -> dict[tuple[int, str], Any]:
        return {
            (self._rank, name): tensor.reshape(-1).view(torch.uint8).numpy()
            for name, tensor in tensors.items()
        }

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
        served, self.status.version = self.status.version, None
        try:
            # The parameters that the engine computes with hold what is served, not the shadow's.
            near = served is not None and pulled.base == served
            self._packer.pack(
                self._shadow,
                self._behind.names,
                (lambda live: pulled.replay(self._buffers(live))) if near else None,
            )
        except BaseException as error:
            self.status.broken = f"packing version {pulled.version} failed: {error}"
            raise
        self._behind.packed()
        verify = pulled.seconds.get("verify", 0.0)
        phases = {
            "pull": pulled.total_seconds - verify,
            "digest": verify,
            "pack": time.perf_counter() - started,
        }
        self.status = Status(
            version=pulled.version,
            base=pulled.base,
            seconds=pulled.seconds | phases,
            nbytes=pulled.nbytes,
            wire_nbytes=pulled.wire_nbytes,
            full_nbytes=pulled.full_nbytes,
            changed=pulled.changed,
            digests=pulled.digests_checked,
        )

    def shutdown(self) -> None:
        """Lets go of the publishers' shared memory; the weights stay. Idempotent."""
        self._subscriber = None
        if self._peers is not None:
            self._peers.close()
            self._peers = None


class Behind:
    """Which of a model's parameters the shadow is ahead of.

    names: None for all of them.
    """

    def __init__(self) -> None:
        self.names: frozenset[str] | None = None
        self._version: int | None = None  # of the shadow, as far as `names` tells

    def pulled(self, pulled: Pulled) -> None:
        """The shadow was brought to a version. One from a base that is not known here began on what
        an attempt that failed had left."""
        known = pulled.base is not None and pulled.base == self._version
        touched = frozenset(name for _, name in pulled.touched)
        self.names = self.names | touched if known and self.names is not None else None
        self._version = pulled.version

    def packed(self) -> None:
        """The model was brought to the shadow's version."""
        self.names = frozenset()


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
