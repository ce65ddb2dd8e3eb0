"""Layouts of Megatron models, asked offline: any rank of any world in this one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron_ranks import TINY, free_port, memory_buffers, memory_layout
from tiny_models import FAMILIES, tiny_config

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.families import (
    check_layout,
    family_of,
    implementations,
    padded_vocab_size,
)
from kimisys.adapters.megatron.families.qwen3 import Qwen3
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import build_model
from kimisys.errors import LayoutError
from kimisys.reshard import Layout, plan

FOUR_GROUPS = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 29}


def offline_layout(
    config: dict[str, Any], tensor_parallel: int, pipeline_parallel: int = 1
) -> Layout:
    layouts, world = [], tensor_parallel * pipeline_parallel
    for rank in range(world):
        with runtime.offline(tensor_parallel, pipeline_parallel, rank, world):
            layouts.append(model_layout(build_model(config, torch.float32, "meta"), config, rank))
    return Layout.merge(layouts)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def config(request: pytest.FixtureRequest, tied: bool) -> dict[str, Any]:
    return tiny_config(request.param, tied=tied, **FOUR_GROUPS)


@pytest.mark.parametrize("pipeline_parallel", [1, 2])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_layout_holds_every_element_exactly_once(
    config: dict[str, Any], tensor_parallel: int, pipeline_parallel: int
) -> None:
    layout = offline_layout(config, tensor_parallel, pipeline_parallel)
    assert list(layout.tensors) == sorted(
        family_of(config).hf_tensors("float32"), key=lambda t: t.name
    )
    held = {tensor.name: np.zeros(tuple(tensor.shape), dtype=int) for tensor in layout.tensors}
    for fragment in layout.cover().fragments:
        region = fragment.region
        box = tuple(slice(o, o + e) for o, e in zip(region.offset, region.extent, strict=True))
        held[fragment.tensor][box] += 1
    assert all((count == 1).all() for count in held.values())


@pytest.mark.parametrize("pipeline_parallel", [1, 2])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_every_parameter_byte_is_an_element_or_padding(
    config: dict[str, Any], tensor_parallel: int, pipeline_parallel: int
) -> None:
    """As a destination the layout must be provable; its padding is that of the vocabulary alone."""
    layout = offline_layout(config, tensor_parallel, pipeline_parallel)
    proof = plan(offline_layout(config, 1), layout).proof
    rows = padded_vocab_size(29, tensor_parallel) - 29
    # a tied embedding has a second copy where the first and the last stage are two
    tables = 1 if config["tie_word_embeddings"] and pipeline_parallel == 1 else 2
    assert proof.padding_bytes == rows * config["hidden_size"] * 4 * tables
    assert proof.destination_bytes == sum(buffer.nbytes for buffer in layout.buffers)


@pytest.mark.parametrize("pipeline_parallel", [1, 2])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_weights_survive_the_way_through_the_ranks_to_the_bit(
    config: dict[str, Any], tensor_parallel: int, pipeline_parallel: int
) -> None:
    """Hugging Face → ranks → Hugging Face, and both copies of a tied embedding are equal."""
    random, world = np.random.default_rng(2), tensor_parallel * pipeline_parallel
    arrays = {
        t.name: random.standard_normal(tuple(t.shape), np.float32)
        for t in family_of(config).hf_tensors("float32")
    }
    layouts, buffers = [], {}
    for rank in range(world):
        with runtime.offline(tensor_parallel, pipeline_parallel, rank, world):
            model = build_model(config, torch.float32)
            layouts.append(model_layout(model, config, rank))
            buffers |= model_buffers(model, rank)
    merged = Layout.merge(layouts)
    plan(memory_layout(arrays), merged).execute(memory_buffers(arrays), buffers)
    returned = {name: np.zeros_like(array) for name, array in arrays.items()}
    plan(merged, memory_layout(returned)).execute(buffers, memory_buffers(returned))
    for name, array in arrays.items():
        np.testing.assert_array_equal(returned[name], array, err_msg=name)
    for rank in range(tensor_parallel):
        if config["tie_word_embeddings"] and pipeline_parallel > 1:
            last = world - tensor_parallel + rank
            first = buffers[rank, "embedding.word_embeddings.weight"]
            np.testing.assert_array_equal(buffers[last, "output_layer.weight"], first)


def test_a_stage_holds_its_own_layers() -> None:
    layout = offline_layout({**TINY, "num_hidden_layers": 4}, 1, 2)
    for rank, layers in ((0, {"0", "1"}), (1, {"2", "3"})):
        names = [f.tensor for f in layout.fragments if f.rank == rank]
        assert {name.split(".")[2] for name in names if "layers" in name} == layers
    ends = {f.tensor: f.rank for f in layout.fragments if "layers" not in f.tensor}
    assert ends == {"model.embed_tokens.weight": 0, "model.norm.weight": 1, "lm_head.weight": 1}


def test_a_rank_may_hold_nothing_but_padding() -> None:
    config = tiny_config("qwen3", **FOUR_GROUPS | {"vocab_size": 17})
    layout = offline_layout(config, 4)
    rows = {(p.rank, p.buffer): p.nbytes // (64 * 4) for p in layout.padding}
    assert rows[2, "output_layer.weight"] == 7
    assert rows[3, "output_layer.weight"] == 8
    assert plan(offline_layout(config, 1), layout).proof.padding_bytes == 2 * 15 * 64 * 4


def test_fused_rows_come_from_where_hugging_face_keeps_them() -> None:
    """Megatron's QKV of a rank, row for row, against indices written out by hand."""
    config = tiny_config("qwen2")
    with runtime.offline(2, 1, 1, 2):
        model = build_model(config, torch.float32)
        layout, buffers = model_layout(model, config, 1), model_buffers(model, 1)
    arrays = {
        t.name: np.full(tuple(t.shape), -1, dtype=np.float32)
        for t in family_of(config).hf_tensors("float32")
    }
    for kind, start in (("q", 0), ("k", 1000), ("v", 2000)):
        for part in ("weight", "bias"):
            rows = arrays[f"model.layers.1.self_attn.{kind}_proj.{part}"]
            rows.T[:] = start + np.arange(len(rows))
    plan(memory_layout(arrays), layout).execute(memory_buffers(arrays), buffers)
    qkv = model.decoder.layers[1].self_attention.linear_qkv
    # rank 1 holds KV head 1: query heads 2 and 3, key head 1, value head 1, of 32 rows each
    wanted = [*range(64, 128), *range(1032, 1064), *range(2032, 2064)]
    assert qkv.weight.detach()[:, 0].int().tolist() == wanted
    assert qkv.bias.detach().int().tolist() == wanted


def test_one_seed_is_one_model_at_every_size() -> None:
    models = []
    for tensor_parallel in (1, 2):
        layouts, buffers = [], {}
        for rank in range(tensor_parallel):
            with runtime.offline(tensor_parallel, 1, rank, tensor_parallel):
                torch.manual_seed(5)
                model = build_model(TINY, torch.float32)
                layouts.append(model_layout(model, TINY, rank))
                buffers |= model_buffers(model, rank)
        arrays = {
            t.name: np.zeros(tuple(t.shape), np.float32)
            for t in family_of(TINY).hf_tensors("float32")
        }
        gather = plan(Layout.merge(layouts), memory_layout(arrays))
        gather.execute(buffers, memory_buffers(arrays))
        models.append(arrays)
    for name, array in models[0].items():
        np.testing.assert_array_equal(models[1][name], array, err_msg=name)
        assert array.any()


def test_bfloat16_parameters_are_bytes_too() -> None:
    with runtime.offline(1, 1, 0, 1):
        model = build_model(TINY, torch.bfloat16)
        layout, buffers = model_layout(model, TINY, 0), model_buffers(model, 0)
    assert {tensor.dtype for tensor in layout.tensors} == {"bfloat16"}
    weight = dict(model.named_parameters())["decoder.final_layernorm.weight"]
    view = buffers[0, "decoder.final_layernorm.weight"]
    assert view.dtype == np.uint8 and view.nbytes == weight.nbytes == 128
    view[:] = 0
    assert not weight.any()
    assert {(b.rank, b.name): b.nbytes for b in layout.buffers} == {
        key: array.nbytes for key, array in buffers.items()
    }


@pytest.mark.parametrize(
    ("change", "tensor_parallel", "world", "message"),
    [
        (
            {},
            2,
            3,
            r"world_size 3 is not .* tensor_parallel 2 .*of \[\(1, 1\), \(1, 3\), \(3, 1\)\]",
        ),
        ({}, 0, 1, "must all be at least 1"),
        ({}, 4, 4, r"does not divide num_key_value_heads 2 .*one of \[1, 2\]"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, 4, 4, "num_attention_heads 6 and"),
        ({"intermediate_size": 97}, 2, 2, r"does not divide intermediate_size 97 .*one of \[1\]"),
        ({"num_key_value_heads": 3}, 1, 1, "not a multiple of num_key_value_heads 3"),
        ({"architectures": ["OPTForCausalLM"]}, 1, 1, "'OPTForCausalLM' is not supported"),
        ({"architectures": None}, 1, 1, "must be one of: DeepseekV3ForCausalLM, Llama"),
        ({"attention_bias": True}, 1, 1, "attention_bias True"),
        ({"use_sliding_window": True}, 1, 1, "use_sliding_window True"),
        ({"hidden_act": "gelu"}, 1, 1, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_theta": 1.0, "rope_type": "yarn"}}, 1, 1, "rope_type 'yarn'"),
    ],
)
def test_impossible_layouts_are_refused_with_what_is_legal(
    change: dict[str, Any], tensor_parallel: int, world: int, message: str
) -> None:
    config = {**TINY, **change}
    with pytest.raises(LayoutError, match=message):
        check_layout(config, tensor_parallel, 1, world)
    with pytest.raises(LayoutError, match=message):
        runtime.initialize(tensor_parallel, 1, 0, world, "127.0.0.1", free_port(), 0, 5.0, config)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("pipeline_parallel", "world", "message"),
    [
        (3, 3, r"pipeline_parallel 3 does not divide num_hidden_layers 4.*one of \[1, 2, 4\]"),
        (2, 3, r"world_size 3 is not divisible by tensor_parallel 1 times pipeline_parallel 2"),
        (0, 1, "must all be at least 1"),
    ],
)
def test_impossible_pipelines_are_refused_with_what_is_legal(
    pipeline_parallel: int, world: int, message: str
) -> None:
    config = {**TINY, "num_hidden_layers": 4}
    with pytest.raises(LayoutError, match=message):
        check_layout(config, 1, pipeline_parallel, world)
    with pytest.raises(LayoutError, match=message):
        runtime.initialize(1, pipeline_parallel, 0, world, "127.0.0.1", free_port(), 0, 5.0, config)
    if pipeline_parallel == 3:  # the world is possible, the model is not
        with runtime.offline(1, 3, 0, 3), pytest.raises(LayoutError, match=message):
            build_model(config, torch.float32, "meta")


def test_a_configuration_with_a_hole_is_refused() -> None:
    config = {name: value for name, value in TINY.items() if name != "num_key_value_heads"}
    with pytest.raises(LayoutError, match="lacks 'num_key_value_heads'"):
        family_of(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", None),
        ("num_attention_heads", "many"),
        ("num_attention_heads", 0),
        ("num_hidden_layers", [2]),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", None),
        ("initializer_range", {}),
        ("vocab_size", float("inf")),
        ("rope_parameters", "long"),
        ("rope_parameters", {"rope_theta": None}),
    ],
)
def test_what_should_be_a_number_and_is_none_is_refused_by_name(name: str, value: object) -> None:
    key = "rope_theta" if isinstance(value, dict) and value else name
    if value == 0:  # no head has no size either
        key = "head_dim"
    with pytest.raises(LayoutError, match=f"^{key} .*config.json"):
        family_of({**TINY, "head_dim": None, name: value})


def test_a_machine_with_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime.offline(1, 1, 0, 1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(LayoutError, match="CUDA_VISIBLE_DEVICES="):
            build_model(TINY, torch.float32)


def test_older_configurations_keep_rope_at_the_top() -> None:
    config = {k: v for k, v in TINY.items() if k != "rope_parameters"}
    family = family_of({**config, "rope_theta": 5e5, "rope_scaling": None})
    assert isinstance(family, Qwen3) and family.rope.theta == 5e5
    with pytest.raises(LayoutError, match="rope_type 'yarn'"):
        family_of({**config, "rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}})


def test_a_model_needs_process_groups_first() -> None:
    with pytest.raises(LayoutError, match=r"call runtime\.initialize first"):
        build_model(TINY, torch.float32)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"rank 2 is not one of the 2 ranks 0\.\.1"):
        runtime.initialize(2, 1, 2, 2, "127.0.0.1", free_port(), 0)


def test_a_missing_rank_is_named() -> None:
    with pytest.raises(TimeoutError, match="for rank 1, which did not come"):
        runtime.initialize(2, 1, 0, 2, "127.0.0.1", free_port(), 0, timeout_seconds=0.5)
    with pytest.raises(TimeoutError, match=r"rank 1 of 2 waited 0\.5 s for rank 0"):
        runtime.initialize(2, 1, 1, 2, "127.0.0.1", free_port(), 0, timeout_seconds=0.5)


def test_architectures_are_listed() -> None:
    assert implementations() == [
        "DeepseekV3ForCausalLM",
        "LlamaForCausalLM",
        "MixtralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    ]
