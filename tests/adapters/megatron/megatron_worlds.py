"""Whole Megatron jobs in one process, for tests: layouts need buffers, not processes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.layout import model_layout
from kimisys.adapters.megatron.model import build_chunks
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor, itemsize, plan

Memory = dict[tuple[int, str], np.ndarray]


def asked_layout(
    config: Mapping[str, Any],
    parallel: Parallel,
    dtype: torch.dtype = torch.float32,
    grouped_experts: bool = False,
    **rules: Any,
) -> Layout:
    """Every rank's own answer, merged."""
    layouts = []
    for rank in range(parallel.world_size):
        with runtime.as_rank(parallel, rank):
            chunks = build_chunks(config, dtype, "meta", parallel, grouped_experts)
            layouts.append(model_layout(chunks, config, rank, **rules))
    return Layout.merge(layouts)


def plain_layout(tensors: Sequence[Tensor]) -> Layout:
    """Contiguous tensors on rank 0, one buffer each, under their own names."""
    buffers, fragments = [], []
    for t in tensors:
        shape, size = tuple(t.shape), itemsize(t.dtype)
        strides = [prod(shape[axis + 1 :]) * size for axis in range(len(shape))]
        buffers.append(Buffer(0, t.name, prod(shape) * size))
        fragments.append(Fragment(t.name, Region([0] * len(shape), shape), 0, t.name, 0, strides))
    return Layout(tensors, buffers, fragments)


def memory(layout: Layout, seed: int | None = None) -> Memory:
    """Bytes for every buffer: random with a seed, otherwise 0x7f."""
    random = np.random.default_rng(seed)
    return {
        (b.rank, b.name): np.full(b.nbytes, 0x7F, np.uint8)
        if seed is None
        else random.integers(0, 256, b.nbytes, np.uint8)
        for b in layout.buffers
    }


def assert_comes_back(layout: Layout) -> None:
    """Random bytes in checkpoint order → the ranks of `layout` → checkpoint order: the same."""
    plain = plain_layout(layout.tensors)
    given, ranks, back = memory(plain, seed=3), memory(layout), memory(plain)
    plan(plain, layout).execute(given, ranks)
    plan(layout, plain).execute(ranks, back)
    for key, array in given.items():
        np.testing.assert_array_equal(back[key], array, err_msg=str(key))


def assert_same_layout(one: Layout, other: Layout) -> None:
    """Equal as sets; says what is in one alone."""
    for what in ("tensors", "buffers", "fragments", "padding"):
        mine, theirs = ({repr(item) for item in getattr(x, what)} for x in (one, other))
        assert not mine ^ theirs, (what, sorted(mine - theirs)[:3], sorted(theirs - mine)[:3])
        assert len(getattr(one, what)) == len(getattr(other, what)), what


def reference(config: Mapping[str, Any]) -> torch.nn.Module:
    """transformers' model in float32, every parameter random, norms around one."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), attn_implementation="eager", experts_implementation="eager"
    )
    biases = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *biases]:
            tensor.copy_(0.15 * torch.randn_like(tensor) + (1.0 if "norm" in name else 0.0))
    return model.float().eval()


def checkpoint_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """What transformers' own writer puts into a checkpoint: it names experts one by one."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        [file] = Path(folder).glob("*.safetensors")
        return dict(load_file(file))
