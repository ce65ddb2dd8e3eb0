"""mbridge's export of real Megatron ranks against ours: every tensor, bit for bit.

mbridge gathers over tensor-parallel ranks, broadcasts over pipeline stages and converts by its own
tables, so it shares no code with a plan. Without Transformer Engine it needs two favours: the norms
of Megatron's local layer spec go by the names that the fused layers would give them, and the padded
vocabulary, which it otherwise learns from building the model itself, is told to it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_ranks import memory_buffers, memory_layout, run_ranks
from tiny_models import FAMILIES, tiny_config
from transformers import AutoConfig

from bench.sync.fused_names import FusedNames
from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.core import parallel_state
from kimisys.adapters.megatron.families import padded_vocab_size
from kimisys.adapters.megatron.gradients import is_sharded
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import Model, build_model
from kimisys.reshard import Layout, plan

DEADLINE = 240.0
# Untied ones first: mbridge notes in a table of the class, for good, that a Qwen's embeddings are
# tied, and would export every later model of that class as tied.
CASES = [(family, tied) for tied in (False, True) for family in FAMILIES]


def export(model: Model, config: dict[str, Any], tensor_parallel: int) -> dict[str, np.ndarray]:
    """Every tensor that mbridge exports, by Hugging Face name."""
    padded = padded_vocab_size(config["vocab_size"], tensor_parallel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mbridge import AutoBridge

        bridge = AutoBridge.from_config(
            AutoConfig.for_model(**config), dtype=torch.float32, make_vocab_size_divisible_by=padded
        )
    bridge.vocab_size, bridge.padded_vocab_size = config["vocab_size"], padded
    exported: dict[str, np.ndarray] = {}
    for name, tensor in bridge.export_weights([FusedNames(model)]):
        array = tensor.detach().numpy().copy()
        # a tied embedding that two stages hold comes from both
        assert np.array_equal(exported.setdefault(name, array), array), (
            f"{name} came twice, and differs"
        )
    return exported


@torch.no_grad()
def randomize(model: Model) -> None:
    """Every parameter, padding of the vocabulary and biases too. Copies that several ranks hold
    are alike: replicated parameters, and a tied embedding on the first and the last stage."""
    tied = model.share_embeddings_and_output_weights
    shard = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    for name, parameter in model.named_parameters():
        if tied and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        where = (shard if is_sharded(parameter) else -1, stage if "layers" in name else -1)
        generator = np.random.default_rng(list(f"{name} {where}".encode()))
        noise = generator.standard_normal(parameter.shape, np.float32)
        parameter.copy_(torch.from_numpy(noise))


def work(rank: int, world: int, port: int, folder: Path, stages: int) -> None:
    shards = world // stages
    runtime.initialize(shards, stages, rank, world, "127.0.0.1", port, 0, 120.0)
    for family, tied in CASES:
        config = tiny_config(family, tied=tied)
        model = build_model(config, torch.float32)
        randomize(model)
        stem = f"{family}-{tied}-{rank}"
        buffers = {name: array for (_, name), array in model_buffers(model, rank).items()}
        (folder / f"{stem}.json").write_text(model_layout(model, config, rank).to_json())
        np.savez(folder / f"{stem}.npz", **buffers)
        np.savez(folder / f"{stem}-mbridge.npz", **export(model, config, shards))
    runtime.shutdown()


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)], ids=["tp2", "pp2"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `work` left behind with so many shards and stages."""
    shards, stages = request.param
    folder = tmp_path_factory.mktemp(f"mbridge-{shards}-{stages}")
    run_ranks(shards * stages, work, folder, stages, deadline=DEADLINE)
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_writes_what_mbridge_exports(ranks: Path, family: str, tied: bool) -> None:
    layouts, buffers = [], {}
    for path in sorted(ranks.glob(f"{family}-{tied}-*.json")):
        layouts.append(Layout.from_json(path.read_text()))
        rank = int(path.stem.rpartition("-")[2])
        with np.load(path.with_suffix(".npz")) as held:
            buffers |= {(rank, name): array for name, array in held.items()}
    layout = Layout.merge(layouts)
    written = {t.name: np.full(tuple(t.shape), 9.0, np.float32) for t in layout.tensors}
    plan(layout, memory_layout(written)).execute(buffers, memory_buffers(written))

    exports = sorted(ranks.glob(f"{family}-{tied}-*-mbridge.npz"))
    assert len(exports) == len(layouts) == 2
    for path in exports:
        with np.load(path) as saved:
            exported = dict(saved)
        if tied:  # a Llama's second copy of the embedding goes by the name of the output head
            written.setdefault("lm_head.weight", written["model.embed_tokens.weight"])
            exported.setdefault("lm_head.weight", exported["model.embed_tokens.weight"])
        assert exported.keys() == written.keys()
        for name, array in written.items():
            np.testing.assert_array_equal(array.view(np.int32), exported[name].view(np.int32), name)
