"""Checkpoints of what one Megatron rank, in this process, holds."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tiny_models import tiny_config

from kimisys.adapters.megatron import runtime
from kimisys.trainer.batch import Batch
from kimisys.trainer.checkpoint import Checkpoints, last_checkpoint
from kimisys.trainer.megatron_rank import MegatronRank, Place
from kimisys.trainer.model_folder import ModelFolder
from kimisys.trainer.progress import Progress
from kimisys.trainer.ranks import Ranks
from kimisys.trainer.watch import Watch

CONFIG = tiny_config("deepseek_v3", vocab_size=29)


class OneRank:
    """`Ranks` of one, without an actor."""

    def __init__(self, seed: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.rank = MegatronRank(Place(0, 1, 1, "127.0.0.1", port), CONFIG, seed, 60.0, 4096)

    def call(self, method: str, *args: Any) -> list[Any]:
        return [getattr(self.rank, method)(*args)]

    def one(self, method: str, *args: Any) -> Any:
        return self.call(method, *args)[0]


def train(ranks: OneRank) -> list[float]:
    batch = Batch(np.arange(24).reshape(3, 8) % 29, np.ones((3, 7), np.float32))
    losses: list[float] = ranks.one("sft", [batch, batch], [1e-2, 1e-2], 1.0)
    return losses


def test_a_router_s_bias_has_no_moments_in_a_checkpoint(tmp_path: Path) -> None:
    """It is a buffer. What is loaded again goes on as what was saved."""
    threads = torch.get_num_threads()
    model = ModelFolder(tmp_path, CONFIG, cast(Any, None), {})
    checkpoints = Checkpoints(tmp_path / "checkpoints", model)
    try:
        first = OneRank(1)
        train(first)
        checkpoints.write(cast(Ranks, first), Progress(Watch(1.0), "task", step=2))
        expected = train(first)
        first.rank.close()

        again, saved = OneRank(2), last_checkpoint(tmp_path / "checkpoints")
        assert saved is not None
        again.call("load", str(saved))
        checkpoints.load_optimizer(cast(Ranks, again), saved)
        assert again.one("optimizer_steps") == 2
        assert train(again) == expected
        again.rank.close()
    finally:
        runtime.shutdown()
        torch.set_num_threads(threads)
