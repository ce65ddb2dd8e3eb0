"""bfloat16 or float32 weights as float8_e4m3fn with block scales, computed where the weights are.

DeepSeek's format (config.json: quantization_config with weight_block_size [128, 128]): a matrix
``X`` of shape [rows, columns] becomes float8_e4m3fn of the same shape, and ``X_scale_inv`` becomes
float32 [ceil(rows / 128), ceil(columns / 128)], such that X ~ value * scale_inv, block by block.

``quantized`` derives from a source layout the one in which the chosen tensors are replaced, in new
buffers; ``Quantization.fill`` computes those. A plan then moves bytes as always, each destination
rank receiving its own values and scales::

    fp8 = quantized(source, float8_names(destination))     # once
    check_whole_blocks(destination)
    plan = kimisys.reshard.plan(fp8.layout, destination)   # once
    made = fp8.allocate()                                  # once
    fp8.fill(live, made)                                   # each step
    plan.execute({**live, **made}, engine)                 # each step

Numbers, all in float32: scale_inv = max(amax, 1e-4) / 448, value = x * (1 / scale_inv) rounded to
the nearest float8, ties to even. This is ``per_block_cast_to_fp8`` of DeepGEMM (deep_gemm/utils)
and of vLLM (vllm/utils/deep_gemm.py), bit for bit on a CPU; the floor of 1e-4 serves blocks of
zeros, and costs blocks that lie below it precision. No value exceeds 448, so nothing saturates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

import kimisys._core.reshard as _core
from kimisys._core.reshard import quantize_implementations as implementations
from kimisys.errors import LayoutError
from kimisys.reshard import (
    Block,
    Buffer,
    Fragment,
    Layout,
    Region,
    SymbolicLayout,
    Tensor,
    itemsize,
)

__all__ = [
    "Quantization",
    "check_whole_blocks",
    "float8_names",
    "implementations",
    "quantized",
    "quantized_symbolic",
    "scale_name",
]

Bytes = npt.NDArray[np.uint8]
BlockShape = tuple[int, int]

VALUES, SCALES = "float8_e4m3fn", "float32"
# What is made is named after the source's buffer, not after the tensor: an instance of a symbolic
# block labels tensors and buffers differently, and a rank must find its own in the whole plan.
_VALUES_OF, _SCALES_OF = "quantized:", "scales:"


def scale_name(tensor: str) -> str:
    """The name of the scales of a tensor: "X.weight_scale_inv" for "X.weight"."""
    return f"{tensor}_scale_inv"


@dataclass(frozen=True)
class Quantization:
    """A source layout and what is made of it.

    source: the layout given. layout: the derived one, to plan from. made: the new buffers, two for
    each of the source's that holds chosen tensors; the rest of ``layout`` is buffers of the source.
    block: (rows, columns).
    """

    source: Layout
    layout: Layout
    made: tuple[Buffer, ...]
    block: BlockShape
    _quantizer: _core.Quantizer = field(repr=False, compare=False)

    def allocate(self) -> dict[tuple[int, str], Bytes]:
        """New memory for ``made``: {(rank, name): uint8[nbytes]}, zeros."""
        return {(b.rank, b.name): np.zeros(b.nbytes, np.uint8) for b in self.made}

    def fill(
        self,
        sources: Mapping[tuple[int, str], Any],
        quantized: Mapping[tuple[int, str], Any],
        threads: int = 0,
        implementation: str | None = None,
    ) -> None:
        """Compute the values and scales of all chosen tensors from their live memory.

        sources: the source layout's buffers, of which those of chosen tensors are read, once.
        quantized: memory for ``made``, all of which is written. Both from (rank, name) to
        C-contiguous buffers of exactly the layout's size; further entries are ignored.
        threads: 0 means all that the process may use. implementation: one of implementations(),
        the first by default; KIMISYS_RESHARD_IMPLEMENTATION forces one.
        BufferMismatchError: memory is missing, of another size, read-only or overlapping; nothing
        is written then. NotFiniteError: a weight is NaN or infinite; it names the tensor and the
        first such element. The quantized memory then holds old and new blocks: it is staging that
        nobody reads before a plan runs, so do not run one, and fill again when the weights are
        mended. LayoutError: threads is negative or the implementation unknown. Releases the GIL.
        """
        self._quantizer.fill(sources, quantized, threads, implementation)


def quantized(
    source: Layout,
    names: Collection[str] | Callable[[Tensor], bool],
    block: Sequence[int] = (128, 128),
) -> Quantization:
    """The layout that remains when chosen matrices of ``source`` are quantized where they are.

    source: any layout, of one rank or of many; the result for a rank is the same. names: names of
    the tensors, all of which must be in its table, or a predicate. block: sizes of a block in rows
    and columns, config.json's weight_block_size.
    Fragments of chosen tensors get new dense buffers, two for each buffer that holds any: its name
    with "quantized:" and with "scales:" before it. Buffers of which nothing else is left disappear
    from the layout.
    LayoutError, naming tensor, region and rank: a fragment cuts a block, the tensor is no matrix of
    bfloat16 or float32, it is unknown, or its scales exist already.
    """
    rows, columns = _checked_block(block)
    chosen = _choose(source.tensors, names)
    tensors = [tensor for tensor in source.tensors if tensor.name not in chosen]
    for tensor in chosen.values():
        tensors += _quantized_tensors(tensor, (rows, columns))
    _core.check_whole_blocks(source, set(chosen), rows, columns)
    parts: list[tuple[int, int, int]] = []
    fragments: list[Fragment] = []
    sizes: dict[tuple[int, str], int] = {}
    for index, fragment in enumerate(source.fragments):
        if fragment.tensor not in chosen:
            fragments.append(fragment)
            continue
        parts.append((index, len(fragments), len(fragments) + 1))
        extent = fragment.region.extent
        offset = [o // b for o, b in zip(fragment.region.offset, (rows, columns), strict=True)]
        scales = [-(-e // b) for e, b in zip(extent, (rows, columns), strict=True)]
        key = (fragment.rank, _VALUES_OF + fragment.buffer)
        fragments.append(_dense(fragment.tensor, fragment.region, key, VALUES, sizes))
        name, key = scale_name(fragment.tensor), (fragment.rank, _SCALES_OF + fragment.buffer)
        fragments.append(_dense(name, Region(offset, scales), key, SCALES, sizes))
    made = tuple(Buffer(rank, name, nbytes) for (rank, name), nbytes in sizes.items())
    left = {(f.rank, f.buffer) for f in source.fragments if f.tensor not in chosen}
    kept = [b for b in source.buffers if (b.rank, b.name) in left]
    padding = [p for p in source.padding if (p.rank, p.buffer) in left]
    layout = Layout(tensors, [*kept, *made], fragments, padding, source.places)
    quantizer = _core.Quantizer(source, layout, parts, rows, columns)
    return Quantization(source, layout, made, (rows, columns), quantizer)


def quantized_symbolic(
    source: SymbolicLayout,
    names: Collection[str] | Callable[[Tensor], bool],
    block: Sequence[int] = (128, 128),
) -> SymbolicLayout:
    """``quantized(...).layout`` block by block of a symbolic layout, to plan from.

    names: of the blocks' tensors, so with "{}" where a layer's number stands, or a predicate on
    them. What a rank fills is ``quantized(source.of_rank(rank), ...)``, whose layout is this one's
    ``of_rank(rank)``. Errors are those of ``quantized``.
    """
    tables = [layout_block.layout.tensors for layout_block in source.blocks]
    chosen = _choose([tensor for table in tables for tensor in table], names)
    made = [
        Block(
            quantized(
                b.layout, [t.name for t in b.layout.tensors if t.name in chosen], block
            ).layout,
            b.instances,
        )
        for b in source.blocks
    ]
    return SymbolicLayout(made, source.places)


def float8_names(destination: Layout) -> list[str]:
    """Names of the tensors that a destination wants as float8 values with block scales."""
    held = {tensor.name: tensor.dtype for tensor in destination.tensors}
    return [
        name
        for name, dtype in held.items()
        if dtype == VALUES and held.get(scale_name(name)) == SCALES
    ]


def check_whole_blocks(destination: Layout, block: Sequence[int] = (128, 128)) -> None:
    """Raise LayoutError, naming tensor, region and rank, for a fragment of a float8 tensor with
    block scales that cuts a block: the block's one scale would belong to two fragments.

    Call it before planning: a plan moves bytes, and does not know of blocks."""
    rows, columns = _checked_block(block)
    _core.check_whole_blocks(destination, set(float8_names(destination)), rows, columns)


def _checked_block(block: Sequence[int]) -> BlockShape:
    if len(block) != 2 or any(size < 1 for size in block):
        raise LayoutError(
            f"weight_block_size {list(block)} is impossible; give two positive sizes, as [128, 128]"
        )
    return int(block[0]), int(block[1])


def _choose(
    tensors: Iterable[Tensor], names: Collection[str] | Callable[[Tensor], bool]
) -> dict[str, Tensor]:
    table = {tensor.name: tensor for tensor in tensors}
    if callable(names):
        chosen = {name: tensor for name, tensor in table.items() if names(tensor)}
    else:
        unknown = sorted(set(names) - set(table))
        if unknown:
            raise LayoutError(
                f"tensors {', '.join(unknown[:8])} are to be quantized but are not in the layout; "
                "choose among its tensors"
            )
        chosen = {name: table[name] for name in table if name in set(names)}
    for name in chosen:
        if scale_name(name) in table:
            raise LayoutError(
                f"tensor {name!r} has scales already, {scale_name(name)!r}: it cannot be quantized "
                "twice; leave it out of the choice"
            )
    return chosen


def _quantized_tensors(tensor: Tensor, block: BlockShape) -> list[Tensor]:
    if len(tensor.shape) != 2 or tensor.dtype not in ("bfloat16", "float32"):
        raise LayoutError(
            f"tensor {tensor.name!r} is {tensor.dtype}{list(tensor.shape)}; only matrices of "
            "bfloat16 or float32 can be quantized by blocks: choose other tensors"
        )
    scales = [-(-size // part) for size, part in zip(tensor.shape, block, strict=True)]
    return [
        Tensor(tensor.name, VALUES, tensor.shape),
        Tensor(scale_name(tensor.name), SCALES, scales),
    ]


def _dense(
    tensor: str, region: Region, key: tuple[int, str], dtype: str, sizes: dict[tuple[int, str], int]
) -> Fragment:
    """A dense fragment at the end of the new buffer `key`: (rank, name)."""
    item, start = itemsize(dtype), sizes.setdefault(key, 0)
    sizes[key] += region.elements * item
    return Fragment(tensor, region, *key, start, [region.extent[1] * item, item])
