"""The policy on one rank of a tensor- and pipeline-parallel model: scores tokens, takes optimizer
steps. Knows nothing of rewards.

All ranks make the same calls with the same arguments, in the same order; each gets the same
results. Losses are computed where the log-probs are, on the last stage. Batches are right-padded:
attention is causal, so what follows a token cannot change it, and padding needs no mask. Positions
are paired as in tokens[:, t] → tokens[:, t + 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from kimisys.adapters.megatron import gradients, optimizer_state, pipeline
from kimisys.adapters.megatron.core import parallel_state
from kimisys.adapters.megatron.log_probs import gathered_log_probs, target_log_probs
from kimisys.adapters.megatron.model import Model
from kimisys.adapters.megatron.shards import memory_of
from kimisys.errors import KimisysError, LayoutError
from kimisys.reshard import Layout


@dataclass(frozen=True)
class LossShare:
    """What some rows add to a step's loss (a scalar, differentiable) and to its statistics: numbers
    that are summed by name."""

    loss: torch.Tensor
    statistics: Mapping[str, float] = field(default_factory=dict)


SequenceLoss = Callable[[torch.Tensor, torch.Tensor], LossShare]
"""(sequence log-probs float32[m], rows int64[m]) → those rows' share of the loss. Called on the
last stage alone: what is to be known of it elsewhere belongs into the statistics."""

_Share = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], LossShare]


class NonFiniteGradientError(KimisysError, FloatingPointError):
    """A gradient is infinite or NaN; the step was not taken."""


@dataclass(frozen=True)
class Adam:
    """AdamW's numbers, all but the learning rate, which comes with each step (Loshchilov &
    Hutter, 2019)."""

    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Step:
    """One optimizer step, the same on every rank. loss: as the caller's loss is scaled.
    gradient_norm: before clipping. statistics: the sums of those that the loss gave."""

    loss: float
    gradient_norm: float
    tokens: int
    micro_batches: int
    learning_rate: float
    statistics: Mapping[str, float]


class Policy:
    """Megatron's model as a policy over token sequences, with its optimizer.

    micro_batch_tokens: rows are sorted by length and taken through the model in groups of at most
    this many tokens, padding included. It bounds memory and keeps activations in cache; results
    depend on it by rounding only.
    """

    def __init__(
        self, model: Model, adam: Adam | None = None, micro_batch_tokens: int = 4096
    ) -> None:
        replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        if replicas != 1:
            raise LayoutError(
                f"Policy trains one replica, but there are {replicas} data- or context-parallel "
                "ones: make world_size equal to tensor_parallel times pipeline_parallel"
            )
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        if model.config.num_moe_experts is not None and tensor > 1:
            raise LayoutError(
                f"Policy trains experts with tensor_parallel 1, not {tensor}: Megatron demands "
                "sequence parallelism beside it, which the norms here do not do; use pipeline "
                "stages instead"
            )
        self.model = model
        self.adam = adam or Adam()
        self.micro_batch_tokens = micro_batch_tokens
        self._groups = gradients.Groups.of_this_rank()
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=0.0,
            betas=self.adam.betas,
            eps=self.adam.epsilon,
            weight_decay=self.adam.weight_decay,
            fused=True,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self._parameters[0].dtype

    def token_log_probs(
        self, tokens: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """log π(tokens[:, t + 1] | tokens[:, : t + 1]) at temperature 1: float32[b, s - 1].

        tokens: int64[b, s]. mask: [b, s - 1]; where it is given and not set, the result is 0.0, and
        what no set position of a row needs is not computed.
        """
        _check_batch(tokens, mask)
        result = torch.zeros(tokens.shape[0], tokens.shape[1] - 1)
        batches = self._micro_batches(tokens, mask)

        def keep(logits: torch.Tensor, number: int) -> None:
            rows, length = batches[number]
            result[rows, : length - 1] = self._log_probs(logits, tokens[rows, 1:length])

        pipeline.evaluate(
            self.model, [tokens[rows, : length - 1] for rows, length in batches], keep
        )
        pipeline.from_last_stage(result)
        return result if mask is None else result.masked_fill_(mask == 0, 0.0)

    def full_log_probs(self, tokens: torch.Tensor) -> torch.Tensor:
        """log π(· | tokens[:, : t + 1]) over the whole vocabulary: float32[b, s, vocab]. For
        small probes: it gathers the logits of all ranks."""
        vocab_size = self.model.family.vocab_size
        result = torch.zeros(*tokens.shape, vocab_size)

        def keep(logits: torch.Tensor, number: int) -> None:
            result.copy_(gathered_log_probs(logits, vocab_size, self._groups.tensor))

        pipeline.evaluate(self.model, [tokens], keep)
        return pipeline.from_last_stage(result)

    def sft_step(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        learning_rate: float,
        max_gradient_norm: float | None = None,
    ) -> Step:
        """One step on the mean cross-entropy, in nats, of the tokens that `mask` selects.

        tokens: int64[b, s]. mask: [b, s - 1], true (or not zero) where tokens[:, t + 1] counts.
        Raises ValueError when it selects nothing, FloatingPointError when the gradient is not
        finite; the weights are then as before.
        """
        _check_batch(tokens, mask)
        selected = int((mask != 0).sum())
        if not selected:
            raise ValueError("the mask selects no token: there is nothing to train on")

        def share(log_probs: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> LossShare:
            return LossShare(-log_probs.masked_fill(~mask, 0.0).sum() / selected)

        return self._step(tokens, mask, share, learning_rate, max_gradient_norm)

    def policy_step(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        loss: SequenceLoss,
        learning_rate: float,
        max_gradient_norm: float | None = None,
    ) -> Step:
        """One step on a loss of sequence log-probs: Σ_t w_t·log π(tokens[:, t + 1] | …), w being
        `mask`.

        tokens: int64[b, s]. mask: [b, s - 1], true or false, or float weights, finite and at least
        0 (kimisys.rl.partial); what is 0 is left out, whatever its log-prob. loss: called once per
        micro-batch, with the sequence log-probs of some rows (differentiable) and the indices of
        these rows; returns their share of the loss. A row that `mask` leaves empty comes with 0.0.
        Raises ValueError for a weight that is negative or not finite, FloatingPointError when the
        gradient is not finite; the weights of the model are then as before.
        """
        _check_batch(tokens, mask)
        token_weights = mask.to(torch.float32)
        wrong = ~(torch.isfinite(token_weights) & (token_weights >= 0))
        if wrong.any():
            row, position = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"mask[{row}, {position}] is {token_weights[row, position].item()}; "
                "a token's weight must be finite and at least 0"
            )

        def share(log_probs: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> LossShare:
            counted = log_probs.masked_fill(~mask, 0.0)
            return loss((counted * token_weights[rows, : counted.shape[1]]).sum(1), rows)

        return self._step(tokens, mask, share, learning_rate, max_gradient_norm)

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments and step count, as k1.5 does at the start of every
        iteration."""
        self._optimizer.state.clear()

    def optimizer_layout(self, weights: Layout) -> Layout:
        """Where the moments of this rank's parameters lie. weights: the rank's `model_layout`."""
        trained = [name for name, _ in self.model.named_parameters()]
        return optimizer_state.optimizer_layout(weights, trained)

    def optimizer_buffers(self, rank: int) -> dict[tuple[int, str], np.ndarray]:
        """The optimizer's moments as the buffers of `optimizer_layout`, to save or to load into;
        after a reset, zeros. `reset_optimizer` leaves them behind: ask again."""
        parameters = dict(self.model.named_parameters())
        return optimizer_state.optimizer_buffers(self._optimizer, parameters, rank)

    @property
    def optimizer_steps(self) -> int:
        """Steps since the last reset. To be set, with the moments, when a checkpoint is loaded."""
        return optimizer_state.steps_taken(self._optimizer)

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        optimizer_state.set_steps_taken(self._optimizer, steps)

    def replica_difference(self) -> float:
        """How far the ranks' copies of parameters have drifted apart, those of one stage and those
        of a tied embedding; 0.0 is what it must be."""
        return gradients.replica_difference(self._parameters, self._groups)

    @contextmanager
    def on_wire(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside the block the weights are what an engine receives: rounded to `dtype` (to
        nearest, ties to even) and back. Afterwards they have the bits they had. Nothing happens
        where `dtype` is their own."""
        if dtype == self.dtype:
            yield
            return
        # buffers too: a router's bias is published beside the parameters
        held = memory_of(self.model).values()
        sent = [tensor.detach() for tensor in held if tensor.is_floating_point()]
        saved = [tensor.clone() for tensor in sent]
        try:
            for tensor in sent:
                tensor.copy_(tensor.to(dtype))
            yield
        finally:
            for tensor, bits in zip(sent, saved, strict=True):
                tensor.copy_(bits)

    def _step(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        share: _Share,
        learning_rate: float,
        max_gradient_norm: float | None,
    ) -> Step:
        mask, batches = mask != 0, self._micro_batches(tokens, mask)

        def close(logits: torch.Tensor, number: int) -> tuple[torch.Tensor, LossShare]:
            rows, length = batches[number]
            log_probs = self._log_probs(logits, tokens[rows, 1:length])
            part = share(log_probs, mask[rows, : length - 1], rows)
            return part.loss, LossShare(part.loss.detach(), part.statistics)

        self._optimizer.zero_grad(set_to_none=True)
        inputs = [tokens[rows, : length - 1] for rows, length in batches]
        loss, statistics = _totals(pipeline.accumulate_gradients(self.model, inputs, close))
        gradients.complete_gradients(
            list(self.model.named_parameters()),
            self.model.family.has_partial_gradient,
            self._groups,
        )
        norm = gradients.gradient_norm(self._parameters, self._groups)
        if not math.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise NonFiniteGradientError(
                f"the gradient's norm is {norm} at loss {loss}: the step was not taken; "
                "lower the learning rate"
            )
        if max_gradient_norm is not None:
            gradients.clip_gradients(self._parameters, norm, max_gradient_norm)
        for settings in self._optimizer.param_groups:
            settings["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        processed = sum(len(rows) * length for rows, length in batches)
        return Step(loss, norm, processed, len(batches), learning_rate, statistics)

    def _log_probs(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """float32[b, t], differentiable; logits as the last stage gives them, targets int64[b, t].
        The last token predicts nothing, so it was not computed."""
        vocab_size = self.model.family.vocab_size
        return target_log_probs(logits, targets, vocab_size, self._groups.tensor)

    def _micro_batches(
        self, tokens: torch.Tensor, mask: torch.Tensor | None
    ) -> list[tuple[torch.Tensor, int]]:
        """(rows int64[m], tokens to take of each), longest first; every row once."""
        count, longest = tokens.shape
        lengths = torch.full((count,), longest)
        if mask is not None:
            # the last selected position, its token, and the token it predicts
            last = (mask != 0).long().mul(torch.arange(1, longest)).amax(1)
            lengths = (last + 1).clamp_(min=2)
        order = torch.argsort(lengths, descending=True, stable=True)
        batches, start = [], 0
        while start < count:
            length = int(lengths[order[start]])
            end = min(start + max(self.micro_batch_tokens // length, 1), count)
            batches.append((order[start:end], length))
            start = end
        return batches


def _totals(shares: list[LossShare]) -> tuple[float, dict[str, float]]:
    """Loss and statistics of a whole step, as the last stage sums them."""
    loss, statistics = 0.0, dict[str, float]()
    for share in shares:
        loss += float(share.loss)
        for name, value in share.statistics.items():
            statistics[name] = statistics.get(name, 0.0) + float(value)
    loss, statistics = pipeline.facts_from_last_stage([loss, statistics])
    return loss, statistics


def _check_batch(tokens: torch.Tensor, mask: torch.Tensor | None) -> None:
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens must be int64[b, s] with s at least 2, not {tokens.dtype}{list(tokens.shape)}"
        )
    if mask is not None and mask.shape != (tokens.shape[0], tokens.shape[1] - 1):
        raise ValueError(
            f"the mask must be {[tokens.shape[0], tokens.shape[1] - 1]} for tokens "
            f"{list(tokens.shape)}, not {list(mask.shape)}"
        )
