"""The strided copies of a device: on the CPU, in Triton's interpreter, and compiled for a GPU that
is not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_layouts import sharded
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kimisys._core.reshard import copy_table
from kimisys.errors import BufferMismatchError, LayoutError
from kimisys.kernels import strided_copy_kernel as kernel
from kimisys.kernels.strided_copy import FORCED, bind, implementations
from kimisys.reshard import Plan, plan

HERE = Path(__file__).parent
HOPPER = GPUTarget("cuda", 90, 32)

Tensors = dict[tuple[int, str], torch.Tensor]


def columns_to_rows() -> tuple[Plan, Tensors, Tensors]:
    """A float32 matrix in two column shards, into two row shards."""
    made = plan(sharded("w", "float32", (6, 8), 1, 2), sharded("w", "float32", (6, 8), 0, 2))
    whole = torch.arange(48, dtype=torch.float32).view(6, 8)
    sources = {(rank, "w"): part.contiguous() for rank, part in enumerate(whole.split(4, dim=1))}
    return made, sources, {(rank, "w"): torch.full((3, 8), -1.0) for rank in range(2)}


def test_in_tritons_interpreter() -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, str(HERE / "interpreted_strided_copy.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parent.parent, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in ", run.stdout, re.MULTILINE), run.stdout


@pytest.mark.parametrize("implementation", [None, *implementations("cpu")])
def test_on_the_cpu_it_is_the_executor(implementation: str | None) -> None:
    made, sources, destinations = columns_to_rows()
    bound = bind(made, sources, destinations, implementation)
    for _ in range(2):
        destinations[0, "w"].fill_(-1)
        bound.run()
        whole = torch.cat([destinations[0, "w"], destinations[1, "w"]])
        assert torch.equal(whole, torch.arange(48, dtype=torch.float32).view(6, 8))
    assert "4 copies, 192 bytes" in repr(bound)


def test_implementations_are_listed_and_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sources, destinations = columns_to_rows()
    assert "triton" not in implementations("cpu")  # nothing interprets it here
    assert implementations("cuda") == ["triton"]
    with pytest.raises(LayoutError, match=r"'triton'.* on cpu: there is .*naive"):
        bind(made, sources, destinations, "triton")
    monkeypatch.setenv(FORCED, "naive")
    assert "naive" in repr(bind(made, sources, destinations))
    monkeypatch.setenv(FORCED, "quick")
    with pytest.raises(LayoutError, match="'quick'"):
        bind(made, sources, destinations)
    assert "generic" in repr(bind(made, sources, destinations, "generic"))


def test_tensors_that_do_not_fit_are_refused() -> None:
    made, sources, destinations = columns_to_rows()

    def refused(words: str, *, source: Tensors = sources, to: Tensors = destinations) -> None:
        with pytest.raises(BufferMismatchError, match=words):
            bind(made, source, to)

    key = (1, "w")
    refused("source buffer 'w' of rank 1 is missing", source={(0, "w"): sources[0, "w"]})
    refused("rank 1 has 92 bytes where the layout says 96", to=destinations | {key: torch.ones(23)})
    crooked = {key: torch.ones(8, 3).t()}
    refused("destination buffer 'w' of rank 1 is a tensor of .*contiguous", to=crooked)
    refused("overlaps", to=destinations | {key: destinations[0, "w"]})
    elsewhere = {key: torch.ones(3, 8, device="meta")}
    refused("rank 1 is on meta, and source buffer 'w' of rank 0 on cpu", to=elsewhere)
    assert (destinations[0, "w"] == -1).all()


def test_the_table_is_checked_as_memory_of_the_host_is() -> None:
    made, sources, _ = columns_to_rows()
    given = {key: (tensor.data_ptr(), tensor.nbytes) for key, tensor in sources.items()}
    with pytest.raises(BufferMismatchError, match="destination buffer 'w' of rank 0 is missing"):
        copy_table(made, given, {})
    with pytest.raises(BufferMismatchError, match="copy in place"):
        copy_table(made, given, given)
    table = copy_table(made, given, {(0, "w"): (1 << 40, 96), (1, "w"): (1 << 41, 96)})
    assert (table.shape, table.dtype) == ((4, 51), np.int64)
    assert (table[:, kernel.WORDS] == 3).all()  # rows of 16 bytes, three in each copy


def compiled(has: int) -> tuple[Counter[str], int]:
    """Loads and stores of global memory in the PTX for Hopper, and the shared memory in bytes."""
    source = ASTSource(
        fn=kernel.strided_copy,
        signature={"table": "*i64", "tiles": "*i32", "pitch": "i32"}
        | dict.fromkeys(["HAS", "BLOCK", "BLOCKS"], "constexpr"),
        constexprs={(3,): has, (4,): kernel.BLOCK, (5,): kernel.BLOCKS},
        attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )
    made = triton_compile(
        source, target=HOPPER, options={"num_warps": 4, "enable_fp_fusion": False}
    )
    assert made.asm["cubin"]
    accesses = re.findall(r"\b(?:ld|st)\.global[.\w]*", made.asm["ptx"])
    return Counter(accesses), made.metadata.shared


@pytest.mark.parametrize(
    ("word", "load", "store"),
    [
        (kernel.COPY_16, "v4.b32", "v4.b32"),
        (kernel.COPY_8, "v2.b32", "v2.b32"),
        (kernel.COPY_4, "b32", "b32"),
        (kernel.COPY_2, "b16", "b16"),
        (kernel.COPY_1, "b8", "b8"),
        (kernel.NARROW_4, "v4.b32", "v2.b32"),
        (kernel.NARROW, "b32", "b16"),
        (kernel.NARROW_BYTES, "b8", "b8"),
        (kernel.WIDEN_4, "v2.b32", "v4.b32"),
        (kernel.WIDEN, "b16", "b32"),
        (kernel.WIDEN_BYTES, "b8", "b8"),
    ],
)
def test_it_compiles_for_hopper_and_moves_whole_words(word: int, load: str, store: str) -> None:
    accesses, shared = compiled(1 << word)
    threads = 32 * 4
    assert accesses[f"st.global.{store}"] >= kernel.BLOCK // threads
    assert accesses[f"ld.global.{load}"] >= kernel.BLOCK // threads
    # Nothing else is stored, and no word goes through shared memory.
    assert {name for name in accesses if name.startswith("st")} == {f"st.global.{store}"}
    assert shared == 0


def test_a_table_of_all_words_compiles_for_hopper() -> None:
    accesses, shared = compiled((1 << 11) - 1)
    assert accesses["ld.global.v4.b32"] and accesses["st.global.v4.b32"]
    assert shared == 0
