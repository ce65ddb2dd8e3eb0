"""AdamW's moments as a layout, on one rank in this process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron_ranks import TINY, memory_buffers, memory_layout

from kimisys.adapters.megatron import pipeline, runtime
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import Model, build_model
from kimisys.adapters.megatron.optimizer_state import optimizer_layout
from kimisys.adapters.megatron.policy import LossShare, Policy
from kimisys.reshard import plan

STEPS = 3


def train(policy: Policy, steps: int) -> None:
    tokens = torch.arange(24).view(3, 8) % 29
    for _ in range(steps):
        policy.sft_step(tokens, torch.ones(3, 7), 1e-3)


def weights(model: Model) -> dict[str, np.ndarray]:
    return {name: array.copy() for (_, name), array in model_buffers(model, 0).items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_moments_travel_in_hugging_face_coordinates(tied: bool) -> None:
    """Three steps, everything into arrays and out into a fresh policy, two more steps: the bits of
    five steps."""
    config = {**TINY, "tie_word_embeddings": tied}
    with runtime.offline(1, 1, 0, 1):
        torch.manual_seed(1)
        model = build_model(config, torch.float32)
        layout = model_layout(model, config, 0)
        policy, moments = Policy(model), optimizer_layout(layout)
        train(policy, STEPS)
        arrays = {
            t.name: np.full(tuple(t.shape), np.nan, np.float32)
            for t in (*layout.tensors, *moments.tensors)
        }
        held = {t.name: arrays[t.name] for t in layout.tensors}
        state = {t.name: arrays[t.name] for t in moments.tensors}
        plan(layout, memory_layout(held)).execute(model_buffers(model, 0), memory_buffers(held))
        plan(moments, memory_layout(state)).execute(
            policy.optimizer_buffers(0), memory_buffers(state)
        )
        assert policy.optimizer_steps == STEPS

        fresh_model = build_model(config, torch.float32)
        fresh = Policy(fresh_model)
        plan(memory_layout(held), layout).execute(
            memory_buffers(held), model_buffers(fresh_model, 0)
        )
        plan(memory_layout(state), moments).execute(
            memory_buffers(state), fresh.optimizer_buffers(0)
        )
        fresh.optimizer_steps = policy.optimizer_steps
        train(policy, 2)
        train(fresh, 2)
        # as tensors: rows of padding were random in the one, and are zeros in what was loaded
        ends = []
        for end in (model, fresh_model):
            arrays = {name: np.empty_like(array) for name, array in held.items()}
            plan(layout, memory_layout(arrays)).execute(
                model_buffers(end, 0), memory_buffers(arrays)
            )
            ends.append(arrays)
    for name, value in ends[0].items():
        np.testing.assert_array_equal(ends[1][name], value, err_msg=name)
        assert not np.array_equal(held[name], value)

    assert {n.split(".")[0] for n in state} == {"exp_avg", "exp_avg_sq"}
    assert {n.split(".", 1)[1] for n in state} == set(held)
    up = "model.layers.1.mlp.up_proj.weight"
    assert (state[f"exp_avg_sq.{up}"] >= 0).all() and (state[f"exp_avg.{up}"] < 0).any()


def test_moments_of_padding_stay_zero() -> None:
    with runtime.offline(1, 1, 0, 1):
        model = build_model(TINY, torch.float32)
        policy, moments = Policy(model), optimizer_layout(model_layout(model, TINY, 0))
        train(policy, STEPS)
        buffers = policy.optimizer_buffers(0)
    assert len(moments.padding) == 4  # two tables, two moments
    for pad in moments.padding:
        assert not buffers[0, pad.buffer][pad.byte_offset : pad.byte_offset + pad.nbytes].any()
        assert buffers[0, pad.buffer].any()


def test_a_reset_optimizer_is_zeros_and_steps_as_a_fresh_one() -> None:
    results = []
    for touched in (False, True):
        with runtime.offline(1, 1, 0, 1):
            torch.manual_seed(1)
            model = build_model(TINY, torch.float32)
            policy = Policy(model)
            train(policy, 1)
            policy.reset_optimizer()
            assert policy.optimizer_steps == 0
            if touched:  # the state is made here, otherwise by the first step
                assert not any(array.any() for array in policy.optimizer_buffers(0).values())
                policy.optimizer_steps = 0
            train(policy, 2)
            assert policy.optimizer_steps == 2
            results.append(weights(model))
    for name, value in results[0].items():
        np.testing.assert_array_equal(results[1][name], value, err_msg=name)


def test_a_loss_without_a_gradient_is_refused() -> None:
    tokens = torch.arange(24).view(3, 8) % 29
    with runtime.offline(1, 1, 0, 1):
        policy = Policy(build_model(TINY, torch.float32))
        with pytest.raises(ValueError, match="does not depend on the log-probs"):
            policy.policy_step(
                tokens, torch.ones(3, 7), lambda values, rows: LossShare(torch.zeros(())), 1e-3
            )
        pipeline.evaluate(policy.model, [], lambda logits, number: None)  # nothing to do
        assert policy.token_log_probs(tokens[:0]).shape == (0, 7)
