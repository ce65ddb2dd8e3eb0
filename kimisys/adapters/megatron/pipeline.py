"""Micro-batches through the stages of a model, by megatron-core's own schedules: one after another
where there is one stage, 1F1B (Narayanan et al., 2021) where there are several.

All ranks of a pipeline make the same calls. What the last stage finds out is sent to the others, so
that each gets the same results, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kimisys.adapters.megatron.core import get_forward_backward_func, parallel_state
from kimisys.adapters.megatron.model import Model

Result = TypeVar("Result")


def evaluate(
    model: Model,
    inputs: Sequence[torch.Tensor],
    finish: Callable[[torch.Tensor, int], None],
) -> None:
    """One forward pass for each of `inputs`, int64[b, s] each, of any sizes.

    finish: called on the last stage with the logits, [b, s, this rank's share of the padded
    vocabulary], and the number of the input.
    """

    def close(number: int, logits: torch.Tensor, non_loss_data: bool) -> None:
        finish(logits, number)

    with torch.no_grad():
        _run(model, inputs, close, backward=False)


def accumulate_gradients(
    model: Model,
    inputs: Sequence[torch.Tensor],
    finish: Callable[[torch.Tensor, int], tuple[torch.Tensor, Result]],
) -> list[Result]:
    """Forward and backward passes of all `inputs`; gradients add up in the parameters.

    finish: called as `evaluate` does, returns a scalar loss and what to keep of it. Returns what
    was kept, in order, on the last stage; nothing elsewhere. When `finish` raises, all stages raise
    once the schedule is through: the last one its error, the others a RuntimeError that quotes it.
    """
    failures: list[Exception] = []

    def close(
        number: int, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Result | None]:
        loss, kept = logits.sum() * 0.0, None  # after a failure: the other stages wait for these
        try:
            if not failures:
                loss, kept = _with_gradient(*finish(logits, number))
        except Exception as error:
            failures.append(error)
        return loss, torch.tensor(inputs[number].numel(), dtype=torch.int), kept

    results = _run(model, inputs, close, backward=True)
    failure = facts_from_last_stage(repr(failures[0]) if failures else None)
    if failures:
        raise failures[0]
    if failure is not None:
        raise RuntimeError(f"the last pipeline stage failed: {failure}")
    return results


def _with_gradient(loss: torch.Tensor, kept: Result) -> tuple[torch.Tensor, Result]:
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on the log-probs: it has no gradient")
    return loss, kept


def _run(
    model: Model, inputs: Sequence[torch.Tensor], close: Callable[..., Any], backward: bool
) -> list[Any]:
    def forward(numbers: Iterator[int], stage: Model) -> tuple[torch.Tensor, Callable[..., Any]]:
        number = next(numbers)
        tokens = inputs[number]
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return stage(tokens, positions, None), partial(close, number)

    if not inputs:
        return []
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(range(len(inputs))),
        model=model,
        num_microbatches=len(inputs),
        # stages tell each other the sizes (variable_seq_lengths): these two are not used
        seq_length=inputs[0].shape[1],
        micro_batch_size=inputs[0].shape[0],
        forward_only=not backward,
        collect_non_loss_data=not backward,
    )
    return results


def from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as the last stage holds it, written in place on the others."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(tensor, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return tensor


def facts_from_last_stage(facts: Any) -> Any:
    """Numbers and their names, whatever JSON can hold, as the last stage knows them."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return facts
    # JSON writes a float with as many digits as bring the same bits back
    text = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    length = from_last_stage(torch.tensor([len(text)]))
    text = from_last_stage(text if len(text) == int(length) else text.new_zeros(int(length)))
    return json.loads(bytes(text.tolist()))
