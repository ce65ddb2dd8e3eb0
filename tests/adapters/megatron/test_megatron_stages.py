"""Pipeline stages of a few seconds: what each begins with, and a last stage that fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_ranks import TINY, run_ranks

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.model import build_model
from kimisys.adapters.megatron.policy import LossShare, Policy

TIMEOUT_SECONDS = 60.0


def constant_loss(log_probs: torch.Tensor, rows: torch.Tensor) -> LossShare:
    return LossShare(torch.tensor(1.0))


def broken_loss(log_probs: torch.Tensor, rows: torch.Tensor) -> LossShare:
    raise KeyError(f"broken at {len(rows)} rows")


def good_loss(log_probs: torch.Tensor, rows: torch.Tensor) -> LossShare:
    return LossShare(log_probs.sum())


def work(rank: int, world: int, port: int, folder: Path) -> None:
    runtime.initialize(1, world, rank, world, "127.0.0.1", port, 7, TIMEOUT_SECONDS)
    model = build_model(TINY, torch.float32)
    weights = dict(model.named_parameters())
    qkv = weights["decoder.layers.0.self_attention.linear_qkv.weight"].detach()
    np.save(folder / f"{rank}.npy", qkv.numpy())
    policy = Policy(model, micro_batch_tokens=24)
    tokens, mask = torch.arange(96).reshape(8, 12) % TINY["vocab_size"], torch.ones(8, 11)
    last = rank == world - 1
    for loss, own, words in (
        (constant_loss, ValueError, "no gradient"),
        (broken_loss, KeyError, "broken at 2 rows"),
    ):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(own if last else RuntimeError, match=words):
            policy.policy_step(tokens, mask, loss, 1e-3)
        assert all(map(torch.equal, before, model.parameters()))
    assert policy.policy_step(tokens, mask, good_loss, 1e-3).gradient_norm > 0
    runtime.shutdown()


def test_stages_begin_apart_and_a_failure_of_the_last_reaches_all(tmp_path: Path) -> None:
    run_ranks(2, work, tmp_path, deadline=2 * TIMEOUT_SECONDS)
    first, second = (np.load(tmp_path / f"{rank}.npy") for rank in (0, 1))
    assert first.shape == second.shape and not np.array_equal(first, second)
