"""Layouts in the shape of Kimi-K2, by hand: for measuring the planner without any framework.

61 layers, the first dense; 384 routed experts of width 2048; hidden size 7168; bfloat16. Besides
the experts each layer has one attention weight, replicated where tensor parallelism does not cut
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kimisys.reshard import Block, Buffer, Instance, Layout, Place, SymbolicLayout, Tensor

HIDDEN, WIDTH, EXPERTS, LAYERS = 7168, 2048, 384, 61
SHAPES = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
ATTENTION = (16384, 1536)
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Fragments of one side as columns, and the buffers that they lie in."""

    buffers: list[Buffer]
    tensor: list[int]
    buffer: list[int]
    offset: list[tuple[int, int]]
    extent: list[tuple[int, int]]
    byte_offset: list[int]
    byte_strides: list[tuple[int, int]]

    @staticmethod
    def none() -> Rows:
        return Rows([], [], [], [], [], [], [])

    def add_buffer(self, rank: int, name: str, nbytes: int) -> int:
        self.buffers.append(Buffer(rank, name, nbytes))
        return len(self.buffers) - 1

    def add(
        self,
        tensor: int,
        buffer: int,
        offset: tuple[int, int],
        extent: tuple[int, int],
        byte_offset: int,
        row: int,
    ) -> None:
        self.tensor.append(tensor)
        self.buffer.append(buffer)
        self.offset.append(offset)
        self.extent.append(extent)
        self.byte_offset.append(byte_offset)
        self.byte_strides.append((row * 2, 2))

    def layout(self, tensors: list[Tensor]) -> Layout:
        return Layout.from_arrays(
            tensors,
            self.buffers,
            np.array(self.tensor),
            np.array(self.buffer),
            np.array(self.offset).reshape(-1, 2),
            np.array(self.extent).reshape(-1, 2),
            np.array(self.byte_offset),
            np.array(self.byte_strides).reshape(-1, 2),
        )


def expert_tensors() -> list[Tensor]:
    """Tensor 3 e + k is the k-th projection of expert e."""
    return [
        Tensor(f"model.layers.{{}}.mlp.experts.{e}.{name}.weight", "bfloat16", shape)
        for e in range(EXPERTS)
        for name, shape in SHAPES.items()
    ]


ATTENTION_TENSOR = Tensor("model.layers.{}.self_attn.q_b_proj.weight", "bfloat16", ATTENTION)


def add_attention(rows: Rows, tensor: int, rank: int, part: int, parts: int) -> None:
    size = ATTENTION[0] // parts
    buffer = rows.add_buffer(rank, "layers.{}.q_b_proj", size * ATTENTION[1] * 2)
    rows.add(tensor, buffer, (part * size, 0), (size, ATTENTION[1]), 0, ATTENTION[1])


def training_experts(rows: Rows, ranks: int, expert: int) -> None:
    """Whole experts over `expert` ranks, further ranks as replicas; gate and up in one buffer."""
    each = EXPERTS // expert
    for rank in range(ranks):
        for e in range(rank % expert * each, (rank % expert + 1) * each):
            fc1 = rows.add_buffer(rank, f"layers.{{}}.fc1.{e % each}", 2 * WIDTH * HIDDEN * 2)
            fc2 = rows.add_buffer(rank, f"layers.{{}}.fc2.{e % each}", HIDDEN * WIDTH * 2)
            rows.add(3 * e, fc1, (0, 0), (WIDTH, HIDDEN), 0, HIDDEN)
            rows.add(3 * e + 1, fc1, (0, 0), (WIDTH, HIDDEN), WIDTH * HIDDEN * 2, HIDDEN)
            rows.add(3 * e + 2, fc2, (0, 0), (HIDDEN, WIDTH), 0, WIDTH)


def inference_experts(rows: Rows, ranks: int, expert: int, slices: int) -> None:
    """Stacked w13 and w2, EXPERTS / expert experts to a rank, each cut into `slices`."""
    each, width = EXPERTS // expert, WIDTH // slices
    for rank in range(ranks):
        part, group = rank % slices, rank // slices % expert
        w13 = rows.add_buffer(rank, "layers.{}.w13", each * 2 * width * HIDDEN * 2)
        w2 = rows.add_buffer(rank, "layers.{}.w2", each * HIDDEN * width * 2)
        for local in range(each):
            e = group * each + local
            one, cut = width * HIDDEN * 2, (part * width, 0)
            rows.add(3 * e, w13, cut, (width, HIDDEN), 2 * local * one, HIDDEN)
            rows.add(3 * e + 1, w13, cut, (width, HIDDEN), (2 * local + 1) * one, HIDDEN)
            rows.add(3 * e + 2, w2, (0, part * width), (HIDDEN, width), local * one, width)


def places(ranks: int, first_node: int) -> list[Place]:
    """Eight devices to a node, a NIC for each."""
    return [Place(rank, first_node + rank // 8, rank % 8, rank % 8) for rank in range(ranks)]


def stages(pipeline: int, ranks: int) -> list[range]:
    """The ranks of each of the 60 MoE layers, in stages of nearly equal length."""
    bounds = [60 * stage // pipeline for stage in range(pipeline + 1)]
    return [
        range(stage * ranks, (stage + 1) * ranks)
        for stage in range(pipeline)
        for _ in range(bounds[stage], bounds[stage + 1])
    ]


def training(
    tensor: int = 8, pipeline: int = 8, expert: int = 32, data: int = 1, attention: bool = True
) -> SymbolicLayout:
    """expert * pipeline * data ranks; the dense layer is left out, MoE layers are 1 to 60."""
    ranks = expert * data
    rows, tensors = Rows.none(), expert_tensors()
    training_experts(rows, ranks, expert)
    if attention:
        tensors.append(ATTENTION_TENSOR)
        for rank in range(ranks):
            add_attention(rows, 3 * EXPERTS, rank, rank % tensor, tensor)
    instances = [
        Instance(str(layer), list(stage))
        for layer, stage in enumerate(stages(pipeline, ranks), start=1)
    ]
    return SymbolicLayout([Block(rows.layout(tensors), instances)], places(ranks * pipeline, 0))


def inference(
    ranks: int = 128, expert: int = 128, slices: int = 1, tensor: int = 16, attention: bool = True
) -> SymbolicLayout:
    """Experts over `expert` groups of `slices` ranks; what is left of `ranks` are replicas."""
    rows, tensors = Rows.none(), expert_tensors()
    inference_experts(rows, ranks, expert, slices)
    if attention:
        tensors.append(ATTENTION_TENSOR)
        for rank in range(ranks):
            add_attention(rows, 3 * EXPERTS, rank, rank % tensor, tensor)
    instances = [Instance(str(layer), range(ranks)) for layer in range(1, LAYERS)]
    return SymbolicLayout([Block(rows.layout(tensors), instances)], places(ranks, 1000))
