"""float8 with block scales against the definition, by loops and PyTorch's own cast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_quantization import quantized_by_loops
from sample_layouts import ITEMSIZE, Buffers, allocate, dense_strides, sharded

from kimisys.errors import BufferMismatchError, LayoutError, NotFiniteError
from kimisys.reshard import (
    Block,
    Buffer,
    Fragment,
    Instance,
    Layout,
    Padding,
    Region,
    SymbolicLayout,
    Tensor,
    plan,
)
from kimisys.reshard.quantize import (
    check_whole_blocks,
    float8_names,
    implementations,
    quantized,
    quantized_symbolic,
    scale_name,
)

SIGNED = {"bfloat16": torch.int16, "float32": torch.int32}


def random_weights(shape: tuple[int, int], dtype: str, seed: int) -> torch.Tensor:
    """Any finite bits, so also denormals and the largest numbers; some rows of ordinary weights."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 1 << (8 * ITEMSIZE[dtype]), shape, np.uint64)
    signed = bits.astype(f"uint{8 * ITEMSIZE[dtype]}").view(f"int{8 * ITEMSIZE[dtype]}")
    weights = torch.from_numpy(signed).view(getattr(torch, dtype)).clone()
    weights[~torch.isfinite(weights)] = 0.0
    ordinary = torch.from_numpy(random.random(shape[0]) < random.random())
    weights[ordinary] = (torch.randn((int(ordinary.sum()), shape[1])) * 0.02).to(weights.dtype)
    return weights


def memory(weights: torch.Tensor) -> np.ndarray:
    found: np.ndarray = weights.contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


def whole(weights: torch.Tensor, order: tuple[int, int] = (0, 1)) -> tuple[Layout, Buffers]:
    """The matrix "w" in one buffer of rank 0; order (1, 0) stores it transposed."""
    dtype = str(weights.dtype).removeprefix("torch.")
    shape = (int(weights.shape[0]), int(weights.shape[1]))
    strides = dense_strides(shape, list(order), ITEMSIZE[dtype])
    layout = Layout(
        [Tensor("w", dtype, shape)],
        [Buffer(0, "w", weights.nbytes)],
        [Fragment("w", Region((0, 0), shape), 0, "w", 0, strides)],
    )
    return layout, {(0, "w"): memory(weights.permute(*order)).copy()}


def quantize_whole(
    weights: torch.Tensor,
    block: tuple[int, int] = (128, 128),
    order: tuple[int, int] = (0, 1),
    **options: object,
) -> tuple[np.ndarray, np.ndarray]:
    layout, sources = whole(weights, order)
    made = quantized(layout, ["w"], block)
    buffers = {key: np.full_like(b, 0xEE) for key, b in made.allocate().items()}
    made.fill(sources, buffers, **options)  # type: ignore[arg-type]
    return buffers[0, "quantized:w"], buffers[0, "scales:w"]


def agrees(found: tuple[np.ndarray, np.ndarray], weights: torch.Tensor, *block: int) -> bool:
    values, scales = quantized_by_loops(weights, (block[0], block[1]))
    return np.array_equal(found[0], memory(values)) and np.array_equal(found[1], memory(scales))


@settings(max_examples=120, deadline=None)
@given(
    st.tuples(st.integers(1, 70), st.integers(1, 200)),
    st.sampled_from([(16, 16), (128, 128), (1, 32), (7, 5), (64, 1)]),
    st.sampled_from(["bfloat16", "float32"]),
    st.sampled_from([(0, 1), (1, 0)]),
    st.integers(0, 3),
    st.integers(0, 2**32),
)
def test_every_bit_is_the_reference_s(
    shape: tuple[int, int],
    block: tuple[int, int],
    dtype: str,
    order: tuple[int, int],
    threads: int,
    seed: int,
) -> None:
    weights = random_weights(shape, dtype, seed)
    for name in implementations():
        options = {"threads": threads, "implementation": name}
        assert agrees(quantize_whole(weights, block, order, **options), weights, *block), name


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(384, 4096 + 72), (130, 2048), (5, 40000)])
def test_large_and_ragged_matrices(shape: tuple[int, int], dtype: str, implementation: str) -> None:
    weights = random_weights(shape, dtype, seed=shape[1])
    found = quantize_whole(weights, threads=2, implementation=implementation)
    assert agrees(found, weights, 128, 128)


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("largest", [448.0, 1.0, 3.0e38, 1e-5, 0.0173])
def test_every_finite_bfloat16(largest: float, implementation: str) -> None:
    """Each pattern in a block whose first element sets the scale."""
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.int16)
    weights = torch.from_numpy(bits).view(torch.bfloat16).clone()
    top = torch.tensor(largest, dtype=torch.bfloat16)
    weights = torch.where(weights.abs() <= top, weights, top).reshape(64, 1024)
    weights[:, 0] = top
    assert agrees(quantize_whole(weights, implementation=implementation), weights, 128, 128)


@pytest.mark.parametrize("implementation", implementations())
def test_every_rounding_of_float8(implementation: str) -> None:
    """float32 numbers at, just above and just below each tie and each float8, at scale one."""
    exact = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([exact, (exact[1:] + exact[:-1]) / 2])
    bits = points.view(torch.int32)
    near = torch.cat([bits - 1, bits, bits + 1]).view(torch.float32)
    near = near[torch.isfinite(near) & (near.abs() <= 448)]
    weights = torch.cat([torch.tensor([448.0]), near, -near])[None]
    values, scales = quantize_whole(weights, (1, weights.shape[1]), implementation=implementation)
    assert scales.view(np.float32)[0] == 1.0
    assert np.array_equal(values, memory(weights.to(torch.float8_e4m3fn)))


def test_a_block_of_zeros_has_a_scale_and_keeps_its_signs() -> None:
    weights = torch.zeros((128, 256), dtype=torch.bfloat16)
    weights[0, 1] = -0.0
    values, scales = quantize_whole(weights)
    assert values[1] == 0x80 and np.count_nonzero(values) == 1
    assert np.all(scales.view(np.float32) == np.float32(1e-4) / np.float32(448))


def grid(dtype: str, shape: tuple[int, int], parts: tuple[int, int], block: int) -> Layout:
    """A matrix over parts[0] x parts[1] ranks, cut at multiples of `block`."""
    buffers, fragments = [], []
    cuts = [
        [min(size, block * (-(-size // block) * i // n)) for i in range(n)] + [size]
        for size, n in zip(shape, parts, strict=True)
    ]
    for rank in range(parts[0] * parts[1]):
        i, j = divmod(rank, parts[1])
        region = Region(
            (cuts[0][i], cuts[1][j]), (cuts[0][i + 1] - cuts[0][i], cuts[1][j + 1] - cuts[1][j])
        )
        strides = dense_strides(region.extent, [0, 1], ITEMSIZE[dtype])
        buffers.append(Buffer(rank, "w", region.elements * ITEMSIZE[dtype]))
        fragments.append(Fragment("w", region, rank, "w", 0, strides))
    return Layout([Tensor("w", dtype, shape)], buffers, fragments)


def float8_grid(shape: tuple[int, int], parts: tuple[int, int], block: int) -> Layout:
    return quantized(grid("bfloat16", shape, parts, block), ["w"], (block, block)).layout


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 80), st.integers(1, 80)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 2**32),
)
def test_each_rank_quantizes_its_own_and_receives_its_own(
    shape: tuple[int, int], source: tuple[int, int], destination: tuple[int, int], seed: int
) -> None:
    """Sharded one way, received in another: the same bits as quantizing the whole."""
    block = 16
    weights = random_weights(shape, "bfloat16", seed)
    live_layout = grid("bfloat16", shape, source, block)
    live = allocate(live_layout)
    one, held = whole(weights)
    plan(one, live_layout).execute(held, live)
    made = quantized(live_layout, lambda tensor: True, (block, block))
    sources: Buffers = {}
    for rank in live_layout.ranks:
        own = quantized(live_layout.of_rank(rank), ["w"], (block, block))
        assert own.layout == made.layout.of_rank(rank)
        buffers = own.allocate()
        own.fill({key: live[key] for key in live if key[0] == rank}, buffers)
        sources |= buffers
    wanted = float8_grid(shape, destination, block)
    assert float8_names(wanted) == ["w"]
    check_whole_blocks(wanted, (block, block))
    landed = allocate(wanted, fill=0xEE)
    plan(made.layout, wanted).execute(sources, landed)
    values, scales = quantized_by_loops(weights, (block, block))
    gathered = float8_grid(shape, (1, 1), block)
    back = allocate(gathered)
    plan(wanted, gathered).execute(landed, back)
    assert np.array_equal(back[0, "quantized:w"], memory(values))
    assert np.array_equal(back[0, "scales:w"], memory(scales))


def test_a_symbolic_layout_is_quantized_block_by_block() -> None:
    """Two layers on two ranks each and an outer block; a rank's part is what the rank makes."""
    layer = grid("bfloat16", (64, 48), (2, 1), 16)
    template = Layout(
        [Tensor("layers.{}.w", "bfloat16", (64, 48)), Tensor("layers.{}.norm", "bfloat16", (48,))],
        [*layer.buffers, Buffer(0, "{}.norm", 96)],
        [
            *(
                Fragment("layers.{}.w", f.region, f.rank, f.buffer, 0, f.byte_strides)
                for f in layer.fragments
            ),
            Fragment("layers.{}.norm", Region((0,), (48,)), 0, "{}.norm", 0, (2,)),
        ],
    )
    template = Layout.from_json(template.to_json().replace('"w"', '"{}.w"'))
    blocks = [
        Block(template, [Instance("0", [0, 1]), Instance("1", [2, 3], "place 0")]),
        Block(sharded("head", "bfloat16", (40, 16), 0, 1), [Instance("", [3])]),
    ]
    source = SymbolicLayout(blocks)
    made = quantized_symbolic(source, ["layers.{}.w", "head"], (16, 16))
    names = {t.name for t in made.tensors}
    assert {"layers.0.w_scale_inv", "layers.1.w", "layers.1.norm", "head_scale_inv"} <= names
    for rank in source.ranks:
        own = source.of_rank(rank)
        chosen = [t.name for t in own.tensors if len(t.shape) == 2]
        assert quantized(own, chosen, (16, 16)).layout == made.of_rank(rank)
    with pytest.raises(LayoutError, match=r"layers\.\{\}\.v are to be quantized"):
        quantized_symbolic(source, ["layers.{}.v"], (16, 16))


def test_what_is_not_chosen_stays_where_it_is() -> None:
    """A fused buffer with padding, of which one tensor is quantized, and one buffer that goes."""
    tensors = [Tensor(name, "bfloat16", (4, 8)) for name in ("a", "b", "c")]
    region = Region((0, 0), (4, 8))
    layout = Layout(
        tensors,
        [Buffer(1, "fused", 136), Buffer(1, "single", 64)],
        [
            Fragment("a", region, 1, "fused", 0, (16, 2)),
            Fragment("b", region, 1, "fused", 64, (16, 2)),
            Fragment("c", region, 1, "single", 0, (16, 2)),
        ],
        [Padding(1, "fused", 128, 8)],
    )
    made = quantized(layout, {"b", "c"}, (4, 4))
    assert [b.name for b in made.layout.buffers] == [
        "fused",
        "quantized:fused",
        "quantized:single",
        "scales:fused",
        "scales:single",
    ]
    assert made.layout.padding == layout.padding
    assert {t.name: (t.dtype, t.shape) for t in made.layout.tensors} == {
        "a": ("bfloat16", (4, 8)),
        "b": ("float8_e4m3fn", (4, 8)),
        "b_scale_inv": ("float32", (1, 2)),
        "c": ("float8_e4m3fn", (4, 8)),
        "c_scale_inv": ("float32", (1, 2)),
    }
    assert quantized(layout, [], (4, 4)).layout == layout


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        (sharded("w", "bfloat16", (128, 64), 0, 2), r"'w', region \[0:64, 0:64\] of rank 0, cuts"),
        (
            sharded("w", "bfloat16", (64, 256), 1, 4),
            r"region \[0:64, 0:64\] of rank 0.*dimension 1",
        ),
        (sharded("w", "bfloat16", (8,), 0, 1), r"'w' is bfloat16\[8\]; only matrices"),
        (sharded("w", "float16", (8, 8), 0, 1), "'w' is float16"),
        (sharded("w", "bfloat16", (2, 8, 8), 0, 1), "only matrices"),
    ],
)
def test_what_has_no_block_scales_is_refused_by_name(layout: Layout, match: str) -> None:
    with pytest.raises(LayoutError, match=match):
        quantized(layout, ["w"])


def test_bad_choices_are_refused_by_name() -> None:
    layout = sharded("w", "bfloat16", (8, 8), 0, 1)
    with pytest.raises(LayoutError, match="tensors v are to be quantized"):
        quantized(layout, ["w", "v"])
    scales = sharded(scale_name("w"), "bfloat16", (8, 8), 0, 1)
    with pytest.raises(LayoutError, match="'w' has scales already, 'w_scale_inv'"):
        quantized(Layout.merge([layout, scales]), ["w"])
    for block in ([128], [0, 128], [128, 128, 128], [1 << 21, 1]):
        with pytest.raises(LayoutError, match="impossible"):
            quantized(layout, ["w"], block)
    made = quantized(layout, ["w"])
    with pytest.raises(LayoutError, match="unknown quantize implementation 'gpu'"):
        made.fill({(0, "w"): np.zeros(128, np.uint8)}, made.allocate(), implementation="gpu")


def test_a_destination_that_cuts_a_block_is_refused_by_name() -> None:
    """Half a block of rows for each of two ranks, as a tensor-parallel slice of 64 rows gives."""
    values = sharded("w", "float8_e4m3fn", (128, 256), 0, 2)
    scales = sharded(scale_name("w"), "float32", (1, 2), 0, 1)
    destination = Layout.merge([values, scales])
    with pytest.raises(LayoutError, match=r"'w', region \[0:64, 0:256\] of rank 0, cuts .*shard"):
        check_whole_blocks(destination)
    check_whole_blocks(destination, (64, 128))
    check_whole_blocks(values)  # float8 without block scales has no blocks to cut


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_number_that_is_not_finite_is_named(
    bad: float, dtype: str, implementation: str
) -> None:
    weights = torch.zeros((300, 2500), dtype=getattr(torch, dtype))
    weights[290, 2400] = bad
    weights[150, 2300] = bad
    layout, sources = whole(weights)
    made = quantized(layout, ["w"])
    buffers = made.allocate()
    with pytest.raises(NotFiniteError, match=r"'w', region.*rank 0, is -?(nan|inf) at .*150, 2300"):
        made.fill(sources, buffers, threads=2, implementation=implementation)
    weights[150, 2300] = weights[290, 2400] = 1.0
    made.fill({(0, "w"): memory(weights)}, buffers, implementation=implementation)
    values, scales = quantized_by_loops(weights, (128, 128))
    assert np.array_equal(buffers[0, "quantized:w"], memory(values))
    assert np.array_equal(buffers[0, "scales:w"], memory(scales))


def test_bad_memory_is_refused_before_anything_is_written() -> None:
    weights = torch.ones((8, 8), dtype=torch.bfloat16)
    layout, sources = whole(weights)
    made = quantized(layout, ["w"])

    def refused(sources: Buffers, change: Buffers, match: str) -> None:
        buffers = made.allocate() | change
        with pytest.raises(BufferMismatchError, match=match):
            made.fill(sources, buffers)
        assert not any(b.any() for key, b in buffers.items() if key not in change)

    refused({}, {}, "source buffer 'w' of rank 0 is missing")
    refused({(0, "w"): np.zeros(3, np.uint8)}, {}, "'w' of rank 0 has 3 bytes")
    fixed = np.zeros(64, np.uint8)
    fixed.flags.writeable = False
    refused(sources, {(0, "quantized:w"): fixed}, "read-only")
    refused(sources, {(0, "quantized:w"): sources[0, "w"][:64]}, "overlaps")
    with pytest.raises(BufferMismatchError, match="'quantized:w' of rank 0 is missing"):
        made.fill(sources, {})
    with pytest.raises(LayoutError, match="threads is -1"):
        made.fill(sources, made.allocate(), threads=-1)
