"""mbridge's export of real Megatron ranks against ours: every tensor, bit for bit.

mbridge gathers over the tensor-parallel ranks and converts by its own tables, so it shares no code
with a plan. Without Transformer Engine it needs two favours: the norms of Megatron's local layer
spec go by the names that the fused layers would give them, and the padded vocabulary, which it
otherwise learns from building the model itself, is told to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_ranks import memory_buffers, memory_layout, run_ranks
from tiny_models import FAMILIES, tiny_config
from transformers import AutoConfig

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.families import padded_vocab_size
from kimisys.adapters.megatron.gradients import is_sharded
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import Model, build_model
from kimisys.reshard import Layout, plan

DEADLINE = 240.0
# Untied ones first: mbridge notes in a table of the class, for good, that a Qwen's embeddings are
# tied, and would export every later model of that class as tied.
CASES = [(family, tied) for tied in (False, True) for family in FAMILIES]
FUSED_NAMES = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
"""As in megatron-core's own `sharded_state_dict_keys_map` of the local layer spec."""


class FusedNames:
    """What mbridge asks of a model, with its norms under the names of Transformer Engine's."""

    def __init__(self, model: Model) -> None:
        self._model, self.decoder = model, model.decoder

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self._model.named_parameters():
            for local, fused in FUSED_NAMES.items():
                name = name.replace(local, fused)
            yield name, parameter

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.named_parameters())


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
        assert name not in exported, f"{name} was exported twice"
        exported[name] = tensor.detach().numpy().copy()
    return exported


@torch.no_grad()
def randomize(model: Model, rank: int) -> None:
    """Every parameter, padding of the vocabulary and biases too; replicated ones alike."""
    for position, parameter in enumerate(model.parameters()):
        seed = position * 16 + (rank if is_sharded(parameter) else 0)
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))


def work(rank: int, world: int, port: int, folder: Path) -> None:
    runtime.initialize(world, 1, rank, world, "127.0.0.1", port, 0, 120.0)
    for family, tied in CASES:
        config = tiny_config(family, tied=tied)
        model = build_model(config, torch.float32)
        randomize(model, rank)
        stem = f"{family}-{tied}-{rank}"
        (folder / f"{stem}.json").write_text(model_layout(model, config, rank).to_json())
        np.savez(
            folder / f"{stem}.npz", **{n: a for (_, n), a in model_buffers(model, rank).items()}
        )
        np.savez(folder / f"{stem}-mbridge.npz", **export(model, config, world))
    runtime.shutdown()


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `work` left behind at this tensor-parallel size."""
    folder = tmp_path_factory.mktemp(f"mbridge-tp{request.param}")
    run_ranks(request.param, work, folder, deadline=DEADLINE)
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
    assert len(exports) == len(layouts)
    for path in exports:
        with np.load(path) as exported:
            assert set(exported.files) == written.keys()
            for name, array in written.items():
                np.testing.assert_array_equal(
                    array.view(np.int32), exported[name].view(np.int32), name
                )
