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
        command = ["g++", *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", built, "-pthread"]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError as error:
            raise RuntimeError(
                "the ceilings are compiled with g++, which is not installed: install it"
            ) from error
        library = ctypes.CDLL(str(built))
    for call in (library.ceiling_memcpy, library.ceiling_stream):
        call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        call.restype = None
    return library


def ceilings(nbytes: int) -> dict[str, Callable[[], None]]:
    """Two peers by name: each moves ``nbytes`` (a multiple of 64) between two arrays of its own.

    Raises:
        ValueError: ``nbytes`` is no multiple of a cache line. RuntimeError: there is no g++, or a
        peer does not copy.
    """
    if nbytes % LINE:
        raise ValueError(f"{nbytes} bytes are no multiple of {LINE}: give whole cache lines")
    source = torch.arange(nbytes // 8)
    destination = torch.zeros_like(source)
    if destination.data_ptr() % LINE:
        raise RuntimeError(f"torch's memory is not aligned to {LINE} bytes, as the ceilings need")
    library = _library()
    calls = {"memcpy": library.ceiling_memcpy, "streaming stores": library.ceiling_stream}
    for name, call in calls.items():
        destination.zero_()
        call(destination.data_ptr(), source.data_ptr(), nbytes)
        if not torch.equal(source, destination):
            raise RuntimeError(f"the ceiling {name!r} does not copy")

    def move(call: Callable[[int, int, int], None]) -> None:
        call(destination.data_ptr(), source.data_ptr(), nbytes)

    return {name: partial(move, call) for name, call in calls.items()}
