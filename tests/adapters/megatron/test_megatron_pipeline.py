"""The policy on TP x PP ranks against the same policy on one rank: same weights, same calls.

Ranks also write checkpoints together and resume from them, at their own layout and at another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron_ranks import TINY, memory_buffers, memory_layout, run_ranks

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.families.qwen3 import Qwen3
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import build_model
from kimisys.adapters.megatron.policy import Adam, LossShare, Policy, Step
from kimisys.reshard import Layout, plan
from kimisys.reshard.safetensors import new_checkpoint, open_checkpoint, open_for_writing

LAYOUTS = [(2, 1), (1, 2), (2, 2), (4, 1)]
CASES = {"untied": False, "tied": True}
DEADLINE = 240.0
# a large epsilon: at Adam's usual one, rounding would decide the sign of a first step
ADAM = Adam(epsilon=1e-3, weight_decay=0.1)
RATE, MAX_NORM = 1e-2, 0.5
# of log-probs and weights (absolute), losses and norms (relative): float32's rounding made 4e-6
BOUND = 1e-5
FILES = ("model.safetensors", "optimizer.safetensors")


def config_of(case: str) -> dict[str, Any]:
    return {
        **TINY,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "tie_word_embeddings": CASES[case],
    }


def initial_weights(case: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    return {
        t.name: (
            (1.0 if "norm" in t.name else 0.0)
            + (0.3 if "norm" in t.name else 0.15)
            * random.standard_normal(tuple(t.shape), np.float32)
        ).astype(np.float32)
        for t in Qwen3.from_config(config_of(case)).hf_tensors("float32")
    }


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """tokens int64[8, 12], right-padded; mask bool[8, 11] of the responses."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 29, (8, 12), generator=generator)
    lengths = torch.tensor([12, 5, 9, 12, 7, 4, 10, 6])
    position = torch.arange(12)
    tokens[position >= lengths[:, None]] = 0
    return tokens, (position[1:] < lengths[:, None]) & (position[1:] >= 3)


def sequence_loss(log_probs: torch.Tensor, rows: torch.Tensor) -> LossShare:
    advantages = torch.linspace(-1, 1, 8)[rows]
    share = (-log_probs * advantages + 0.05 * log_probs.square()).sum() / 8
    return LossShare(share, {"rows": float(len(rows)), "sum": float(log_probs.detach().sum())})


class Trainer:
    """A rank's model, policy and layouts, without weights until it loads some."""

    def __init__(self, case: str, rank: int) -> None:
        self.rank = rank
        self.model = build_model(config_of(case), torch.float32)
        self.policy = Policy(self.model, ADAM, micro_batch_tokens=30)  # several micro-batches
        weights = model_layout(self.model, config_of(case), rank)
        self.layouts = dict(
            zip(FILES, (weights, self.policy.optimizer_layout(weights)), strict=True)
        )

    def buffers(self, file: str) -> dict[tuple[int, str], np.ndarray]:
        if file == "model.safetensors":
            return model_buffers(self.model, self.rank)
        return self.policy.optimizer_buffers(self.rank)

    def fill(self, arrays: dict[str, np.ndarray]) -> None:
        layout = self.layouts["model.safetensors"]
        plan(memory_layout(arrays), layout).execute(
            memory_buffers(arrays), self.buffers("model.safetensors")
        )

    def load(self, folder: Path, steps: int) -> None:
        checkpoint = open_checkpoint(folder)
        for file, layout in self.layouts.items():
            plan(checkpoint.layout, layout).execute(checkpoint.buffers, self.buffers(file))
        self.policy.optimizer_steps = steps

    def steps(self, first: int, last: int) -> list[Step]:
        """Steps `first` .. `last` - 1 of a course: one of SFT, clipped, then of RL."""
        tokens, mask = sample()
        return [
            self.policy.policy_step(tokens, mask, sequence_loss, RATE)
            if number
            else self.policy.sft_step(tokens, mask.float(), RATE, MAX_NORM)
            for number in range(first, last)
        ]

    def all_bytes(self) -> list[np.ndarray]:
        return [a.copy() for file in FILES for a in self.buffers(file).values()]


def save(trainer: Trainer, folder: Path, layouts: dict[str, Layout]) -> None:
    """All ranks write their shares of `folder`. layouts: of all ranks, for each file."""
    if trainer.rank:
        meet()
        fill(trainer, folder, layouts)
        meet()
    else:
        tensors = {file: list(layout.tensors) for file, layout in layouts.items()}
        with new_checkpoint(folder, tensors) as partial:
            folder.with_suffix(".partial").write_text(partial.name)
            meet()
            fill(trainer, folder, layouts)
            meet()
    meet()  # nobody goes on before the folder has its name


def meet() -> None:
    """Wait for the other ranks."""
    if dist.get_world_size() > 1:
        dist.barrier()


def fill(trainer: Trainer, folder: Path, layouts: dict[str, Layout]) -> None:
    partial = folder.parent / folder.with_suffix(".partial").read_text()
    for file, layout in layouts.items():
        with open_for_writing(partial / file) as out:
            share = plan(layout, out.layout).of_source(trainer.rank)
            share.execute(trainer.buffers(file), out.buffers, threads=1)


def run_case(case: str, rank: int, folder: Path, other: Path, world: int) -> dict[str, Any]:
    """What one rank finds out; checkpoints are left in `folder`. other: a checkpoint of the same
    course at another layout, after three steps."""
    trainer, (tokens, mask) = Trainer(case, rank), sample()
    trainer.fill(initial_weights(case))
    found: dict[str, Any] = {
        "all": trainer.policy.token_log_probs(tokens),
        "masked": trainer.policy.token_log_probs(tokens, mask),
        "full": trainer.policy.full_log_probs(tokens[:2]),
    }
    note_steps(found, trainer.steps(0, 3))
    found["drift"] = trainer.policy.replica_difference()
    layouts = exchange(trainer, folder, case, world)
    save(trainer, folder / f"{case}-3", layouts)
    trainer.steps(3, 5)
    save(trainer, folder / f"{case}-5", layouts)

    resumed = Trainer(case, rank)
    resumed.load(folder / f"{case}-3", 3)
    resumed.steps(3, 5)
    same = zip(trainer.all_bytes(), resumed.all_bytes(), strict=True)
    found["resumed_to_the_bit"] = all(np.array_equal(a, b) for a, b in same)
    found["steps"] = resumed.policy.optimizer_steps
    if other.exists():
        resumed.load(other, 3)
        resumed.steps(3, 5)
        save(resumed, folder / f"{case}-moved", layouts)

    before = trainer.all_bytes()
    with pytest.raises(FloatingPointError, match="the step was not taken"):
        trainer.policy.policy_step(tokens, mask, spoiled_loss, RATE)
    same = zip(trainer.all_bytes(), before, strict=True)
    found["untouched_by_nan"] = all(np.array_equal(a, b) for a, b in same)
    found["drift_seen"] = drift(trainer)
    return {name: np.asarray(value) for name, value in found.items()}


def spoiled_loss(log_probs: torch.Tensor, rows: torch.Tensor) -> LossShare:
    return LossShare(log_probs.sum() * torch.nan, {"broken": float("nan")})


def drift(trainer: Trainer) -> float:
    """One copy of something that several ranks hold is moved by 0.25 on the last rank."""
    parameters = dict(trainer.model.named_parameters())
    names = ["output_layer.weight", "decoder.final_layernorm.weight"]
    held = [n for n in names if n in parameters and trainer.rank == dist.get_world_size() - 1]
    with torch.no_grad():
        for name in held:
            parameters[name][5] += 0.25
    return trainer.policy.replica_difference()


def note_steps(found: dict[str, Any], steps: Sequence[Step]) -> None:
    for name in ("loss", "gradient_norm", "tokens", "micro_batches"):
        found[name] = [getattr(step, name) for step in steps]
    found["rows"] = [step.statistics.get("rows", 0.0) for step in steps]
    found["sum"] = [step.statistics.get("sum", 0.0) for step in steps]


def exchange(trainer: Trainer, folder: Path, case: str, world: int) -> dict[str, Layout]:
    """The merged layouts of all ranks, told through files."""
    for file, layout in trainer.layouts.items():
        (folder / f"{case}-{file}-{trainer.rank}.json").write_text(layout.to_json())
    meet()
    return {
        file: Layout.merge(
            [
                Layout.from_json((folder / f"{case}-{file}-{rank}.json").read_text())
                for rank in range(world)
            ]
        )
        for file in FILES
    }


def work(
    rank: int, world: int, port: int, folder: Path, other: Path, sizes: tuple[int, int]
) -> None:
    runtime.initialize(*sizes, rank, world, "127.0.0.1", port, 11, 120.0, config_of("tied"))
    for case in CASES:
        found = run_case(case, rank, folder, other / f"{case}-3", world)
        np.savez(folder / f"{case}-found-{rank}.npz", **found)
    runtime.shutdown()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank finds, in this process."""
    folder = tmp_path_factory.mktemp("tp1-pp1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with runtime.offline(1, 1, 0, 1):
        for case in CASES:
            found = run_case(case, 0, folder, folder / "none", 1)
            np.savez(folder / f"{case}-found-0.npz", **found)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """What the ranks of each layout left; each resumes the course of the layout before it, so that
    TP 2 goes on at TP 1 x PP 2."""
    folders: dict[tuple[int, int], Path] = {}
    other = Path("none")
    for tp, pp in LAYOUTS:
        folder = tmp_path_factory.mktemp(f"tp{tp}-pp{pp}")
        run_ranks(tp * pp, work, folder, other, (tp, pp), deadline=DEADLINE)
        folders[tp, pp] = other = folder
    return folders


def found_in(folder: Path, case: str) -> dict[str, np.ndarray]:
    """What the ranks found, once all are seen to have found the same, to the bit."""
    first, *others = [dict(np.load(p)) for p in sorted(folder.glob(f"{case}-found-*.npz"))]
    for other in others:
        for name, value in first.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)
    return first


def weights_in(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(folder)
    arrays = {t.name: np.empty(tuple(t.shape), np.float32) for t in checkpoint.layout.tensors}
    plan(checkpoint.layout, memory_layout(arrays)).execute(
        checkpoint.buffers, memory_buffers(arrays)
    )
    return arrays


def assert_close(actual: Path, wanted: Path, bound: float) -> None:
    arrays, expected = weights_in(actual), weights_in(wanted)
    assert arrays.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(arrays[name], value, rtol=0, atol=bound, err_msg=name)


layouts = pytest.mark.parametrize("sizes", LAYOUTS, ids=lambda s: f"tp{s[0]}-pp{s[1]}")
cases = pytest.mark.parametrize("case", CASES)
Everywhere = dict[tuple[int, int], Path]


@layouts
@cases
def test_ranks_score_and_step_as_one_rank_does(
    single: Path, everywhere: Everywhere, sizes: tuple[int, int], case: str
) -> None:
    found, wanted = found_in(everywhere[sizes], case), found_in(single, case)
    for name in ("all", "masked", "full"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=BOUND, err_msg=name)
    for name in ("loss", "gradient_norm", "sum"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=BOUND, err_msg=name)
    for name in ("tokens", "micro_batches", "rows"):
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    assert wanted["gradient_norm"][0] > MAX_NORM and (wanted["micro_batches"] > 2).all()
    assert wanted["rows"].tolist() == [0, 8, 8]
    assert_close(everywhere[sizes] / f"{case}-3", single / f"{case}-3", BOUND)


@cases
def test_a_pipeline_computes_the_same_bits(single: Path, everywhere: Everywhere, case: str) -> None:
    """Stages cut the same arithmetic in two. Only the gradient of a tied embedding is summed in
    another order."""
    found, wanted = found_in(everywhere[1, 2], case), found_in(single, case)
    for name in ("all", "masked", "full"):
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    assert found["loss"][0] == wanted["loss"][0]
    if case == "untied":
        np.testing.assert_array_equal(found["loss"], wanted["loss"])
        assert_close(everywhere[1, 2] / f"{case}-5", single / f"{case}-5", 0.0)


@layouts
@cases
def test_copies_agree_and_drift_is_seen(
    everywhere: Everywhere, sizes: tuple[int, int], case: str
) -> None:
    found = found_in(everywhere[sizes], case)
    assert found["drift"] == 0.0
    replicated = sizes[0] > 1 or case == "tied"  # otherwise no parameter has a second copy
    assert found["drift_seen"] == pytest.approx(0.25 if replicated else 0.0)
    assert found["untouched_by_nan"]


@layouts
@cases
def test_a_resumed_run_takes_the_same_steps_to_the_bit(
    everywhere: Everywhere, sizes: tuple[int, int], case: str
) -> None:
    found = found_in(everywhere[sizes], case)
    assert found["resumed_to_the_bit"] and found["steps"] == 5


@cases
def test_one_rank_resumes_to_the_bit(single: Path, case: str) -> None:
    assert found_in(single, case)["resumed_to_the_bit"]


@pytest.mark.parametrize("sizes", LAYOUTS[1:], ids=lambda s: f"tp{s[0]}-pp{s[1]}")
@cases
def test_a_run_goes_on_at_another_layout(
    single: Path, everywhere: Everywhere, sizes: tuple[int, int], case: str
) -> None:
    """Weights and moments of the layout before, two more steps here, against five on one rank."""
    moved = everywhere[sizes] / f"{case}-moved"
    assert_close(moved, single / f"{case}-5", BOUND)
    moments = weights_in(moved)["exp_avg_sq.model.layers.3.mlp.up_proj.weight"]
    assert (moments > 0).any()
