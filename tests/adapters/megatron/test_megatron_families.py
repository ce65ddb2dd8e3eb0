"""Every family: where its tensors go, and that Megatron computes with them what transformers does."""

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
from kimisys.adapters.megatron.families.llama import Llama
from kimisys.adapters.megatron.families.qwen2 import Qwen2
from kimisys.adapters.megatron.families.qwen3 import Qwen3
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import build_model
from kimisys.errors import LayoutError
from kimisys.reshard import Layout, plan

POSITIONS = 100


def configuration(case: str) -> dict[str, Any]:
    """ "llama3-tied" and such: llama3 is a Llama with stretched rotary embeddings."""
    family, embeddings = case.split("-")
    if family == "llama3":
        return tiny_config("llama", tied=embeddings == "tied", rope_parameters=LLAMA3_ROPE)
    return tiny_config(family, tied=embeddings == "tied")


CASES = [f"{family}-{ends}" for family in (*FAMILIES, "llama3") for ends in ("untied", "tied")]


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


def weights_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_comes_back_from_megatron_s_layouts(
    family: str, tied: bool, tensor_parallel: int
) -> None:
    config = tiny_config(family, tied=tied, num_attention_heads=8, num_key_value_heads=4)
    given = weights_of(reference(config))
    layouts = []
    for rank in range(tensor_parallel):
        with runtime.offline(tensor_parallel, rank, tensor_parallel):
            layouts.append(model_layout(build_model(config, torch.float32, "meta"), config, rank))
    layout = Layout.merge(layouts)
    assert {t.name: tuple(t.shape) for t in layout.tensors} == {n: a.shape for n, a in given.items()}

    ranks = {(b.rank, b.name): np.full(b.nbytes, 0x7F, np.uint8) for b in layout.buffers}
    plan(memory_layout(given), layout).execute(memory_buffers(given), ranks)
    back = {name: np.full_like(array, 9.0) for name, array in given.items()}
    plan(layout, memory_layout(back)).execute(ranks, memory_buffers(back))
    for name, array in given.items():
        np.testing.assert_array_equal(back[name].view(np.int32), array.view(np.int32), name)
    parts = [tuple(fragment.region.extent) for fragment in layout.fragments]
    assert len(parts) >= len(given) * tensor_parallel // 2


def megatron_logits(config: dict[str, Any], given: dict[str, np.ndarray], tokens: torch.Tensor):
    with runtime.offline(1, 0, 1):
        model = build_model(config, torch.float32)
        buffers = model_buffers(model, 0)
        plan(memory_layout(given), model_layout(model, config, 0)).execute(
            memory_buffers(given), buffers
        )
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions, None)[..., : config["vocab_size"]]


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    config = configuration(case)
    model = reference(config)
    tokens = torch.randint(
        0, config["vocab_size"], (3, POSITIONS), generator=torch.Generator().manual_seed(1)
    )
    found, wanted = megatron_logits(config, weights_of(model), tokens), model(tokens).logits
    print(case, float((found - wanted).abs().max()), float(wanted.abs().max()), float(wanted.std()))
