"""The machine's ceiling for a copy: one contiguous run by memcpy and by streaming stores.

On as many threads as the executor takes. Compiled from ceiling.cpp when first asked for: about a
second, with g++.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
LINE = 64


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "ceiling.so"
        sources = [ROOT / "bench/ceiling.cpp", ROOT / "csrc/base/thread_pool.cpp"]
        flags = ["-std=c++20", "-O3", "-march=native", "-Wall", "-Wextra", "-shared", "-fPIC"]
        subprocess.run(
            ["g++", *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", built, "-pthread"], check=True
        )
        library = ctypes.CDLL(str(built))
    for call in (library.ceiling_memcpy, library.ceiling_stream):
        call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        call.restype = None
    return library


def ceilings(nbytes: int) -> dict[str, Callable[[], None]]:
    """Two peers by name: each moves ``nbytes`` (a multiple of 64) between two arrays of its own.

    Raises:
        ValueError: ``nbytes`` is no multiple of a cache line. AssertionError: a peer does not copy.
    """
    if nbytes % LINE:
        raise ValueError(f"{nbytes} bytes are no multiple of {LINE}: give whole cache lines")
    source = torch.arange(nbytes // 8)
    destination = torch.zeros_like(source)
    assert destination.data_ptr() % LINE == 0
    library = _library()
    calls = {"memcpy": library.ceiling_memcpy, "streaming stores": library.ceiling_stream}
    for name, call in calls.items():
        destination.zero_()
        call(destination.data_ptr(), source.data_ptr(), nbytes)
        assert torch.equal(source, destination), name

    def move(call: Callable[[int, int, int], None]) -> None:
        call(destination.data_ptr(), source.data_ptr(), nbytes)

    return {name: partial(move, call) for name, call in calls.items()}
