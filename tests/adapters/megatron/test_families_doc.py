"""The code in docs/families.md does what the page says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_ranks import memory_buffers, memory_layout
from megatron_worlds import asked_layout, assert_comes_back, assert_same_layout, checkpoint_of
from tiny_models import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from kimisys.adapters.megatron import families, runtime
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import build_model
from kimisys.adapters.megatron.offline import offline_layout
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.errors import LayoutError
from kimisys.reshard import plan

PAGE = Path(__file__).parents[3] / "docs" / "families.md"
ADDED, CONVERTER = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
PHI3 = {
    **tiny_config("llama", num_attention_heads=4, hidden_size=128),
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "pad_token_id": 0,
    "sliding_window": None,
    "original_max_position_embeddings": 128,
}


@pytest.fixture
def phi3(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Any]]:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    with pytest.raises(LayoutError, match="'Phi3ForCausalLM' is not supported"):
        families.family_of(PHI3)
    names: dict[str, Any] = {}
    exec(ADDED, names)
    yield names["Phi3"]


def test_a_family_takes_fewer_than_sixty_lines(phi3: type[Any]) -> None:
    assert len(ADDED.splitlines()) < 60
    assert type(families.family_of(PHI3)) is phi3
    assert families.is_registered_elsewhere(PHI3)


@torch.no_grad()
def test_the_added_family_is_transformers_phi3(phi3: type[Any]) -> None:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**PHI3), attn_implementation="eager"
    ).eval()
    given = checkpoint_of(model)
    tokens = torch.arange(40).reshape(2, 20)
    for text in ("tp=2", "tp=1,pp=2"):
        assert_comes_back(asked_layout(PHI3, Parallel.parse(text)))
    with runtime.as_rank(Parallel(), 0):
        ours = build_model(PHI3, torch.float32).eval()
        layout, buffers = model_layout(ours, PHI3, 0), model_buffers(ours, 0)
        assert {t.name: tuple(t.shape) for t in layout.tensors} == {
            name: array.shape for name, array in given.items()
        }
        plan(memory_layout(given), layout).execute(memory_buffers(given), buffers)
        found = ours(tokens, torch.arange(20).expand_as(tokens), None)[..., : PHI3["vocab_size"]]
    torch.testing.assert_close(found, model(tokens).logits)


def test_a_converter_stands_in_for_the_rules() -> None:
    config = tiny_config("llama")
    names: dict[str, Any] = {"hf_config": config, "HEAD_DIM": config["head_dim"]}
    exec(CONVERTER, names)
    known = offline_layout(config, Parallel.parse("tp=2,pp=2"))
    assert_same_layout(names["layout"].concrete(), known.concrete())
    ranks = asked_layout(
        config, Parallel.parse("tp=2,pp=2"), torch.bfloat16, converter=names["convert"]
    )
    assert_same_layout(ranks, known.concrete())


def test_a_converter_that_leaves_elements_out_is_refused() -> None:
    config = tiny_config("llama")

    names: dict[str, Any] = {"hf_config": config, "HEAD_DIM": config["head_dim"]}
    exec(CONVERTER, names)

    def halved(part: str, megatron: Any, hf: Any) -> None:
        if part != "final norm":
            names["convert"](part, megatron, hf)
            return
        for half in hf["weight"].chunk(2):
            half.copy_(megatron["weight"][:32])

    message = r"part 'final norm' reads only 32 of the 64 elements of .*'weight': it must read all"
    with pytest.raises(LayoutError, match=message):
        offline_layout(config, Parallel(), converter=halved)


def test_a_converter_that_does_not_fit_is_refused_by_its_part() -> None:
    config = tiny_config("llama")

    names: dict[str, Any] = {"hf_config": config, "HEAD_DIM": config["head_dim"]}
    exec(CONVERTER, names)

    def convert(part: str, megatron: Any, hf: Any) -> None:
        if part == "final norm":
            megatron = {"weight": megatron["weight"].view(7, -1)}
        names["convert"](part, megatron, hf)

    message = r"the part 'final norm' does not fit Megatron's tensors weight \[64\]: RuntimeError"
    with pytest.raises(LayoutError, match=message):
        offline_layout(config, Parallel(), converter=convert)
