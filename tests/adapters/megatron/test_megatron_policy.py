"""The policy against transformers: one model, tensor-parallel in Megatron and whole in
transformers.

Weights go in and come out through plans, so these tests hold the layouts to account as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron_ranks import (
    TINY,
    listening_addresses,
    memory_buffers,
    memory_layout,
    run_ranks,
)
from tiny_models import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kimisys.adapters.megatron import gradients, runtime
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import Model, build_model
from kimisys.adapters.megatron.policy import Adam, LossShare, Policy, Step
from kimisys.reshard import Layout, plan

DEADLINE = 240.0
# At Adam's usual epsilon a first step is lr·sign(gradient), and rounding would decide the sign of a
# tiny gradient.
ADAM = Adam(betas=(0.9, 0.95), epsilon=1e-3, weight_decay=0.1)
RATE, MAX_NORM, TAU, STEPS = 1e-2, 0.5, 0.1, 3
CASES = {
    "untied": TINY,
    "tied": {**TINY, "tie_word_embeddings": True},
    "llama": tiny_config("llama", tied=True, vocab_size=29, head_dim=16),
    "qwen2": tiny_config("qwen2", vocab_size=29, hidden_size=64),
}


def config_of(case: str) -> dict[str, Any]:
    return CASES[case]


def reference(case: str) -> PreTrainedModel:
    """A float32 model with weights large enough, and norms uneven enough, for mistakes to show."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(**config_of(case))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if "norm" in name else 0.15
            parameter.copy_((1.0 if "norm" in name else 0.0) + spread * torch.randn_like(parameter))
    return model


def weights_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens int64[8, 12], right-padded; mask bool[8, 11] of a response; lengths int64[8]."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 29, (8, 12), generator=generator)
    lengths = torch.tensor([12, 5, 9, 12, 7, 4, 10, 6])
    position = torch.arange(12)
    tokens[position >= lengths[:, None]] = 0
    mask = (position[1:] < lengths[:, None]) & (position[1:] >= 3)
    return tokens, mask, lengths


def token_weights() -> torch.Tensor:
    """float32[8, 11], importance weights: row 1 counts nothing, the end of row 0 neither."""
    _, mask, _ = sample()
    weights = 2.0 * torch.rand(8, 11, generator=torch.Generator().manual_seed(5)) * mask
    weights[1], weights[0, 7:] = 0.0, 0.0
    return weights


def sequence_loss(log_probs: torch.Tensor, rows: torch.Tensor, before: torch.Tensor) -> LossShare:
    """k1.5's shape: a weighted log-prob and a squared log-ratio."""
    advantages = torch.linspace(-1, 1, 8)[rows]
    ratio = log_probs - before[rows]
    loss = ((-log_probs * advantages + TAU / 2 * ratio.square()) / 8).sum()
    return LossShare(loss, {"rows": float(len(rows)), "ratio": float(ratio.detach().sum())})


def reference_log_probs(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens).logits.float()
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    return chosen.squeeze(-1)


class Rank:
    """One rank's model and policy, loaded with the weights of `case`, and what it found out."""

    def __init__(self, rank: int, folder: Path, case: str) -> None:
        self.rank, self.folder, self.case = rank, folder, case
        self.model: Model = build_model(config_of(case), torch.float32)
        self.layout = model_layout(self.model, config_of(case), rank)
        self.buffers = model_buffers(self.model, rank)
        arrays = dict(np.load(folder / f"{case}.npz"))
        plan(memory_layout(arrays), self.layout).execute(memory_buffers(arrays), self.buffers)
        # rows shorter than half are taken together: several micro-batches, of several lengths
        self.policy = Policy(self.model, ADAM, micro_batch_tokens=30)
        self.found: dict[str, np.ndarray] = {}

    def save_weights(self, moment: str) -> None:
        folder = self.folder / f"{self.case}-{moment}"
        folder.mkdir(exist_ok=True)
        (folder / f"{self.rank}.json").write_text(self.layout.to_json())
        np.savez(folder / f"{self.rank}.npz", **{name: a for (_, name), a in self.buffers.items()})

    def note(self, **found: Any) -> None:
        self.found |= {
            name: value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            for name, value in found.items()
        }

    def note_step(self, moment: str, step: Step) -> None:
        self.note(**{f"{moment}_loss": step.loss, f"{moment}_norm": step.gradient_norm})
        self.note(**{f"{moment}_drift": self.policy.replica_difference()})
        self.note(**{f"{moment}_micro_batches": step.micro_batches})


def work(rank: int, world: int, port: int, folder: Path) -> None:
    """Everything that needs ranks, for each case; what was found is saved for the tests to
    judge."""
    runtime.initialize(world, 1, rank, world, "127.0.0.1", port, 11, 120.0, TINY)
    (folder / f"listening-{rank}.txt").write_text(" ".join(listening_addresses()))
    for case in CASES:
        state = Rank(rank, folder, case)
        score(state)
        train(state)
        np.savez(folder / f"{case}-found-{rank}.npz", **state.found)
    if world == 2:
        drift(folder / f"drift-{rank}.npz")
    runtime.shutdown()
    assert not dist.is_initialized()


def score(state: Rank) -> None:
    policy, (tokens, mask, lengths) = state.policy, sample()
    state.note(all=policy.token_log_probs(tokens), masked=policy.token_log_probs(tokens, mask))
    state.note(full=policy.full_log_probs(tokens[:2]))
    alone = policy.token_log_probs(tokens[5:6, : lengths[5]])
    other = tokens.clone()
    other[torch.arange(12) >= lengths[:, None]] = 28
    state.note(alone=alone, padded_otherwise=policy.token_log_probs(other))
    before = [array.copy() for array in state.buffers.values()]
    with policy.on_wire(torch.bfloat16):
        state.note(wire=policy.token_log_probs(tokens))
        state.save_weights("wire")
    after = state.buffers.values()
    kept = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    with policy.on_wire(torch.float32):
        kept &= all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    state.note(wire_restored=kept)


def train(state: Rank) -> None:
    policy, (tokens, mask, _) = state.policy, sample()
    before = policy.token_log_probs(tokens).masked_fill(~mask, 0.0).sum(1)
    state.note_step("sft", policy.sft_step(tokens, mask.float(), RATE, MAX_NORM))
    state.save_weights("sft")
    policy.reset_optimizer()
    for step in range(STEPS):
        result = policy.policy_step(
            tokens, mask, lambda values, rows: sequence_loss(values, rows, before), RATE
        )
        state.note_step(f"policy{step}", result)
    state.save_weights("policy")
    policy.reset_optimizer()
    result = policy.policy_step(
        tokens, token_weights(), lambda values, rows: sequence_loss(values, rows, before), RATE
    )
    state.note(weighted_loss=result.loss)
    state.save_weights("weighted")
    frozen = [array.copy() for array in state.buffers.values()]
    with pytest.raises(FloatingPointError, match="the step was not taken"):
        policy.policy_step(
            tokens, mask, lambda values, rows: LossShare(values.sum() * torch.nan), RATE
        )
    same = all(np.array_equal(a, b) for a, b in zip(frozen, state.buffers.values(), strict=True))
    state.note(untouched_by_nan=same)


def drift(path: Path) -> None:
    """A replicated parameter that differs on one rank must be seen by all."""
    model = build_model(TINY, torch.float32)
    policy = Policy(model)
    none = policy.replica_difference()
    with torch.no_grad():
        model.decoder.final_layernorm.weight[5] += 0.25 * dist.get_rank()
    np.savez(path, none=none, some=policy.replica_difference())


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `work` left behind at this tensor-parallel size."""
    folder = tmp_path_factory.mktemp(f"tp{request.param}")
    for case in CASES:
        np.savez(folder / f"{case}.npz", **weights_of(reference(case)))
    run_ranks(request.param, work, folder, deadline=DEADLINE)
    return folder


def found_by_all(folder: Path, case: str) -> dict[str, np.ndarray]:
    """What the ranks found, once all are seen to have found the same, to the bit."""
    first, *others = [dict(np.load(p)) for p in sorted(folder.glob(f"{case}-found-*.npz"))]
    for other in others:
        for name, value in first.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)
    return first


def gathered_weights(folder: Path, case: str, moment: str) -> dict[str, np.ndarray]:
    """The ranks' shards as Hugging Face tensors."""
    layouts, buffers = [], {}
    for path in sorted((folder / f"{case}-{moment}").glob("*.json")):
        layouts.append(Layout.from_json(path.read_text()))
        arrays = np.load(path.with_suffix(".npz"))
        buffers |= {(int(path.stem), name): array for name, array in arrays.items()}
    arrays = {name: np.empty_like(a) for name, a in weights_of(reference(case)).items()}
    plan(Layout.merge(layouts), memory_layout(arrays)).execute(buffers, memory_buffers(arrays))
    return arrays


def assert_close(actual: dict[str, np.ndarray], wanted: PreTrainedModel, bound: float) -> None:
    for name, value in weights_of(wanted).items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_log_probs_are_those_of_transformers(ranks: Path, case: str) -> None:
    found, (tokens, mask, _) = found_by_all(ranks, case), sample()
    with torch.no_grad():
        model = reference(case)
        wanted = reference_log_probs(model, tokens).numpy()
        full = model(tokens[:2]).logits.log_softmax(-1).numpy()
    np.testing.assert_allclose(found["all"], wanted, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["full"], full, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["masked"], np.where(mask, wanted, 0.0), rtol=0, atol=1e-4)
    assert found["full"].shape == (2, 12, 29)


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing_before_it(ranks: Path, case: str) -> None:
    found, (_, _, lengths) = found_by_all(ranks, case), sample()
    real = (torch.arange(1, 12) < lengths[:, None]).numpy()
    np.testing.assert_allclose(found["alone"][0], found["all"][5, :3], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found["padded_otherwise"][real], found["all"][real])


@pytest.mark.parametrize("case", CASES)
def test_on_wire_is_what_an_engine_receives(ranks: Path, case: str) -> None:
    found, (tokens, _, _) = found_by_all(ranks, case), sample()
    model = reference(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        wanted = reference_log_probs(model, tokens).numpy()
    sent = gathered_weights(ranks, case, "wire")
    for name, value in weights_of(model).items():
        np.testing.assert_array_equal(sent[name], value, err_msg=name)
    np.testing.assert_allclose(found["wire"], wanted, rtol=0, atol=1e-4)
    assert np.abs(found["wire"] - found["all"]).max() > 1e-3
    assert found["wire_restored"]


@pytest.mark.parametrize("case", CASES)
def test_sft_step_is_that_of_transformers(ranks: Path, case: str) -> None:
    found, (tokens, mask, _) = found_by_all(ranks, case), sample()
    model = reference(case)
    loss = -reference_log_probs(model, tokens)[mask].mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    assert norm > MAX_NORM
    adam_of(model).step()
    assert found["sft_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert found["sft_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert found["sft_micro_batches"] > 1
    assert_close(gathered_weights(ranks, case, "sft"), model, 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_policy_steps_are_those_of_transformers(ranks: Path, case: str) -> None:
    """Several steps from the weights after SFT, with a fresh optimizer, unclipped."""
    found, (tokens, mask, _) = found_by_all(ranks, case), sample()
    model = reference(case)
    with torch.no_grad():
        before = reference_log_probs(model, tokens).masked_fill(~mask, 0.0).sum(1)
        for name, value in gathered_weights(ranks, case, "sft").items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
    optimizer = adam_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        values = reference_log_probs(model, tokens).masked_fill(~mask, 0.0).sum(1)
        loss = sequence_loss(values, torch.arange(8), before).loss
        loss.backward()
        optimizer.step()
        assert found[f"policy{step}_loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert_close(gathered_weights(ranks, case, "policy"), model, 1e-5)
    assert found["untouched_by_nan"]


@pytest.mark.parametrize("case", CASES)
def test_a_step_with_weights_is_that_of_transformers(ranks: Path, case: str) -> None:
    found, (tokens, mask, _), weights = found_by_all(ranks, case), sample(), token_weights()
    model = reference(case)
    with torch.no_grad():
        before = reference_log_probs(model, tokens).masked_fill(~mask, 0.0).sum(1)
        for name, value in gathered_weights(ranks, case, "policy").items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
    values = (reference_log_probs(model, tokens) * weights).sum(1)
    loss = sequence_loss(values, torch.arange(8), before).loss
    loss.backward()
    adam_of(model).step()
    assert found["weighted_loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert_close(gathered_weights(ranks, case, "weighted"), model, 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_equal_replicas_after_steps(ranks: Path, case: str) -> None:
    found = found_by_all(ranks, case)
    drifts = [value for name, value in found.items() if name.endswith("_drift")]
    assert len(drifts) == STEPS + 1 and not any(drifts)
    arrays = [np.load(path) for path in sorted((ranks / f"{case}-policy").glob("*.npz"))]
    replicated = [name for name in arrays[0] if "layernorm" in name]
    norms = 2 if case in ("llama", "qwen2") else 4
    assert len(replicated) == norms * 2 + 1
    for name in replicated:
        for other in arrays[1:]:
            np.testing.assert_array_equal(other[name], arrays[0][name], err_msg=name)


@pytest.mark.parametrize("ranks", [2], indirect=True, ids=["tp2"])
def test_replicas_that_drift_are_seen(ranks: Path) -> None:
    for path in sorted(ranks.glob("drift-*.npz")):
        seen = np.load(path)
        assert seen["none"] == 0.0
        assert seen["some"] == pytest.approx(0.25)


def test_ranks_listen_on_loopback_alone(ranks: Path) -> None:
    paths = list(ranks.glob("listening-*.txt"))
    assert paths and all(path.read_text() == "127.0.0.1" for path in paths)


def adam_of(model: PreTrainedModel) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=RATE,
        betas=ADAM.betas,
        eps=ADAM.epsilon,
        weight_decay=ADAM.weight_decay,
    )


def test_wrong_batches_are_refused() -> None:
    with runtime.offline(1, 1, 0, 1):
        policy = Policy(build_model(TINY, torch.float32))
        tokens, mask = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 3)
        with pytest.raises(ValueError, match="selects no token"):
            policy.sft_step(tokens, mask, 1e-3)
        with pytest.raises(ValueError, match=r"the mask must be \[2, 3\]"):
            policy.sft_step(tokens, torch.ones(2, 4), 1e-3)
        with pytest.raises(ValueError, match=r"int64\[b, s\]"):
            policy.token_log_probs(tokens.int())
    with runtime.offline(1, 1, 0, 2), pytest.raises(Exception, match="2 data- or context-parallel"):
        Policy(build_model(TINY, torch.float32))


def test_bfloat16_model_scores_and_steps() -> None:
    tokens, mask, _ = sample()
    with torch.no_grad():
        wanted = reference_log_probs(reference("tied"), tokens)
    arrays = weights_of(reference("tied"))
    with runtime.offline(1, 1, 0, 1):
        model = build_model(config_of("tied"), torch.bfloat16)
        policy, layout = Policy(model), model_layout(model, config_of("tied"), 0)
        plan(memory_layout(arrays), layout).execute(memory_buffers(arrays), model_buffers(model, 0))
        found = policy.token_log_probs(tokens)
        losses = [policy.sft_step(tokens, mask, 1e-2).loss for _ in range(5)]
    assert found.dtype == torch.float32
    assert (found - wanted).abs().mean() < 0.05
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(("limit", "scale"), [(6.0, 1.0), (1.0, 0.2)])
def test_clipping_scales_all_gradients_alike(limit: float, scale: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    gradients.clip_gradients(parameters, 5.0, limit)
    torch.testing.assert_close(parameters[0].grad, scale * torch.tensor([3.0, 0.0]))
    torch.testing.assert_close(parameters[1].grad, scale * torch.tensor([4.0]))
