"""Real Megatron ranks over gloo, with experts on two of them or with chunks of layers on two
stages: what they compute, what a plan gathers from them, and what mbridge exports."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron_ranks import memory_buffers, memory_layout, run_ranks
from megatron_worlds import checkpoint_of, reference
from tiny_models import tiny_config
from transformers import AutoConfig

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.families import padded_vocab_size
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import Model, build_chunks
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.reshard import Layout, plan

DEADLINE = 240.0
LENGTH = 40
EXPERTS = Parallel(expert=2, data=2)
CHUNKS = Parallel(pipeline=2, virtual=2)
CASES = {
    "mixtral": tiny_config("mixtral"),
    "qwen3_moe": tiny_config("qwen3_moe"),  # mbridge knows no dense layers of it
    "deepseek_v3": tiny_config("deepseek_v3"),
}
CHUNKED = {"qwen3": tiny_config("qwen3", num_hidden_layers=4)}


def tokens_of(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(0, 101, (2, LENGTH), generator=generator)


class FusedNames:
    """A chunk as mbridge wants to see it: with the names of Transformer Engine's layers, where
    norms are part of the linear layer after them, and experts share a module."""

    def __init__(self, model: Model) -> None:
        self.decoder, self.vp_stage = model.decoder, model.vp_stage
        self._tensors = dict(model.named_parameters())
        self._extra = {n: t for n, t in model.state_dict().items() if n.endswith("expert_bias")}

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((self._fused(name), tensor) for name, tensor in self._tensors.items())

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**dict(self.named_parameters()), **self._extra}

    def _fused(self, name: str) -> str:
        layer = name[: name.find(".", len("decoder.layers.")) + 1]
        if ".mlp.experts.local_experts." in name:
            head, _, tail = name.partition("local_experts.")
            expert, _, rest = tail.partition(".")
            return f"{head}{rest}{expert}"
        if f"{layer}self_attention.linear_qkv.weight" in self._tensors:
            name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
        if f"{layer}mlp.linear_fc1.weight" in self._tensors:
            name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
        for part in ("q", "kv"):
            if f"{layer}self_attention.linear_{part}_up_proj.weight" in self._tensors:
                name = name.replace(f".{part}_layernorm.", f".linear_{part}_up_proj.layer_norm_")
        return name


def export(chunks: list[Model], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor that mbridge exports, by Hugging Face name."""
    padded = padded_vocab_size(config["vocab_size"], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mbridge import AutoBridge

        theirs = AutoConfig.for_model(**config)
        if config["model_type"] == "deepseek_v3":
            from mbridge.models.deepseek_v3 import DeepseekV3Bridge

            # it reads the names of transformers 4, and names an argument that is gone
            theirs.rope_theta, theirs.rope_scaling = 10000.0, None
            DeepseekV3Bridge.TransformerConfigClass = SimpleNamespace
        bridge = AutoBridge.from_config(
            theirs, dtype=torch.float32, make_vocab_size_divisible_by=padded
        )
    bridge.vocab_size, bridge.padded_vocab_size = config["vocab_size"], padded
    return {
        name: tensor.detach().numpy().copy()
        for name, tensor in bridge.export_weights([FusedNames(chunk) for chunk in chunks])
    }


@torch.no_grad()
def work(rank: int, world: int, port: int, folder: Path, parallel: Parallel, cases: Any) -> None:
    warnings.simplefilter("ignore")
    runtime.join(parallel, rank, "127.0.0.1", port, 0, 120.0)
    for name, config in cases.items():
        chunks = build_chunks(config, torch.float32, parallel=parallel)
        layout, buffers = model_layout(chunks, config, rank), model_buffers(chunks, rank)
        with np.load(folder / f"{name}.npz") as file:
            given = dict(file)
        plan(memory_layout(given), layout).execute(memory_buffers(given), buffers)
        (folder / f"{name}-{rank}.json").write_text(layout.to_json())
        np.savez(folder / f"{name}-{rank}.npz", **{n: b for (_, n), b in buffers.items()})
        np.savez(folder / f"{name}-{rank}-mbridge.npz", **export(chunks, config))
        if len(chunks) == 1:
            tokens = tokens_of(rank)
            logits = chunks[0].eval()(tokens, torch.arange(LENGTH).expand_as(tokens), None)
            np.save(folder / f"{name}-{rank}.npy", logits.numpy())
    runtime.shutdown()


@pytest.fixture(scope="module", params=["experts", "chunks"])
def job(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], dict[str, torch.nn.Module]]:
    """What `work` left behind, and transformers' models of each case."""
    parallel, cases = (EXPERTS, CASES) if request.param == "experts" else (CHUNKS, CHUNKED)
    folder = tmp_path_factory.mktemp(request.param)
    models = {name: reference(config) for name, config in cases.items()}
    for name, model in models.items():
        np.savez(folder / f"{name}.npz", **checkpoint_of(model))
    run_ranks(2, work, folder, parallel, cases, deadline=DEADLINE)
    return folder, cases, models


Job = tuple[Path, dict[str, Any], dict[str, torch.nn.Module]]


def test_a_plan_gathers_what_was_loaded(job: Job) -> None:
    folder, cases, _ = job
    for name in cases:
        layouts, buffers = [], {}
        for rank in range(2):
            layouts.append(Layout.from_json((folder / f"{name}-{rank}.json").read_text()))
            with np.load(folder / f"{name}-{rank}.npz") as held:
                buffers |= {(rank, n): array for n, array in held.items()}
        layout = Layout.merge(layouts)
        found = {t.name: np.full(tuple(t.shape), 9.0, np.float32) for t in layout.tensors}
        plan(layout, memory_layout(found)).execute(buffers, memory_buffers(found))
        with np.load(folder / f"{name}.npz") as given:
            assert given.keys() == found.keys()
            for tensor, array in given.items():
                np.testing.assert_array_equal(found[tensor], array, err_msg=tensor)


def test_mbridge_exports_the_same(job: Job) -> None:
    """Its tables and gathers share no code with a plan."""
    folder, cases, _ = job
    for name in cases:
        with np.load(folder / f"{name}.npz") as given:
            wanted = dict(given)
        for rank in range(2):
            with np.load(folder / f"{name}-{rank}-mbridge.npz") as exported:
                assert exported.keys() == wanted.keys(), name
                for tensor, array in exported.items():
                    np.testing.assert_array_equal(array, wanted[tensor], err_msg=tensor)


@torch.no_grad()
@pytest.mark.parametrize("job", ["experts"], indirect=True)
def test_ranks_with_half_of_the_experts_compute_what_transformers_computes(job: Job) -> None:
    folder, cases, models = job
    for name, config in cases.items():
        for rank in range(2):
            found = torch.from_numpy(np.load(folder / f"{name}-{rank}.npy"))
            found = found[..., : config["vocab_size"]]
            rounded = models[name].float()(tokens_of(rank)).logits
            exact = models[name].double()(tokens_of(rank)).logits
            error, own = (float((logits - exact).abs().max()) for logits in (found, rounded))
            assert exact.std() > 0.5 and own < 1e-4
            assert error < 4 * own, (name, rank)
