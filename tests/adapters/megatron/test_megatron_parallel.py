"""How ranks are laid out: what can be, what is said of what cannot, and who sits where."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_ranks import TINY

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.core import moe_utils, parallel_state, random_states
from kimisys.adapters.megatron.families import check_model, family_of
from kimisys.adapters.megatron.model import build_model
from kimisys.adapters.megatron.offline import offline_layout
from kimisys.adapters.megatron.parallel import Parallel, check_stages
from kimisys.adapters.megatron.seats import Seat, seats
from kimisys.errors import LayoutError

KIMI_K2 = "tp=8,pp=8,ep=32,etp=1,first=7,last=6"


def test_the_world_follows_from_the_sizes() -> None:
    kimi = Parallel.parse(KIMI_K2)
    assert kimi == Parallel(8, 8, None, 32, 1, 1, 4, 7, 6)
    assert (kimi.stage_size, kimi.world_size) == (32, 256)
    assert Parallel.parse(KIMI_K2 + ",world=512").data == 8
    assert Parallel.parse("") == Parallel()
    assert Parallel.parse("tp=2, cp=2, dp=3").world_size == 12
    # experts are split as the rest is, unless etp says otherwise
    assert Parallel.parse("tp=8,pp=16,ep=32").world_size == 8 * 32 * 16
    assert Parallel.parse("tp=8,pp=16,ep=32,etp=1").world_size == 512


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=0", "tensor '0' is not possible: it must be a number, at least 1"),
        ("tp=two", "tensor 'two' is not possible"),
        ("tp=\uff12", "tensor '\uff12' is not possible"),
        ("tq=2", r"'tq=2' of 'tq=2' is not understood: write each of tp, pp, vpp, .*, world at mo"),
        ("tp=2,tp=4", "'tp=4' of 'tp=2,tp=4' is not understood"),
        ("tp", "'tp' of 'tp' is not understood"),
        ("tp=4,world=6", "world 6 is not divisible by 4, which is the least for 'tp=4,world=6'"),
        ("tp=2,dp=2,world=8", "world 8 is not tp 2 x cp 1 x dp 2 x pp 1 = 4: leave one"),
        ("tp=2,ep=4,etp=1,dp=3", "a pipeline stage has 6 ranks .* data may be a multiple of 2"),
        ("vpp=2", "virtual 2 chunks need a pipeline of at least 2 stages"),
        ("pp=2,vpp=1", "virtual 1 is no interleaving"),
        ("first=2", "first, last and pipeline_layout say how stages differ, but pipeline is 1"),
        ("pp=2,first=2,layout=Et|tL", "leave first and last out beside it"),
    ],
)
def test_texts_that_are_no_layout_are_refused(text: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Parallel.parse(text)


@pytest.mark.parametrize(
    ("text", "layers", "message"),
    [
        ("pp=3", 4, r"pipeline_parallel 3 does not divide num_hidden_layers 4.*one of \[1, 2, 4\]"),
        ("pp=8", 61, "pipeline_parallel 8 does not divide num_hidden_layers 61.*first and last"),
        ("pp=8,first=7", 61, "61 layers less 7 at the ends cannot be split evenly over 7 stages:"
                             " legal are first=7,last=6 or first=10,last=9"),
        ("pp=2,first=3,last=2", 4, "are not the 4 layers .*: first 3 goes with last 1"),
        ("pp=2,vpp=2,first=3", 4, "first 3 is not divisible by virtual 2 chunks"),
        ("pp=2,vpp=3", 4, "4 layers cannot be split evenly over 2 stages of 3 chunks"),
        ("pp=4,first=4", 4, "cannot be split evenly over 3 stages"),
        ("pp=2,layout=Ett|tL", 4, "does not fit 2 stages of 4 layers: .*legal is for example 'Ett"),
        ("pp=2,layout=Etx|ttL", 4, "does not fit 2 stages of 4 layers"),
        ("pp=2,layout=Et|t|tL", 3, "does not fit 2 stages of 3 layers"),
        ("pp=2,layout=Et|t|t|tL", 4, r"^pipeline_layout .* has 2 chunks for each of 2 stages, but "
                                      r"virtual is None: say virtual 2$"),
        ("pp=2,layout=Ett|ttmL", 4, "does not fit"),
        ("pp=2,layout=|", 4, "does not fit 2 stages of 4 layers: .*legal is for example 'Ett"),
        ("pp=2,layout=", 4, "does not fit 2 stages of 4 layers"),
    ],
)  # fmt: skip
def test_layers_that_do_not_split_are_refused(text: str, layers: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check_stages(Parallel.parse(text), layers)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        (KIMI_K2, 61),
        ("pp=8,first=10,last=9", 61),
        ("pp=2,vpp=2", 4),
        ("pp=4,first=1", 4),
        ("pp=2,layout=E|tttL", 3),
        ("pp=2,vpp=2,layout=Ett|t*3|tt|L", 7),
    ],
)
def test_layers_that_split(text: str, layers: int) -> None:
    check_stages(Parallel.parse(text), layers)


SIZES = st.sampled_from([1, 2, 3, 4])


@settings(max_examples=40)
@given(SIZES, SIZES, SIZES, SIZES, st.sampled_from([1, 2]), st.sampled_from([1, 2]))
def test_what_is_parsed_can_be_written_back(
    tensor: int, pipeline: int, expert: int, expert_tensor: int, context: int, replicas: int
) -> None:
    text = f"tp={tensor},pp={pipeline},ep={expert},etp={expert_tensor},cp={context}"
    least = Parallel.parse(text)
    world = least.world_size * replicas
    assert world % (tensor * pipeline * context) == world % (expert * expert_tensor * pipeline) == 0
    again = Parallel.parse(f"{text},world={world}")
    assert again == dataclasses.replace(least, data=least.data * replicas)
    assert Parallel.parse(f"{text},dp={again.data}") == again
    for fewer in range(1, least.data):
        with pytest.raises(LayoutError, match="data may be a multiple"):
            dataclasses.replace(least, data=fewer)


@pytest.mark.parametrize(
    "text",
    [
        "tp=2,pp=2,dp=2",
        "tp=2,ep=4,etp=1,pp=2",
        "tp=2,ep=2,etp=2,cp=2",
        "ep=2,etp=2,tp=1,pp=2,vpp=2",
        "tp=4,ep=3,etp=2",
    ],
)
def test_seats_are_those_that_each_rank_is_told(text: str) -> None:
    parallel = Parallel.parse(text)
    told = []
    for rank in range(parallel.world_size):
        with runtime.as_rank(parallel, rank):
            told.append(
                Seat(
                    parallel_state.get_tensor_model_parallel_rank(),
                    parallel_state.get_expert_model_parallel_rank(),
                    parallel_state.get_expert_tensor_parallel_rank(),
                    parallel_state.get_pipeline_model_parallel_rank(),
                )
            )
    assert seats(parallel) == told


def test_asking_leaves_what_torch_and_megatron_answer_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that asks for a layout may use CUDA afterwards."""

    def theirs(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.Tensor, "cuda", theirs)
    monkeypatch.setattr(torch.cuda, "synchronize", theirs)
    monkeypatch.setattr(random_states, "_CUDA_RNG_STATE_TRACKER", None)
    monkeypatch.setattr(random_states, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", False)
    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    offline_layout(TINY, Parallel())
    with runtime.as_rank(Parallel(tensor=2), 1):
        build_model(TINY, torch.float32, "meta")
        assert torch.cuda.synchronize is not theirs and torch.zeros(1).cuda().device.type == "cpu"
    assert torch.Tensor.cuda is torch.cuda.synchronize is theirs
    assert random_states._CUDA_RNG_STATE_TRACKER is None
    assert not random_states._CUDA_RNG_STATE_TRACKER_INITIALIZED
    assert not hasattr(moe_utils, "te_general_gemm")
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ


def test_a_model_is_built_for_the_groups_that_there_are() -> None:
    with runtime.as_rank(Parallel(tensor=2), 0):
        with pytest.raises(LayoutError, match=r"it asks for tensor 1, not 2; .*runtime\.join"):
            build_model(TINY, torch.float32, "meta", Parallel())
        build_model(TINY, torch.float32, "meta", Parallel(tensor=2))
    with runtime.as_rank(Parallel(pipeline=2, virtual=2), 1):
        config = {**TINY, "num_hidden_layers": 4}
        with pytest.raises(LayoutError, match=r"this stage has 2 chunks .*call build_chunks"):
            build_model(config, torch.float32, "meta")
    with pytest.raises(LayoutError, match="expert_parallel 2 needs experts"):
        check_model(family_of(TINY), Parallel(expert=2, data=2))
