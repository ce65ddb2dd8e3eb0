"""Every family: where its tensors go, and that Megatron computes what transformers computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron_ranks import memory_buffers, memory_layout
from tiny_models import FAMILIES, LLAMA3_ROPE, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.families import check_layout, family_of
from kimisys.adapters.megatron.families.dense import Dense
from kimisys.adapters.megatron.families.rope import Rope
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import build_model
from kimisys.errors import LayoutError
from kimisys.reshard import Layout, plan

POSITIONS = 100

CASES = [f"{family}-{ends}" for family in (*FAMILIES, "llama3") for ends in ("untied", "tied")]


def configuration(case: str) -> dict[str, Any]:
    """ "llama3-tied" and such: llama3 is a Llama with stretched rotary embeddings."""
    family, embeddings = case.split("-")
    if family == "llama3":
        return tiny_config(
            "llama",
            tied=embeddings == "tied",
            rope_parameters=LLAMA3_ROPE,
            max_position_embeddings=131072,
        )
    return tiny_config(family, tied=embeddings == "tied")


def reference(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' model in float32, every parameter random, norms around one."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.15 * torch.randn_like(parameter)
            parameter.copy_(noise + (1.0 if "norm" in name else 0.0))
    return model.float().eval()


def sample(config: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config["vocab_size"], (3, POSITIONS), generator=generator)


def weights_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("shards", "stages"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_comes_back_from_megatron_s_layouts(
    family: str, tied: bool, shards: int, stages: int
) -> None:
    config = tiny_config(family, tied=tied, num_attention_heads=8, num_key_value_heads=4)
    given = weights_of(reference(config))
    layouts = []
    for rank in range(shards * stages):
        with runtime.offline(shards, stages, rank, shards * stages):
            layouts.append(model_layout(build_model(config, torch.float32, "meta"), config, rank))
    layout = Layout.merge(layouts)
    assert {t.name: tuple(t.shape) for t in layout.tensors} == {
        n: a.shape for n, a in given.items()
    }

    ranks = {(b.rank, b.name): np.full(b.nbytes, 0x7F, np.uint8) for b in layout.buffers}
    plan(memory_layout(given), layout).execute(memory_buffers(given), ranks)
    back = {name: np.full_like(array, 9.0) for name, array in given.items()}
    plan(layout, memory_layout(back)).execute(ranks, memory_buffers(back))
    for name, array in given.items():
        np.testing.assert_array_equal(back[name].view(np.int32), array.view(np.int32), name)


def megatron_logits(
    config: dict[str, Any], given: dict[str, np.ndarray], tokens: torch.Tensor
) -> torch.Tensor:
    """Logits float32[b, s, vocab] of one Megatron rank that a plan filled."""
    with runtime.offline(1, 1, 0, 1):
        model = build_model(config, torch.float32)
        layout, buffers = model_layout(model, config, 0), model_buffers(model, 0)
        plan(memory_layout(given), layout).execute(memory_buffers(given), buffers)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits: torch.Tensor = model(tokens, positions, None)
    return logits[..., : config["vocab_size"]]


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    """Both are compared with transformers in float64. In float32 the two sum the same terms in
    different orders, so their errors are of one size; four times that size is the bound."""
    config = configuration(case)
    model, tokens = reference(config), sample(config)
    found, rounded = megatron_logits(config, weights_of(model), tokens), model(tokens).logits
    exact = model.double()(tokens).logits
    error, own = (float((logits - exact).abs().max()) for logits in (found, rounded))
    assert exact.std() > 1 and own < 1e-4
    assert error < 4 * own


@torch.no_grad()
def test_stretched_rotary_embeddings_show_in_the_logits() -> None:
    """Otherwise the comparison above would say nothing about them."""
    config = configuration("llama3-tied")
    given, tokens = weights_of(reference(config)), sample(config)
    plain = {**config, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    halved = {**config, "rope_parameters": {**LLAMA3_ROPE, "factor": 4.0}}
    stretched = megatron_logits(config, given, tokens)
    for other in (plain, halved):
        assert (megatron_logits(other, given, tokens) - stretched).abs().max() > 1e-2


REFUSED = [
    ("llama", {"attention_bias": True}, "attention_bias True of this Llama"),
    ("llama", {"mlp_bias": True}, "mlp_bias True of this Llama"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window True of this Qwen2"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window True of this Qwen3"),
    ("qwen3", {"attention_bias": True}, "attention_bias True of this Qwen3"),
    *((family, {"hidden_act": "gelu"}, "hidden_act 'gelu'") for family in FAMILIES),
    ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5"),
    (
        "llama",
        {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 2.0}},
        r"low_freq_factor 2\.0",
    ),
    ("llama", {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 8}}, "high_freq_factor 8"),
    (
        "llama",
        {"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 4096}},
        r"original_max_position_embeddings 4096 .* always computes with 8192",
    ),
    ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "Llama configuration lacks 'low_freq"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type 'linear'"),
    ("llama", {"architectures": ["MistralForCausalLM"]}, "'MistralForCausalLM' is not supported"),
]


@pytest.mark.parametrize(("family", "change", "message"), REFUSED)
def test_what_cannot_be_honoured_exactly_is_refused_by_name(
    family: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        check_layout(tiny_config(family, **change), 1, 1, 1)


def test_configurations_mean_what_they_mean_to_transformers() -> None:
    """What a configuration leaves out; rotary parameters in the old place and in the new."""

    def family(name: str, *left_out: str, **change: Any) -> Dense:
        config = tiny_config(name, num_attention_heads=8, max_position_embeddings=65536, **change)
        found = family_of({key: value for key, value in config.items() if key not in left_out})
        assert isinstance(found, Dense)
        theirs = AutoConfig.for_model(**{k: v for k, v in config.items() if k not in left_out})
        assert found.groups == theirs.num_key_value_heads
        assert found.rope.theta == theirs.rope_parameters["rope_theta"]
        assert found.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // 8)
        return found

    assert family("llama", "head_dim", hidden_size=128).head_dim == 16
    assert family("llama", "num_key_value_heads").groups == 8
    assert family("qwen3", "head_dim").head_dim == 128
    assert family("qwen2").head_dim == 32
    for name in FAMILIES:
        assert family(name, "rope_parameters").rope == Rope(10000.0)
        assert family(name, "rope_parameters", rope_theta=5e5).rope == Rope(5e5)
        scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
        old = family(name, "rope_parameters", rope_theta=5e5, rope_scaling=scaling)
        assert old.rope == Rope(5e5, 8.0)
        assert family(name, rope_parameters=LLAMA3_ROPE).rope == Rope(10000.0, 8.0)


def test_only_the_norms_of_queries_and_keys_have_partial_gradients() -> None:
    partial = {}
    for name in FAMILIES:
        config = tiny_config(name)
        with runtime.offline(2, 1, 1, 2):
            model = build_model(config, torch.float32, "meta")
        partial[name] = [
            n for n, _ in model.named_parameters() if model.family.has_partial_gradient(n)
        ]
    assert partial["llama"] == partial["qwen2"] == []
    assert partial["qwen3"] == [
        f"decoder.layers.{layer}.self_attention.{kind}_layernorm.weight"
        for layer in (0, 1)
        for kind in "qk"
    ]
