"""Layouts of whole jobs from a configuration alone: what every rank would say, without any."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_worlds import asked_layout, assert_same_layout, memory, plain_layout
from tiny_models import FAMILIES, MOE_FAMILIES, tiny_config

import kimisys
from kimisys.adapters.megatron import offline
from kimisys.adapters.megatron.families import family_of
from kimisys.adapters.megatron.offline import offline_layout
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.errors import LayoutError
from kimisys.reshard import SymbolicLayout, plan, symbolic_plan

CONFIGURATIONS = Path(kimisys.__file__).parent / "configurations"
KIMI_K2 = "tp=8,pp=8,ep=32,etp=1,first=7,last=6"

pytestmark = pytest.mark.filterwarnings("ignore::Warning:megatron")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No answer of another test, or of yesterday."""
    monkeypatch.delenv("KIMISYS_TRACE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kimisys"


def shipped(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGURATIONS / f"{name}.json").read_text())
    return config


DENSE_LAYOUTS = [
    "tp=1",
    "tp=2,dp=2",
    "tp=2,cp=2,pp=2",
    "pp=2,vpp=2",
    "pp=4",
    "pp=2,first=1",
    "pp=3,first=2,last=1",
    "pp=2,layout=Et|tttL",
    "pp=2,vpp=2,layout=Ett|t|t|L",
    "pp=4,vpp=2,layout=E|t|t||t||t|L",
    "tp=2,pp=2,vpp=2,dp=2",
]
EXPERT_LAYOUTS = ["ep=2,pp=2", "tp=2,ep=2,etp=1", "tp=2,ep=2,pp=2,first=1", "ep=2,etp=2,tp=1"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("text", DENSE_LAYOUTS)
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_it_is_what_every_rank_says(family: str, text: str, tied: bool) -> None:
    config, parallel = tiny_config(family, tied=tied, num_hidden_layers=4), Parallel.parse(text)
    found = offline_layout(config, parallel, "float32")
    assert_same_layout(found.concrete(), asked_layout(config, parallel))
    assert {block.instances[0].label for block in found.blocks} == {
        "", "0", *(["1"] if family == "deepseek_v3" else []),
    }  # fmt: skip


@pytest.mark.parametrize("grouped", [False, True], ids=["one by one", "grouped"])
@pytest.mark.parametrize("text", EXPERT_LAYOUTS)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_it_is_what_every_rank_says_of_experts(family: str, text: str, grouped: bool) -> None:
    config, parallel = tiny_config(family, num_hidden_layers=4), Parallel.parse(text)
    found = offline_layout(config, parallel, "bfloat16", grouped_experts=grouped)
    asked = asked_layout(config, parallel, torch.bfloat16, grouped)
    assert_same_layout(found.concrete(), asked)
    for rank in range(parallel.world_size):
        own = [repr(f) for f in asked.fragments if f.rank == rank]
        assert sorted(map(repr, found.of_rank(rank).fragments)) == sorted(own)


PIPELINES = [
    "pp=1", "pp=2", "pp=4", "pp=2,vpp=2", "pp=2,first=1", "pp=2,last=1", "pp=3,first=2",
    "pp=3,first=1,last=1", "pp=2,layout=E|ttttL", "pp=2,vpp=2,layout=E|tt|t|tL",
]  # fmt: skip


@st.composite
def jobs(draw: st.DrawFn) -> tuple[str, Parallel]:
    """A family, and a layout that is legal for four layers, heads and experts of it."""
    family = draw(st.sampled_from([*FAMILIES, *MOE_FAMILIES]))
    sizes = {"tp": draw(st.sampled_from([1, 2, 4])), "cp": draw(st.sampled_from([1, 2]))}
    if family in MOE_FAMILIES:
        sizes["ep"] = draw(st.sampled_from([1, 2, 4]))
        sizes["etp"] = draw(st.sampled_from([1, 2, sizes["tp"]]))
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    least = Parallel.parse(f"{text},{draw(st.sampled_from(PIPELINES))}")
    replicas = draw(st.sampled_from([1, 1, 2]))
    return family, dataclasses.replace(least, data=least.data * replicas)


@settings(max_examples=20)
@given(jobs(), st.booleans())
def test_any_legal_layout_plans_onto_a_plain_one_and_back(
    job: tuple[str, Parallel], tied: bool
) -> None:
    family, parallel = job
    config = tiny_config(family, tied=tied, num_hidden_layers=4, num_key_value_heads=4)
    found = offline_layout(config, parallel, "float32")
    plain, concrete = plain_layout(found.tensors), found.concrete()
    assert found.ranks == tuple(range(parallel.world_size))
    given_, ranks, back = memory(plain, seed=1), memory(concrete), memory(plain)
    there = plan(plain, concrete)
    assert there.proof.destination_bytes == found.nbytes == sum(b.nbytes for b in concrete.buffers)
    there.execute(given_, ranks)
    plan(concrete, plain).execute(ranks, back)
    assert all((back[key] == array).all() for key, array in given_.items())


def test_a_symbolic_plan_between_two_jobs_is_the_concrete_one() -> None:
    config = tiny_config("deepseek_v3", num_hidden_layers=4)
    one = offline_layout(config, Parallel.parse("tp=2,pp=2,first=1,ep=2,etp=1"))
    other = offline_layout(config, Parallel.parse("ep=4,pp=2,vpp=2"))
    proof = symbolic_plan(one, other).proof
    spelled = plan(one.concrete(), other.concrete()).proof
    assert (proof.destination_bytes, proof.copies) == (spelled.destination_bytes, spelled.copies)


@pytest.mark.parametrize(
    ("name", "text", "blocks", "tensors", "parameters"),
    [
        ("kimi-k2", KIMI_K2, 3, 69975, 1.026e12),
        ("deepseek-v3", "tp=8,pp=16,ep=32,etp=1,first=4,last=1", 3, 45_395, 0.671e12),
        ("qwen3-235b-a22b", "tp=4,pp=8,ep=16,etp=1,first=11,last=11", 2, None, 0.235e12),
        ("qwen3-0.6b", "tp=2,pp=2,vpp=2", 2, None, 0.596e9),
    ],
)
def test_shipped_configurations_are_the_models_that_they_name(
    name: str, text: str, blocks: int, tensors: int | None, parameters: float
) -> None:
    parallel = Parallel.parse(text)
    found = offline_layout(shipped(name), parallel)
    assert len(found.blocks) == blocks and len(found.ranks) == parallel.world_size
    assert tensors is None or found.tensor_count == tensors
    size = {"bfloat16": 2, "float32": 4}
    counted = sum(
        _bytes(tensor, size) * len(block.instances)
        for block in found.blocks
        for tensor in block.layout.tensors
    )
    assert counted / 2 == pytest.approx(parameters, rel=0.005)


def _bytes(tensor: Any, size: dict[str, int]) -> int:
    count = size[tensor.dtype]
    for extent in tensor.shape:
        count *= extent
    return count


def test_answers_are_kept_and_never_stale(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, parallel = tiny_config("qwen3_moe"), Parallel(expert=2, data=2)
    asked: list[Any] = []
    trace = offline._trace

    def counted(*arguments: Any) -> SymbolicLayout:
        asked.append(arguments)
        return trace(*arguments)

    monkeypatch.setattr(offline, "_trace", counted)
    first = offline_layout(config, parallel)
    assert offline_layout(config, parallel).fingerprint == first.fingerprint
    assert len(asked) == 1 and len(list(own_cache.iterdir())) == 1
    # whatever the answer depends on makes another question
    assert offline_layout({**config, "num_experts": 8}, parallel).fingerprint != first.fingerprint
    offline_layout(config, Parallel(expert=2, data=4))
    offline_layout(config, parallel, "float32")
    offline_layout(config, parallel, grouped_experts=True)
    assert len(asked) == 5
    # what a user's own code says is asked each time
    for _ in range(2):
        offline_layout(config, parallel, family=family_of)
    assert len(asked) == 7
    monkeypatch.setenv("KIMISYS_TRACE_CACHE", "off")
    offline_layout(config, parallel)
    assert len(asked) == 8


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("kimi-k2", "tp=8,pp=8,ep=32,etp=1", "pipeline_parallel 8 does not.*first=7,last=6"),
        ("kimi-k2", "tp=8,pp=8,ep=32,etp=1,first=7", "legal are first=7,last=6"),
        ("kimi-k2", "tp=16,pp=8,ep=36,etp=1,first=7,last=6", r"expert_parallel 36 .*n_routed_expe"),
        ("kimi-k2", "tp=48,pp=1,ep=32,etp=1", "tensor_parallel 48 does not divide num_attention_h"),
        ("qwen3-235b-a22b", "tp=8", r"num_key_value_heads 4 .*one of \[1, 2, 4\]"),
        ("qwen3-0.6b", "ep=2", "needs experts"),
    ],
)
def test_impossible_jobs_are_refused_with_what_is_legal(name: str, text: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        offline_layout(shipped(name), Parallel.parse(text))


def test_what_is_no_dtype_of_parameters_is_refused() -> None:
    with pytest.raises(LayoutError, match="dtype 'nn' is not one of parameters: give bfloat16 or"):
        offline_layout(shipped("qwen3-0.6b"), Parallel(), "nn")
