"""A kernel compiled for a GPU that is not here: what its machine code does."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from subprocess import run
from typing import Any

import triton.backends.nvidia
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
THREADS = 128


@dataclass(frozen=True)
class Compiled:
    """global_accesses: of the PTX, by instruction; spills: instructions of the machine code that
    move registers to or from local memory."""

    global_accesses: Counter[str]
    spills: int


def compiled(fn: Any, signature: dict[str, str], constants: dict[str, Any],
             folder: Path) -> Compiled:  # fmt: skip
    """signature: Triton types of the arguments; all others are constants. Pointers are aligned, as
    those of torch are. folder: for the machine code."""
    names = list(fn.arg_names)
    pointers = [place for place, name in enumerate(names) if signature.get(name, "")[:1] == "*"]
    source = ASTSource(
        fn=fn,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in pointers},
    )
    options = {"num_warps": THREADS // 32, "enable_fp_fusion": False}
    made = triton_compile(source, target=HOPPER, options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    disassembler = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    listing = run([disassembler, cubin], capture_output=True, text=True, check=True).stdout
    assert "EXIT" in listing
    return Compiled(
        Counter(re.findall(r"\b(?:ld|st)\.global[.\w]*", made.asm["ptx"])),
        len(re.findall(r"\b(?:STL|LDL)\b", listing)),
    )
