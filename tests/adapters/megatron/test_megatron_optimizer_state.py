"""AdamW's moments as a layout, on one rank in this process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron_ranks import TINY, memory_buffers, memory_layout
from tiny_models import tiny_config

from kimisys.adapters.megatron import pipeline, runtime
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import Model, build_model
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.adapters.megatron.policy import LossShare, Policy
from kimisys.reshard import Layout, plan

STEPS = 3


def train(policy: Policy, steps: int) -> None:
    tokens = torch.arange(24).view(3, 8) % 29
    for _ in range(steps):
        policy.sft_step(tokens, torch.ones(3, 7), 1e-3)


def weights(model: Model) -> dict[str, np.ndarray]:
    return {name: array.copy() for (_, name), array in model_buffers(model, 0).items()}


CONFIGS = {
    "untied": TINY,
    "tied": {**TINY, "tie_word_embeddings": True},
    "deepseek_v3": tiny_config("deepseek_v3", vocab_size=29),
}
ROUTER_BIAS = "mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("name", CONFIGS)
def test_moments_travel_in_hugging_face_coordinates(name: str) -> None:
    """Three steps, everything into arrays and out into a fresh policy, two more steps: the bits of
    five steps."""
    config = CONFIGS[name]
    with runtime.offline(1, 1, 0, 1):
        torch.manual_seed(1)
        model = build_model(config, torch.float32)
        layout = model_layout(model, config, 0)
        policy = Policy(model)
        moments = policy.optimizer_layout(layout)
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
    trained = {n for n in held if not n.endswith(ROUTER_BIAS)}
    assert (trained < held.keys()) == (name == "deepseek_v3")
    for tensor, value in ends[0].items():
        np.testing.assert_array_equal(ends[1][tensor], value, err_msg=tensor)
        assert np.array_equal(held[tensor], value) == (tensor not in trained)

    assert {n.split(".")[0] for n in state} == {"exp_avg", "exp_avg_sq"}
    assert {n.split(".", 1)[1] for n in state} == trained
    up = "model.layers.0.mlp.up_proj.weight"
    assert (state[f"exp_avg_sq.{up}"] >= 0).all() and (state[f"exp_avg.{up}"] < 0).any()


@pytest.mark.filterwarnings("ignore::Warning:megatron")
def test_the_ranks_of_a_pipeline_describe_the_moments_of_all_parameters() -> None:
    """What the model keeps beside its parameters has none, on whatever rank it is."""
    config = tiny_config("deepseek_v3", num_hidden_layers=4)
    weights, moments = [], []
    for rank in range(2):
        with runtime.as_rank(Parallel(pipeline=2), rank):
            model = build_model(config, torch.float32)
            weights.append(model_layout(model, config, rank))
            policy = Policy(model)
            moments.append(policy.optimizer_layout(weights[-1]))
            held = {(b.rank, b.name): b.nbytes for b in moments[-1].buffers}
            buffers = policy.optimizer_buffers(rank)
            assert held == {key: array.nbytes for key, array in buffers.items()}
    wanted = {t for t in Layout.merge(weights).tensors if not t.name.endswith(ROUTER_BIAS)}
    found = Layout.merge(moments).tensors
    assert len(found) == 2 * len(wanted)
    assert {t.name for t in found} == {
        f"{moment}.{t.name}" for moment in ("exp_avg", "exp_avg_sq") for t in wanted
    }


def test_on_the_wire_all_that_is_published_is_rounded() -> None:
    """A router's bias too, which is no parameter."""
    with runtime.offline(1, 1, 0, 1):
        model = build_model(CONFIGS["deepseek_v3"], torch.float32)
        bias = model.decoder.layers[1].mlp.router.expert_bias
        bias.copy_(torch.linspace(-1, 1, 4))
        before, exact = weights(model), bias.clone()
        with Policy(model).on_wire(torch.bfloat16):
            assert torch.equal(bias, exact.bfloat16().float()) and not torch.equal(bias, exact)
            for parameter in model.parameters():
                assert torch.equal(parameter, parameter.bfloat16().float())
        for name, array in weights(model).items():
            np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_moments_of_padding_stay_zero() -> None:
    with runtime.offline(1, 1, 0, 1):
        model = build_model(TINY, torch.float32)
        policy = Policy(model)
        moments = policy.optimizer_layout(model_layout(model, TINY, 0))
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
