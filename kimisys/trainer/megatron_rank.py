"""One Megatron rank, as an actor: it loads, trains, scores and publishes its own
shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import build_model
from kimisys.adapters.megatron.policy import LossShare, Policy
from kimisys.adapters.ray import Actor
from kimisys.broadcast import Publication, Publisher, snapshot_layout
from kimisys.reshard import Layout, plan
from kimisys.reshard.safetensors import open_checkpoint, open_for_writing
from kimisys.rl.policy_loss import group_advantages, policy_loss, sample_weights
from kimisys.trainer.batch import Batch


@dataclass(frozen=True)
class Improvement:
    """What one iteration learns from. groups: int64[rows], numbered from 0; rewards, reference:
    float32[rows], reference being log π_i of each completion. reset: whether the optimizer's state
    is forgotten first, as k1.5 does; bench/density measures what that means for deltas. weights:
    of each token in the loss, float32 like batch.mask (kimisys.rl.partial), with which `reference`
    must have been summed too; None: the mask."""

    batch: Batch
    rewards: np.ndarray
    groups: np.ndarray
    reference: np.ndarray
    minibatches: int
    learning_rate: float
    tau: float
    clip_gradient: float
    seed: int
    reset: bool = True
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Improved:
    """Means over the optimizer steps of an iteration. divergence: of the last one, an estimate of
    KL(π_i ‖ π_θ) in nats a completion. replica_difference: how far parameters that all ranks hold
    have drifted apart; anything but 0.0 is an error."""

    loss: float
    gradient_norm: float
    divergence: float
    replica_difference: float


@dataclass(frozen=True)
class Place:
    """Which rank of which layout an actor is, and where rank 0 listens."""

    rank: int
    tensor_parallel: int
    pipeline_parallel: int
    address: str
    port: int


class MegatronRank(Actor):
    """One Megatron rank. All ranks make the same calls in the same order."""

    def __init__(
        self,
        place: Place,
        hf_config: Mapping[str, Any],
        seed: int,
        timeout: float,
        micro_batch_tokens: int,
    ) -> None:
        torch.set_num_threads(1)
        runtime.initialize(
            place.tensor_parallel,
            place.pipeline_parallel,
            place.rank,
            place.tensor_parallel * place.pipeline_parallel,
            place.address,
            place.port,
            seed,
            timeout,
            hf_config,
        )
        rank = place.rank
        self.rank = rank
        self.model = build_model(dict(hf_config), torch.float32)
        self.layout = model_layout(self.model, dict(hf_config), rank)
        self.buffers = model_buffers(self.model, rank)
        self.policy = Policy(self.model, micro_batch_tokens=micro_batch_tokens)
        self._publisher: Publisher | None = None
        self._wire = torch.float32

    def load(self, folder: str) -> None:
        """Fill the parameters from a checkpoint folder."""
        checkpoint = open_checkpoint(folder)
        plan(checkpoint.layout, self.layout).execute(checkpoint.buffers, self.buffers)

    def describe(self) -> str:
        """The layout of this rank's weights, as JSON."""
        return self.layout.to_json()

    def describe_moments(self) -> str:
        """The layout of this rank's optimizer moments, as JSON."""
        return self.policy.optimizer_layout(self.layout).to_json()

    def optimizer_steps(self) -> int:
        """Steps since the optimizer's state was zero."""
        return self.policy.optimizer_steps

    def fill_weights(self, layout: str, file: str) -> int:
        """Write this rank's share of a file of weights; its bytes. layout: of all ranks."""
        return self._fill(Layout.from_json(layout), file, self.buffers)

    def fill_moments(self, layout: str, file: str) -> int:
        """Write this rank's share of a file of the optimizer's moments. layout: of all ranks'."""
        moments = self.policy.optimizer_buffers(self.rank)
        return self._fill(Layout.from_json(layout), file, moments)

    def _fill(self, layout: Layout, file: str, buffers: Mapping[tuple[int, str], Any]) -> int:
        with open_for_writing(file) as made:
            share = plan(layout, made.layout).of_source(self.rank)
            share.execute(buffers, made.buffers)
        return share.proof.copied_bytes

    def load_optimizer(self, folder: str, steps: int) -> None:
        """Fill the optimizer's state, `steps` old, from a folder of moments."""
        checkpoint = open_checkpoint(folder)
        moments = self.policy.optimizer_buffers(self.rank)
        layout = self.policy.optimizer_layout(self.layout)
        plan(checkpoint.layout, layout).execute(checkpoint.buffers, moments)
        self.policy.optimizer_steps = steps

    def snapshot(self, wire_dtype: str) -> str:
        """The layout of this rank's snapshot in the wire dtype, as JSON."""
        self._wire = getattr(torch, wire_dtype)
        return snapshot_layout(self.layout, wire_dtype).to_json()

    def open_publisher(self, snapshots: Sequence[str], folder: str) -> None:
        """Serve this rank's snapshot at `folder`/rankN, given the snapshot layouts of all ranks.
        A former publisher is closed."""
        if self._publisher is not None:
            self._publisher.close()
        merged = Layout.merge([Layout.from_json(text) for text in snapshots])
        self._publisher = Publisher(
            self.layout, merged, self.rank, Path(folder) / f"rank{self.rank}"
        )

    def publish(self, version: int, full: bool) -> Publication:
        """Publish the live weights as `version`: what changed since the last one, or with `full`
        everything anew."""
        if self._publisher is None:
            raise RuntimeError("open_publisher comes before publish")
        return self._publisher.publish(version, self.buffers, threads=1, full=full)

    def sft(self, batches: Sequence[Batch], rates: Sequence[float], clip: float) -> list[float]:
        """One AdamW step on each batch; returns the mean cross-entropy of each, in nats per
        token."""
        return [
            self.policy.sft_step(_tensor(batch.tokens), _tensor(batch.mask), rate, clip).loss
            for batch, rate in zip(batches, rates, strict=True)
        ]

    def score(self, batch: Batch) -> np.ndarray:
        """Log-probability of each next token, float32[sequences, tokens - 1], under the published
        weights."""
        with self.policy.on_wire(self._wire):
            return self.policy.token_log_probs(_tensor(batch.tokens), _tensor(batch.mask)).numpy()

    def improve(self, work: Improvement) -> Improved:
        """One iteration of k1.5: the optimizer's state is forgotten, then one step on each
        minibatch."""
        if work.reset:
            self.policy.reset_optimizer()
        order = np.random.default_rng(work.seed).permutation(int(work.groups.max()) + 1)
        losses, norms, divergence = [], [], 0.0
        for chosen in np.array_split(order, work.minibatches):
            rows = np.flatnonzero(np.isin(work.groups, chosen))
            batch = work.batch.rows(rows)
            weights = batch.mask
            if work.weights is not None:
                weights = work.weights[rows, : batch.mask.shape[1]]
            step = self.policy.policy_step(
                _tensor(batch.tokens),
                _tensor(weights),
                _PolicyLoss(work, rows),
                work.learning_rate,
                work.clip_gradient,
            )
            losses.append(step.loss)
            norms.append(step.gradient_norm)
            divergence = step.statistics["divergence"]
        drift = self.policy.replica_difference()
        return Improved(float(np.mean(losses)), float(np.mean(norms)), divergence, drift)

    def probe(self, tokens: Sequence[int]) -> np.ndarray:
        """Log-softmax over the vocabulary after each token but the last, under the published
        weights."""
        with self.policy.on_wire(self._wire):
            return self.policy.full_log_probs(torch.tensor([list(tokens)]))[0, :-1].numpy()

    def close(self) -> None:
        """Remove the socket and leave the process group."""
        if self._publisher is not None:
            self._publisher.close()
        runtime.shutdown()


class _PolicyLoss:
    """k1.5's loss on `rows` of an iteration, in the form `Policy.policy_step` takes: micro-batch by
    micro-batch."""

    def __init__(self, work: Improvement, rows: np.ndarray) -> None:
        groups, rewards = _tensor(work.groups[rows]), _tensor(work.rewards[rows])
        self._advantages = group_advantages(rewards, groups)
        self._weights = sample_weights(groups)
        self._reference = _tensor(work.reference[rows])
        self._tau = work.tau

    def __call__(self, log_probs: torch.Tensor, rows: torch.Tensor) -> LossShare:
        result = policy_loss(
            log_probs, self._reference[rows], self._advantages[rows], self._weights[rows], self._tau
        )
        return LossShare(result.loss, {"divergence": float(result.divergence)})


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy())  # what Ray hands over is read-only
