"""A folder of safetensors files as a layout: loading and saving a checkpoint are plans like any
other.

The files are mapped, so a plan reads from (or writes to) the page cache directly, and a rank
touches only the bytes it owns. Several processes can fill one new folder: `new_checkpoint` makes
it, each maps its files with `open_for_writing` and executes its share of a plan, and the folder
appears under its name when all is on the disk. Format:
https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
One buffer for each file: the data section, under the file's name, at rank 0.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from kimisys.errors import CheckpointError, KimisysError, LayoutError
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor, itemsize

_DTYPES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "U8": "uint8",
    "I8": "int8",
    "I32": "int32",
    "I64": "int64",
}
_CODES = {name: code for code, name in _DTYPES.items()}
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class Checkpoint:
    """An open folder: its layout, and its buffers as `Plan.execute` takes them."""

    folder: Path
    layout: Layout
    buffers: Mapping[tuple[int, str], memoryview]


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Map every *.safetensors file of `folder` read-only; only the headers are read.

    Raises CheckpointError, naming file and tensor, when a file is missing, truncated or malformed.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no *.safetensors file; give a Hugging Face model folder"
        )
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    buffers: dict[tuple[int, str], memoryview] = {}
    described, fragments = [], []
    for file in files:
        header, data = _read(file)
        buffers[0, file.name] = data
        described.append(Buffer(0, file.name, data.nbytes))
        for name, entry in header.items():
            tensor, start = _tensor(file, name, entry, data.nbytes)
            if name in tensors:
                raise CheckpointError(
                    f"{name!r} is in {origin[name]} and in {file.name}; keep one of them"
                )
            tensors[name], origin[name] = tensor, file.name
            fragments.append(_whole(tensor, file.name, start))
    _check_index(folder, origin)
    _check_disjoint(folder, described, tensors, fragments)
    try:
        layout = Layout(list(tensors.values()), described, fragments)
    except LayoutError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return Checkpoint(folder, layout, buffers)


@contextmanager
def create_checkpoint(
    folder: Path | str, tensors: Sequence[Tensor], files: Mapping[str, str] | None = None
) -> Iterator[Checkpoint]:
    """A new folder for this process alone to write into: `new_checkpoint` with one
    model.safetensors that holds `tensors`, open for writing."""
    name = "model.safetensors"
    with (
        new_checkpoint(folder, {name: tensors}, files) as partial,
        open_for_writing(partial / name) as checkpoint,
    ):
        yield checkpoint


@contextmanager
def new_checkpoint(
    folder: Path | str,
    tensors: Mapping[str, Sequence[Tensor]],
    files: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """A partial folder for any number of processes to fill; it appears as `folder`, whole, when the
    block ends without an error, and survives a crash from then on.

    tensors: what each safetensors file is to hold, by the file's name; the files lie in the partial
    folder, header and all, before the block begins. Whoever fills them (with `open_for_writing`)
    must be done when it ends. files: further text files by name (config.json, ...). After an error
    nothing is left; after a crash before the end, a hidden folder .NAME.* at most. Errors of the
    block pass as they are. Raises CheckpointError if `folder` exists already or cannot be written,
    or would not open again; and, the one error that leaves `folder` whole in its place, if it may
    not survive a crash.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists; choose another name or remove it first")
    _check_names(folder, tensors)
    try:
        _make_folders(folder.parent)
        partial = folder.parent / f".{folder.name}.{secrets.token_hex(8)}"
        partial.mkdir()  # not mkdtemp, which would keep out those whom the umask lets in
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error}; choose another place") from error
    try:
        with _writing(folder):
            for name, held in tensors.items():
                _write_header(partial / name, held)
        yield partial
        with _writing(folder):
            for name, text in (files or {}).items():
                (partial / name).write_text(text)
            # first the contents, then their names, then the one name that makes them valid
            for entry in (*partial.iterdir(), partial):
                _sync(entry)
            os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        _sync(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"{folder} is complete, but its name may not survive a crash: syncing {folder.parent} "
            f"failed: {error}; see to that disk, then check that the folder opens"
        ) from error


@contextmanager
def open_for_writing(file: Path | str) -> Iterator[Checkpoint]:
    """Map one file of `new_checkpoint`'s partial folder, to write into its tensors. When the block
    ends without an error, what was written is on the disk. Its errors pass as they are.

    Raises CheckpointError when the file is missing or malformed, or cannot be written.
    """
    file = Path(file)
    with _writing(file):
        stream = open(file, "r+b")  # noqa: SIM115  # closed by the next line
    with stream:
        with _writing(file):
            header, mapped, start = _map(file, stream.fileno(), mmap.ACCESS_WRITE)
        data = memoryview(mapped)[start:]
        described = [_tensor(file, name, entry, data.nbytes) for name, entry in header.items()]
        try:
            layout = Layout(
                [tensor for tensor, _ in described],
                [Buffer(0, file.name, data.nbytes)],
                [_whole(tensor, file.name, begin) for tensor, begin in described],
            )
        except LayoutError as error:
            raise CheckpointError(f"{file}: {error}") from error
        yield Checkpoint(file.parent, layout, {(0, file.name): data})
        with _writing(file):
            mapped.flush()
            os.fsync(stream.fileno())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Around our own writing to `path`, never around a caller's block: its errors are its own."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _check_names(folder: Path, tensors: Mapping[str, Sequence[Tensor]]) -> None:
    """Raise CheckpointError for what `open_checkpoint` would overlook or refuse."""
    origin: dict[str, str] = {}
    for file, held in tensors.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{folder} cannot hold {file!r}: name it NAME.safetensors")
        for tensor in held:
            if tensor.name in origin:
                raise CheckpointError(
                    f"{tensor.name!r} would be in {origin[tensor.name]} and in {file} of {folder}; "
                    "keep one of them"
                )
            origin[tensor.name] = file


def _make_folders(folder: Path) -> None:
    """mkdir -p, such that the new names survive a crash."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _sync(made.parent)


def _write_header(file: Path, tensors: Sequence[Tensor]) -> None:
    header, nbytes = _plan_file(tensors)
    with open(file, "wb") as stream:
        stream.write(header)
        stream.flush()
        # the blocks are taken now: a disk that fills up later would be a SIGBUS, not an error
        os.posix_fallocate(stream.fileno(), 0, len(header) + nbytes)


def _sync(path: Path) -> None:
    """Put a file's contents, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(file: Path) -> tuple[dict[str, Any], memoryview]:
    with open(file, "rb") as stream:
        header, mapped, start = _map(file, stream.fileno(), mmap.ACCESS_READ)
        return header, memoryview(mapped)[start:]


def _map(file: Path, descriptor: int, access: int) -> tuple[dict[str, Any], mmap.mmap, int]:
    """The header without its metadata, the mapped file, and where its data section starts."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file: {size} bytes, header of {length}; "
            "copy it again"
        )
    try:
        header = json.loads(os.pread(descriptor, length, 8))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not JSON ({error}); copy it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object; copy it again")
    header.pop("__metadata__", None)
    return header, mmap.mmap(descriptor, 0, access=access), 8 + length


def _tensor(file: Path, name: str, entry: Any, nbytes: int) -> tuple[Tensor, int]:
    """The tensor that header entry `entry` describes, and where its bytes start in the data
    section."""
    try:
        dtype = _DTYPES[entry["dtype"]]
        shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
        tensor = Tensor(name, dtype, shape)
        if any(type(number) is not int for number in (*shape, start, end)):
            raise TypeError("shape and data_offsets must be integers")
    except (KeyError, TypeError, ValueError, OverflowError, KimisysError) as error:
        raise CheckpointError(
            f"{file}: the entry of {name!r} is malformed or of an unknown dtype: {entry}"
        ) from error
    needed = prod(shape) * itemsize(dtype)
    if start < 0 or min(shape, default=0) < 0 or end - start != needed:
        raise CheckpointError(
            f"{file}: {name!r} of {entry['dtype']}{list(shape)} needs {needed} bytes, "
            f"its header gives [{start}, {end})"
        )
    if end > nbytes:
        raise CheckpointError(
            f"{file} is truncated: {name!r} ends at byte {end} of the data, the file has {nbytes}; "
            "copy it again"
        )
    return tensor, start


def _whole(tensor: Tensor, file: str, start: int) -> Fragment:
    """The fragment of a whole tensor stored row-major at byte `start` of `file`."""
    shape = tuple(tensor.shape)
    size = itemsize(tensor.dtype)
    strides = [prod(shape[axis + 1 :]) * size for axis in range(len(shape))]
    return Fragment(tensor.name, Region([0] * len(shape), shape), 0, file, start, strides)


def _plan_file(tensors: Sequence[Tensor]) -> tuple[bytes, int]:
    """The file up to its data section, and the bytes of that."""
    header, end = {}, 0
    # the widest dtypes first, so that every tensor is aligned to its element
    for tensor in sorted(tensors, key=lambda t: (-itemsize(t.dtype), t.name)):
        nbytes = prod(tensor.shape) * itemsize(tensor.dtype)
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return len(text).to_bytes(8, "little") + text, end


def _check_disjoint(
    folder: Path,
    files: Sequence[Buffer],
    tensors: Mapping[str, Tensor],
    fragments: Sequence[Fragment],
) -> None:
    """Raise CheckpointError for two tensors that share bytes of a file."""
    for file in files:
        held = [f for f in fragments if f.buffer == file.name and tensors[f.tensor].nbytes]
        held.sort(key=lambda f: f.byte_offset)
        for one, other in pairwise(held):
            tensor = tensors[one.tensor]
            if one.byte_offset + tensor.nbytes > other.byte_offset:
                raise CheckpointError(
                    f"{folder / file.name}: {one.tensor!r} and {other.tensor!r} share bytes from "
                    f"{other.byte_offset} of the data on; the header is damaged, copy it again"
                )


def _check_index(folder: Path, origin: Mapping[str, str]) -> None:
    index = folder / _INDEX
    if not index.exists():
        return
    try:
        weight_map = json.loads(index.read_text())["weight_map"].items()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is malformed: {error!r}") from error
    for name, file in weight_map:
        if origin.get(name) != file:
            found = "lacks it" if (folder / str(file)).exists() else "is missing"
            raise CheckpointError(f"{index} promises {name!r} in {file}, which {found}")
