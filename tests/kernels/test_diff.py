"""The diff of a device: on the CPU by the core, in Triton's interpreter, and compiled for a GPU
that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from compiled import THREADS, Compiled, compiled
from interpreter import run_interpreted

from kimisys.broadcast import snapshot_layout
from kimisys.errors import BufferMismatchError, LayoutError
from kimisys.kernels import diff_kernel as kernel
from kimisys.kernels import elements
from kimisys.kernels.diff import FORCED, bind, implementations
from kimisys.kernels.diff_table import make_tables
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor

Tensors = dict[tuple[int, str], torch.Tensor]


def test_in_tritons_interpreter() -> None:
    run_interpreted("interpreted_diff.py")


def matrix(dtype: str = "float32", rows: int = 6, columns: int = 8) -> Layout:
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    return Layout(
        [Tensor("w", dtype, [rows, columns])],
        [Buffer(0, "x", rows * columns * size)],
        [Fragment("w", Region([0, 0], [rows, columns]), 0, "x", 0, [columns * size, size])],
    )


def world() -> tuple[Layout, Layout, Tensors, torch.Tensor]:
    live = matrix()
    snapshot = snapshot_layout(live, "bfloat16")
    weights = torch.arange(48, dtype=torch.float32)
    return live, snapshot, {(0, "x"): weights}, weights.to(torch.bfloat16).view(torch.uint8)


@pytest.mark.parametrize("implementation", [None, *implementations("cpu")])
def test_on_the_cpu_it_is_the_cores(implementation: str | None) -> None:
    live, snapshot, sources, into = world()
    bound = bind(live, snapshot, snapshot, sources, into, implementation)
    assert bound.run().changed == 0
    sources[0, "x"][[3, 40]] = -1.5
    delta = bound.run()
    assert delta.changed == 2
    assert torch.equal(into.view(torch.bfloat16), sources[0, "x"].to(torch.bfloat16))
    assert delta.increments.any() and not bound.run().increments.any()
    assert (implementation or "kimisys.broadcast") in repr(bound)


def test_implementations_are_listed_and_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    live, snapshot, sources, into = world()
    assert "triton" not in implementations("cpu")  # nothing interprets it here
    assert implementations("cuda") == ["triton"]
    with pytest.raises(LayoutError, match=r"'triton'.* on cpu: there is .*naive"):
        bind(live, snapshot, snapshot, sources, into, "triton")
    monkeypatch.setenv(FORCED, "naive")
    assert "naive" in repr(bind(live, snapshot, snapshot, sources, into))
    monkeypatch.setenv(FORCED, "quick")
    with pytest.raises(LayoutError, match="'quick'"):
        bind(live, snapshot, snapshot, sources, into)


def test_tensors_that_do_not_fit_are_refused() -> None:
    live, snapshot, sources, into = world()
    before = into.clone()

    def refused(words: str, source: Tensors = sources, to: torch.Tensor = into) -> None:
        with pytest.raises(BufferMismatchError, match=words):
            bind(live, snapshot, snapshot, source, to)

    refused("live buffer 'x' of rank 0 is missing", {})
    refused("has 188 bytes where the layout says 192", {(0, "x"): torch.ones(47)})
    refused("with strides .*contiguous", {(0, "x"): torch.ones(8, 6).t()})
    refused("tensors on meta", {(0, "x"): torch.ones(48, device="meta")})
    refused("the snapshot of rank 0 is torch.uint8 of 95 bytes", to=torch.zeros(95).byte())
    refused("torch.float32 of 96 bytes", to=torch.zeros(24))
    shared = torch.zeros(192, dtype=torch.uint8)
    refused("overlaps", {(0, "x"): shared}, shared[:96])
    refused("is on meta .* cannot reach", to=into.to("meta"))
    assert torch.equal(into, before)


def test_layouts_that_do_not_fit_are_refused() -> None:
    live = matrix()

    def refused(words: str, snapshot: Layout, counted: Layout | None = None, odd: int = 0) -> None:
        with pytest.raises(LayoutError, match=words):
            make_tables(live, snapshot, counted or snapshot, [(0, snapshot.fragments[0].region)],
                        {"x": (1 << 40) + odd}, 1 << 41, kernel.TILE)  # fmt: skip

    half = Fragment("w", Region([0, 0], [3, 8]), 0, "x", 0, [16, 2])
    smaller = Layout([Tensor("w", "bfloat16", [6, 8])], [Buffer(0, "x", 48)], [half])
    refused(r"tensor 'w' \[0:3, 0:8\] of rank 0 is in the snapshot and not among the live", smaller)
    refused("is float32 and published as float16; only", matrix("float16"))
    refused("has elements of 4 bytes at addresses that are no multiples", matrix(), odd=2)
    elsewhere = Layout([Tensor("w", "bfloat16", [6, 8])], [Buffer(0, "x", 100)],
                       [Fragment("w", Region([0, 0], [3, 8]), 0, "x", 4, [16, 2])])  # fmt: skip
    refused("counts in the digests of rank 0 and is in no fragment", matrix("bfloat16"), elsewhere)


BLOCKS = {"table": "*i64", "tiles": "*i32", "pitch": "i32"}
UNSIGNED = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}


def find(live: int, wire: int, lanes: int, words: int, folder: Path) -> Compiled:
    constants = {"FROM": UNSIGNED[live], "TO": UNSIGNED[wire], "LANES": lanes, "WORDS": words}
    return compiled(kernel.find, {**BLOCKS, "masks": "*u8", "counts": "*i32"},
                    {**constants, "TILE": kernel.TILE}, folder)  # fmt: skip


@pytest.mark.parametrize(
    ("live", "wire", "lanes", "loads"),
    [
        (2, 2, 8, {"v4.b32": 8}),
        (4, 2, 4, {"v4.b32": 8, "v2.b32": 8}),
        (2, 4, 4, {"v4.b32": 8, "v2.b32": 8}),
        (4, 4, 4, {"v4.b32": 16}),
        (8, 8, 2, {"v2.b64": 16}),
        (1, 1, 8, {"v2.b32": 8}),
        (4, 2, 1, {"b32": 8, "b16": 8}),
    ],
)
def test_find_compiles_for_hopper_and_reads_whole_words(
    live: int, wire: int, lanes: int, loads: dict[str, int], tmp_path: Path
) -> None:
    """Each thread has all of its words in flight, up to eight of each side, and none is spilled."""
    words = min(kernel.WORDS, kernel.TILE // lanes)
    made = find(live, wire, lanes, words, tmp_path)
    assert sum(loads.values()) == 2 * words // THREADS
    for width, count in loads.items():
        assert made.global_accesses[f"ld.global.{width}"] >= count
    # Besides: columns of the row, and the tile's number.
    narrower = {"ld.global.b8", "ld.global.b16"} - {f"ld.global.{width}" for width in loads}
    assert not narrower & made.global_accesses.keys()
    assert made.spills == 0


def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    assert find(4, 2, 1, kernel.TILE, tmp_path).spills > 0


@pytest.mark.parametrize("lanes", [8, 4, 2, 1])
def test_list_positions_compiles_for_hopper(lanes: int, tmp_path: Path) -> None:
    signature = {**BLOCKS, "masks": "*u8", "ends": "*i64", "positions": "*i32"}
    made = compiled(kernel.list_positions, signature, {"LANES": lanes, "TILE": kernel.TILE},
                    tmp_path)  # fmt: skip
    assert made.global_accesses["st.global.b32"] == kernel.TILE // THREADS
    assert made.spills == 0


@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize(("live", "wire"), [(4, 2), (2, 2), (2, 4), (4, 4), (8, 8), (1, 1)])
def test_take_compiles_for_hopper(live: int, wire: int, boxes: bool, tmp_path: Path) -> None:
    lists = {"boxes": "*i64", "counts": "*i32", "ends": "*i64", "positions": "*i32",
             "bits": f"*i{8 * wire}", "increments": "*i64"}  # fmt: skip
    constants: dict[str, Any] = {"FROM": UNSIGNED[live], "TO": UNSIGNED[wire], "HAS_BOXES": boxes}
    sizes = {"TAKEN": kernel.TAKEN, "TILE": kernel.TILE}
    made = compiled(kernel.take, {**BLOCKS, **lists}, {**constants, **sizes}, tmp_path)
    # The snapshot, the bits, and a tile's increment.
    stores = sum(n for name, n in made.global_accesses.items() if name.startswith("st"))
    assert stores == 2 * kernel.TAKEN // THREADS + 1
    assert made.spills == 0


def test_division_by_multiplication_is_exact() -> None:
    """At both ends of every quotient, for all extents of a block and of some dimensions."""
    largest = 1 << 18
    near = {n + d for n in (1 << np.arange(1, 19)) for d in (-1, 0, 1)} & set(range(1, largest + 1))
    for extent in sorted(near | set(range(1, largest + 1, 997))):
        first = np.arange(0, largest, extent, dtype=np.int64)
        for place in (first, np.minimum(first + extent - 1, largest - 1)):
            np.testing.assert_array_equal(place * elements.magic(extent) >> elements.DIVISION,
                                          place // extent)  # fmt: skip


def test_dimensions_without_a_seam_are_one_axis() -> None:
    live = matrix("bfloat16", 64, 96)
    blocks = [(0, Region([0, 0], [64, 96])), (0, Region([0, 48], [64, 48]))]
    (table,) = make_tables(live, live, live, blocks, {"x": 1 << 40}, 1 << 41, kernel.TILE)
    np.testing.assert_array_equal(table.rows[:, kernel.AXES], [1, 2])
    assert table.lanes == 8
