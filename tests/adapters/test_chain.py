"""Hugging Face -> Megatron -> vLLM -> Hugging Face, every family, many layouts of both.

No engine and no trainer runs: layouts need buffers, not processes. The oracles are transformers,
which writes the checkpoint, and vLLM's own loader, which reads it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_worlds import (
    Model,
    Weights,
    assert_same,
    by_destination,
    by_source,
    flat,
    gathered,
    sides,
    table,
    whole,
)
from megatron_worlds import Memory
from naive_quantization import quantized_by_loops
from tiny_checkpoints import write_config

from kimisys.adapters import trace_cache
from kimisys.adapters.megatron.offline import offline_layout
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.adapters.vllm.offline import engine_layout
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.errors import LayoutError
from kimisys.reshard import SymbolicLayout, Tensor, route, symbolic_plan
from kimisys.reshard.quantize import (
    check_whole_blocks,
    float8_names,
    quantized,
    quantized_symbolic,
    scale_name,
)

pytestmark = pytest.mark.filterwarnings("ignore::Warning:megatron")

OPTIONS: dict[str, dict[str, Any]] = {
    "tied llama": {"tied": True},
    "tied qwen2": {"tied": True},
    "tied qwen3": {"tied": True},
    # a dense layer between those with experts
    "qwen3_moe": {"mlp_only_layers": [1]},
}

# Model, Megatron's layout, vLLM's. Not the product: every feature of every side is in some line.
CHAINS = [
    ("llama", "tp=2,pp=2,vpp=2,dp=2", "tp=4"),  # two KV heads, on four ranks
    ("llama", "pp=4", "tp=2,pp=2,dp=2"),
    ("tied llama", "tp=2,pp=3,first=1,last=1,cp=2", "tp=2,pp=2,replicas=2"),
    ("qwen2", "tp=2,cp=2,dp=2", "pp=3"),
    ("tied qwen2", "tp=2,pp=2,first=1", "tp=4,dp=2"),
    ("tied qwen2", "tp=1", "tp=1"),
    ("qwen3", "pp=2,last=1,dp=2", "tp=2,replicas=3"),
    ("qwen3", "tp=2,pp=4,vpp=2,layout=E|t|t||t||t|L", "pp=2,dp=2"),
    ("tied qwen3", "tp=2,pp=2,vpp=2,layout=Ett|t|t|L", "tp=4"),
    ("mixtral", "tp=2,ep=2,etp=1", "tp=2,dp=2,ep=on"),
    ("mixtral", "ep=2,etp=2,pp=2", "tp=4"),
    ("grouped mixtral", "tp=2,pp=2,vpp=2", "dp=2,ep=on,replicas=2"),
    ("qwen3_moe", "tp=2,ep=4,etp=1,pp=2,first=1", "tp=2,dp=2"),
    ("qwen3_moe", "pp=2,vpp=2,ep=2,cp=2", "tp=2,pp=2,dp=2,ep=on"),
    ("grouped qwen3_moe", "tp=2,ep=2,dp=2", "tp=2,ep=on"),
    ("deepseek_v3", "tp=2,ep=2,etp=1,pp=3,first=1,last=1", "tp=2,dp=2,ep=on"),
    ("deepseek_v3", "tp=4,etp=2,ep=2,pp=2,vpp=2", "tp=2,dp=2"),
    ("grouped deepseek_v3", "ep=4,dp=8,pp=2,layout=Et|tttL", "pp=2,tp=2,replicas=2"),
]


class Models:
    """Models by what the table calls them, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Model] = {}

    def __getitem__(self, name: str) -> Model:
        name = name.removeprefix("grouped ")
        if name not in self._made:
            family = name.split()[-1]
            self._made[name] = Model.make(self._folder / name, family, **OPTIONS.get(name, {}))
        return self._made[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", autouse=True)
def no_answer_of_yesterday() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(trace_cache.SWITCH, "off")
        yield


def trained(source: SymbolicLayout, given: Weights) -> Memory:
    """What Megatron's ranks hold of a checkpoint."""
    return by_destination(symbolic_plan(whole(given), source), flat(given))


@pytest.mark.parametrize(("name", "train", "infer"), CHAINS)
def test_what_goes_round_comes_back(models: Models, name: str, train: str, infer: str) -> None:
    model = models[name]
    given = model.given
    source, destination = sides(model.config, train, infer, grouped=name.startswith("grouped"))
    assert table(source) == table(destination) == table(whole(given))
    made = symbolic_plan(source, destination)
    held = trained(source, given)
    landed = by_destination(made, held)
    assert_same(landed, model.loaded(EngineParallel.parse(infer), given))
    assert_same(by_source(made, held), landed)
    assert_same(gathered(destination, landed, given), flat(given))
    assert_same(gathered(source, held, given), flat(given))
    assert made.proof.destination_bytes == sum(array.nbytes for array in landed.values())
    assert made.traffic()["bytes"].sum() == made.proof.copied_bytes

    routed = route(made)
    assert routed.local_bytes == 0
    assert routed.remote_bytes == made.proof.copied_bytes
    simulation = routed.simulate()
    assert 0 < made.proof.copied_bytes / 50e9 / len(made.destination.ranks) < simulation.seconds
    assert math.isfinite(simulation.seconds)


@pytest.mark.parametrize(
    ("name", "train", "infer"),
    [
        ("tied qwen2", "tp=2,pp=2,vpp=2", "tp=2,pp=2"),
        ("deepseek_v3", "tp=2,ep=2,etp=1,pp=2,last=1", "tp=2,dp=2,ep=on"),
    ],
)
def test_float32_masters_arrive_as_vllm_would_round_them(
    models: Models, name: str, train: str, infer: str
) -> None:
    """vLLM reads a float32 checkpoint into bfloat16 parameters: the same bits."""
    model = models[name]
    source, destination = sides(model.config, train, infer, "float32")
    assert table(source) == table(whole(model.masters))
    assert table(destination) == table(whole(model.given))
    made = symbolic_plan(source, destination)
    held = trained(source, model.masters)
    landed = by_destination(made, held)
    assert_same(landed, model.loaded(EngineParallel.parse(infer), model.masters))
    assert_same(by_source(made, held), landed)
    assert_same(gathered(destination, landed, model.given), flat(model.given))


FLOAT8 = {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
}
# Halves of whole blocks, but for 192 rows of kv_a_proj_with_mqa, which nobody cuts: ragged, as
# those of the real model.
WIDE = {
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def is_linear(tensor: Tensor) -> bool:
    """What DeepSeek's checkpoints have in float8: no embedding, head or router."""
    return "_proj" in tensor.name and len(tensor.shape) == 2


def in_float8(given: Weights) -> Weights:
    """A checkpoint in DeepSeek's format, quantized tensor by tensor."""
    made = dict(given)
    for name in (t.name for t in whole(given).tensors if is_linear(t)):
        values, made[scale_name(name)] = quantized_by_loops(given[name], (128, 128))
        made[name] = values.view(torch.float8_e4m3fn)
    return made


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.make(tmp_path_factory.mktemp("wide"), "deepseek_v3", **WIDE)


def filled(source: SymbolicLayout, held: Memory, float8: SymbolicLayout) -> Memory:
    """What each rank has after quantizing its own."""
    made = dict(held)
    for rank in source.ranks:
        step = quantized(source.of_rank(rank), is_linear)
        assert step.layout == float8.of_rank(rank)
        own = step.allocate()
        step.fill({key: array for key, array in held.items() if key[0] == rank}, own)
        made |= own
    return made


@pytest.mark.parametrize(
    ("train", "infer"),
    [
        ("tp=2,ep=2,etp=1,pp=2,first=1", "tp=2,dp=2,ep=on"),
        ("ep=2,etp=2,dp=4", "tp=2,pp=3,replicas=2"),
    ],
)
def test_float8_is_made_where_the_weights_are(
    wide: Model, tmp_path: Path, train: str, infer: str
) -> None:
    """vLLM's loader reads a checkpoint that plain loops have quantized: the same bits."""
    given, parallel = wide.given, EngineParallel.parse(infer)
    reference = in_float8(given)
    source = offline_layout(wide.config, Parallel.parse(train))
    float8 = quantized_symbolic(source, is_linear)
    engine = replace(
        wide,
        folder=write_config(tmp_path, False, "deepseek_v3", **WIDE, **FLOAT8),
        config=wide.config | FLOAT8,
    )
    destination = engine_layout(engine.config, float8.tensors, parallel, "bfloat16")
    assert table(float8) == table(destination) == table(whole(reference))
    wanted = destination.concrete()
    assert set(float8_names(wanted)) == {name for name in given if scale_name(name) in reference}
    check_whole_blocks(wanted)

    made = symbolic_plan(float8, destination)
    held = filled(source, trained(source, given), float8)
    landed = by_destination(made, held)
    loaded = engine.loaded(parallel, reference)
    # vLLM has a default for what is not in the checkpoint: scales of its key-value cache
    defaults = {key for key in loaded if key not in landed}
    assert all(name.endswith("_scale") for _, name in defaults)
    assert_same(landed, {key: array for key, array in loaded.items() if key not in defaults})
    assert_same(by_source(made, held), landed)
    assert_same(gathered(destination, landed, reference), flat(reference))


def test_a_trainer_that_cuts_a_block_is_refused_by_name(wide: Model) -> None:
    """One head of four holds 64 + 128 rows of kv_b_proj: a block and a half."""
    source = offline_layout(wide.config, Parallel.parse("tp=4,ep=4,etp=1"))
    with pytest.raises(LayoutError, match=r"kv_b_proj.*region \[0:192, 0:128\] of rank 0, cuts"):
        quantized_symbolic(source, is_linear)


def test_another_process_makes_the_same_plan(models: Models) -> None:
    """Both sides plan for themselves, from configurations, and compare fingerprints."""
    jobs = [
        ("tied qwen3", "tp=2,pp=2,vpp=2", "tp=2,pp=2"),
        ("deepseek_v3", "tp=2,ep=2,etp=1,pp=2,first=1", "tp=2,dp=2,ep=on,replicas=2"),
    ]
    asked = [(models[name].config, train, infer) for name, train, infer in jobs]
    answer = subprocess.run(
        [sys.executable, Path(__file__).parent / "chain_process.py"],
        input=json.dumps(asked),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "5"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    mine = []
    for config, train, infer in asked:
        source, destination = sides(config, train, infer)
        made = symbolic_plan(source, destination)
        mine.append([source.fingerprint, destination.fingerprint, made.fingerprint])
    assert json.loads(answer.stdout.splitlines()[-1]) == mine
    assert len({fingerprint for each in mine for fingerprint in each}) == 6
