"""The scatter of a device: on the CPU by numpy, in Triton's interpreter, and compiled for a GPU
that is not here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from compiled import THREADS, compiled
from interpreter import run_interpreted

from kimisys.errors import BufferMismatchError, LayoutError
from kimisys.kernels import scatter_kernel as kernel
from kimisys.kernels.changes import Changes
from kimisys.kernels.scatter import FORCED, bind, implementations
from kimisys.kernels.scatter_table import make_rows, targets_of
from kimisys.reshard import Buffer, Fragment, Layout, Plan, Region, Tensor, plan


def test_in_tritons_interpreter() -> None:
    run_interpreted("interpreted_scatter.py")


def matrix(dtype: str = "float32", parts: int = 1) -> Layout:
    """6 x 8, in columns."""
    size = {"float32": 4, "bfloat16": 2}[dtype]
    columns = 8 // parts
    nbytes = 6 * columns * size
    return Layout(
        [Tensor("w", dtype, [6, 8])],
        [Buffer(rank, "x", nbytes) for rank in range(parts)],
        [Fragment("w", Region([0, rank * columns], [6, columns]), rank, "x", 0,
                  [columns * size, size]) for rank in range(parts)],
    )  # fmt: skip


BLOCKS = [(0, Region([0, 0], [6, 8]))]
DESTINATIONS = {(0, "x"): torch.zeros(6, 4), (1, "x"): torch.zeros(6, 4)}


def made() -> Plan:
    return plan(matrix(), matrix(parts=2))


def test_on_the_cpu_it_is_numpy() -> None:
    destinations = {key: tensor.clone() for key, tensor in DESTINATIONS.items()}
    bits = np.array([1.5, -2.0, 3.0], np.float32).view(np.uint32)
    changes = Changes([np.array([3, 4, 47], np.uint32)], [bits], np.zeros(1, np.uint64))
    bound = bind(made(), 0, BLOCKS, destinations)
    assert bound.measure(changes).any()
    assert bound.run(changes) == 3
    assert not bound.measure(changes).any()
    assert float(destinations[0, "x"][0, 3]) == 1.5
    assert float(destinations[1, "x"][0, 0]) == -2.0
    assert float(destinations[1, "x"][5, 3]) == 3.0
    assert sum(int((t != 0).sum()) for t in destinations.values()) == 3


def test_implementations_are_listed_and_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert implementations("cpu") == ["numpy"]  # nothing interprets Triton here
    assert implementations("cuda") == ["triton"]
    with pytest.raises(LayoutError, match=r"'triton' .* on cpu: there is numpy"):
        bind(made(), 0, BLOCKS, DESTINATIONS, "triton")
    monkeypatch.setenv(FORCED, "quick")
    with pytest.raises(LayoutError, match="'quick'"):
        bind(made(), 0, BLOCKS, DESTINATIONS)


def test_what_does_not_fit_is_refused() -> None:
    first = DESTINATIONS[0, "x"]
    with pytest.raises(BufferMismatchError, match="destination buffer 'x' of rank 1 is missing"):
        bind(made(), 0, BLOCKS, {(0, "x"): first})
    with pytest.raises(BufferMismatchError, match="overlaps"):
        bind(made(), 0, BLOCKS, {(0, "x"): first, (1, "x"): first})
    with pytest.raises(LayoutError, match="published as float32 and rank 0 holds bfloat16"):
        bind(plan(matrix(), matrix("bfloat16")), 0, BLOCKS, {})
    with pytest.raises(LayoutError, match="the share of rank 0 and the changes are of rank 1"):
        bind(made().of_source(0), 1, BLOCKS, DESTINATIONS)
    whole = plan(matrix(), matrix())
    with pytest.raises(LayoutError, match="elements of 4 bytes at addresses that are no multiples"):
        make_rows(whole, targets_of(whole, 0, BLOCKS), {(0, "x"): (1 << 40) + 2})


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("write", [True, False])
def test_it_compiles_for_hopper(width: int, write: bool, tmp_path: Path) -> None:
    signature = {"table": "*i64", "tiles": "*i64", "pitch": "i32", "positions": "*i32",
                 "bits": f"*i{8 * width}", "increments": "*i64", "written": "*i32"}  # fmt: skip
    dtype = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}[width]
    code = compiled(kernel.scatter, signature,
                    {"DTYPE": dtype, "WRITE": write, "TILE": kernel.TILE}, tmp_path)  # fmt: skip
    stores = sum(n for name, n in code.global_accesses.items() if name.startswith("st"))
    assert stores == (kernel.TILE // THREADS if write else 1) + 1
    assert code.spills == 0
