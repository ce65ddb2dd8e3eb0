"""Families with experts: where their tensors go, and that Megatron computes what transformers
computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron_ranks import memory_buffers, memory_layout
from megatron_worlds import asked_layout, assert_comes_back, checkpoint_of, memory, reference
from tiny_models import MOE_FAMILIES, tiny_config
from transformers import AutoConfig

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.families import check_layout, check_model, family_of
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import build_chunks, build_model
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.adapters.megatron.policy import Policy
from kimisys.errors import LayoutError
from kimisys.reshard import plan

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
pytestmark = [
    # asked on purpose: of layouts alone, and without Transformer Engine
    pytest.mark.filterwarnings("ignore:When using expert parallelism and tensor parallelism"),
    pytest.mark.filterwarnings("ignore:.*(tp_group is None|MLP requires ffn_hidden_size)"),
]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("mixtral", {"tie_word_embeddings": True}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"mlp_only_layers": [1], "num_hidden_layers": 3}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"q_lora_rank": None}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    ("deepseek_v3", {"first_k_dense_replace": 0}),
    ("deepseek_v3", {"n_shared_experts": 2}),
    ("deepseek_v3", {"rope_parameters": YARN}),
]
LAYOUTS = [
    "tp=1",
    "tp=2",
    "ep=2",
    "ep=4",
    "tp=2,ep=2",
    "tp=2,ep=2,etp=1",
    "tp=2,ep=4,etp=1",
    "tp=1,ep=2,etp=2",
    "pp=2,ep=2",
    "pp=2,vpp=2,tp=2,etp=1",
    "dp=2,cp=2,ep=2",
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_checkpoint_comes_back_from_the_ranks(family: str, layout: str) -> None:
    config = tiny_config(family, num_hidden_layers=4)
    assert_comes_back(asked_layout(config, Parallel.parse(layout)))


@pytest.mark.filterwarnings("ignore:The legacy GroupedMLP")
@pytest.mark.parametrize("layout", ["tp=2", "ep=2", "tp=2,ep=2", "pp=2,vpp=2,tp=2,etp=1"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_checkpoint_comes_back_from_grouped_experts(family: str, layout: str) -> None:
    config = tiny_config(family, num_hidden_layers=4)
    assert_comes_back(asked_layout(config, Parallel.parse(layout), grouped_experts=True))


@pytest.mark.parametrize(("family", "change"), VARIANTS)
def test_names_and_shapes_are_those_that_transformers_writes(
    family: str, change: dict[str, Any]
) -> None:
    config = tiny_config(family, **change)
    written = checkpoint_of(reference(config))
    told = {t.name: tuple(t.shape) for t in family_of(config).hf_tensors("float32")}
    assert told == {name: array.shape for name, array in written.items()}
    layout = asked_layout(config, Parallel(tensor=2, pipeline=1))
    assert {t.name for t in layout.tensors} == told.keys()


@torch.no_grad()
@pytest.mark.parametrize(("family", "change"), VARIANTS)
def test_logits_are_those_of_transformers(family: str, change: dict[str, Any]) -> None:
    """As for the dense families: both against transformers in float64, errors of one size."""
    config = tiny_config(family, **change)
    model = reference(config)
    given = checkpoint_of(model)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config["vocab_size"], (3, 100), generator=generator)
    with runtime.as_rank(Parallel(), 0):
        ours = build_model(config, torch.float32).eval()
        layout, buffers = model_layout(ours, config, 0), model_buffers(ours, 0)
        plan(memory_layout(given), layout).execute(memory_buffers(given), buffers)
        found = ours(tokens, torch.arange(100).expand_as(tokens), None)
    found, rounded = found[..., : config["vocab_size"]], model(tokens).logits
    exact = model.double()(tokens).logits
    error, own = (float((logits - exact).abs().max()) for logits in (found, rounded))
    assert exact.std() > 0.5 and own < 1e-4
    assert error < 4 * own


def test_an_expert_s_rows_are_where_megatron_keeps_them() -> None:
    """Expert parallel rank 1 of 2, tensor rank 0 of 2 for experts: by indices, by hand."""
    config = tiny_config("qwen3_moe")
    parallel = Parallel.parse("tp=2,ep=2")
    [rank] = [r for r in range(4) if _experts_of(config, parallel, r) == {2, 3}][:1]
    with runtime.as_rank(parallel, rank):
        chunks = build_chunks(config, torch.float32, parallel=parallel)
        layout, buffers = model_layout(chunks, config, rank), model_buffers(chunks, rank)
    arrays = {
        t.name: np.full(tuple(t.shape), -1, np.float32)
        for t in family_of(config).hf_tensors("float32")
    }
    prefix = "model.layers.1.mlp.experts.3."
    arrays[f"{prefix}gate_proj.weight"].T[:] = np.arange(64)
    arrays[f"{prefix}up_proj.weight"].T[:] = 1000 + np.arange(64)
    plan(memory_layout(arrays), layout).execute(memory_buffers(arrays), buffers)
    weight = chunks[0].decoder.layers[1].mlp.experts.local_experts[1].linear_fc1.weight
    assert weight.detach()[:, 0].int().tolist() == [*range(32), *range(1000, 1032)]


def _experts_of(config: dict[str, Any], parallel: Parallel, rank: int) -> set[int]:
    with runtime.as_rank(parallel, rank):
        chunks = build_chunks(config, torch.float32, "meta", parallel)
        layout = model_layout(chunks, config, rank)
    return {int(f.tensor.split(".")[5]) for f in layout.fragments if ".experts." in f.tensor}


def test_the_router_s_bias_stays_float32() -> None:
    """Megatron keeps it so whatever the parameters are; so does DeepSeek's checkpoint."""
    layout = asked_layout(tiny_config("deepseek_v3"), Parallel.parse("pp=2,first=1"),
                          torch.bfloat16)  # fmt: skip
    dtypes = {t.name: t.dtype for t in layout.tensors}
    biases = {name for name in dtypes if name.endswith("e_score_correction_bias")}
    assert biases == {f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in (1, 2)}
    assert {dtypes[name] for name in biases} == {"float32"}
    assert {dtype for name, dtype in dtypes.items() if name not in biases} == {"bfloat16"}
    assert_comes_back(layout)


def test_grouped_experts_lie_as_megatron_multiplies_them() -> None:
    """GroupedMLP.forward views weight1 as [experts, hidden, 2 · width], weight2 as [experts, width,
    hidden]: by indices, by hand."""
    config = tiny_config("mixtral")
    width, hidden = config["intermediate_size"], config["hidden_size"]
    layout = asked_layout(config, Parallel(expert=2, data=2), grouped_experts=True)
    given = {
        t.name: np.arange(np.prod(t.shape), dtype=np.float32).reshape(t.shape)
        for t in layout.tensors
    }
    for number, (name, array) in enumerate(given.items()):
        given[name] = array + 100_000 * number
    ranks = memory(layout)
    plan(memory_layout(given), layout).execute(memory_buffers(given), ranks)
    prefix = "decoder.layers.1.mlp.experts.weight"
    first = ranks[1, f"{prefix}1"].view(np.float32).reshape(2, hidden, 2 * width)
    second = ranks[1, f"{prefix}2"].view(np.float32).reshape(2, width, hidden)
    for local, expert in enumerate((2, 3)):
        own = f"model.layers.1.block_sparse_moe.experts.{expert}."
        np.testing.assert_array_equal(first[local, :, :width], given[f"{own}w1.weight"].T)
        np.testing.assert_array_equal(first[local, :, width:], given[f"{own}w3.weight"].T)
        np.testing.assert_array_equal(second[local], given[f"{own}w2.weight"].T)


def test_grouped_experts_are_two_parameters_of_a_layer() -> None:
    layout = asked_layout(tiny_config("mixtral"), Parallel(expert=2, data=2), grouped_experts=True)
    held = [b.name for b in layout.buffers if b.rank == 1 and "layers.1.mlp.experts" in b.name]
    assert sorted(held) == [f"decoder.layers.1.mlp.experts.weight{n}" for n in (1, 2)]
    with runtime.as_rank(Parallel(), 0), pytest.raises(LayoutError, match="grouped_gemm package"):
        build_chunks(tiny_config("mixtral"), torch.float32, grouped_experts=True)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_policy_with_experts_learns(family: str) -> None:
    tokens = torch.randint(0, 101, (4, 20), generator=torch.Generator().manual_seed(1))
    with runtime.as_rank(Parallel(), 0):
        torch.manual_seed(0)
        policy = Policy(build_model(tiny_config(family), torch.float32))
        losses = [policy.sft_step(tokens, torch.ones(4, 19), 1e-2).loss for _ in range(4)]
    assert losses[-1] < losses[0] - 0.3
    with runtime.as_rank(Parallel(tensor=2), 0):
        model = build_model(tiny_config(family), torch.float32)
        with pytest.raises(LayoutError, match="with tensor_parallel 1, not 2"):
            Policy(model)
    with runtime.as_rank(Parallel(expert=2, context=2), 0):
        model = build_model(tiny_config(family), torch.float32)
        with pytest.raises(LayoutError, match="there are 2 data- or context-parallel ones"):
            Policy(model)


def test_kimi_s_and_moonlight_s_configurations_are_deepseek_s() -> None:
    """Kimi-K2 says another model_type; Moonlight projects queries at once."""
    kimi = tiny_config("deepseek_v3", model_type="kimi_k2", n_group=1, topk_group=1)
    moonlight = tiny_config("deepseek_v3", q_lora_rank=None, n_group=1, topk_group=1)
    for config in (kimi, moonlight):
        assert type(family_of(config)).__name__ == "DeepseekV3"
        assert_comes_back(asked_layout(config, Parallel.parse("tp=2,ep=2,etp=1")))


REFUSED = [
    ("mixtral", {"sliding_window": 128}, "tp=1", "sliding_window 128 of this Mixtral"),
    ("mixtral", {}, "ep=3", r"expert_parallel 3 .*num_local_experts 4 .*one of \[1, 2, 4\]"),
    ("mixtral", {}, "ep=2,etp=5,tp=1", "expert_tensor_parallel 5 does not divide intermediate_s"),
    ("mixtral", {"num_key_value_heads": 3}, "tp=1", "not a multiple of num_key_value_heads 3"),
    ("qwen3_moe", {}, "ep=8", r"expert_parallel 8 .*num_experts 4 .*one of \[1, 2, 4\]"),
    ("qwen3_moe", {}, "tp=4", r"tensor_parallel 4 .*num_key_value_heads 2 .*one of \[1, 2\]"),
    ("qwen3_moe", {"attention_bias": True}, "tp=1", "attention_bias True of this Qwen3Moe"),
    ("deepseek_v3", {}, "tp=8", "tensor_parallel 8 does not divide num_attention_heads 4"),
    ("deepseek_v3", {"topk_method": "greedy"}, "tp=1", "topk_method 'greedy'"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "tp=1", "scoring_func 'softmax'"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "tp=1", "moe_layer_freq 2"),
    ("deepseek_v3", {"kv_lora_rank": None}, "tp=1", "kv_lora_rank None .* is no number"),
    ("qwen3", {}, "ep=2", "expert_parallel 2 needs experts"),
]


@pytest.mark.parametrize(("family", "change", "layout", "message"), REFUSED)
def test_what_cannot_be_is_refused_with_what_is_legal(
    family: str, change: dict[str, Any], layout: str, message: str
) -> None:
    config = tiny_config(family, **change)
    with pytest.raises(LayoutError, match=message):
        check_model(family_of(config), Parallel.parse(layout))


def test_configurations_mean_what_they_mean_to_transformers() -> None:
    for name in MOE_FAMILIES:
        config = tiny_config(name)
        left_out = ("norm_topk_prob", "n_group", "topk_group", "n_shared_experts", "q_lora_rank")
        given = {k: v for k, v in config.items() if k not in left_out}
        found: Any = family_of(given)
        theirs = AutoConfig.for_model(**given)
        if name == "deepseek_v3":
            assert (found.router_groups, found.active_groups) == (theirs.n_group, theirs.topk_group)
            assert (found.shared, found.q_rank) == (theirs.n_shared_experts, theirs.q_lora_rank)
        assert found.pre_softmax == (not getattr(theirs, "norm_topk_prob", True))
        assert found.experts == theirs.num_local_experts
        assert found.rope.theta == theirs.rope_parameters["rope_theta"]
    check_layout(tiny_config("mixtral"), 2, 2, 4)
