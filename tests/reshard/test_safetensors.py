"""Checkpoint folders against the safetensors library, and what becomes of damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kimisys.errors import CheckpointError, KimisysError
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor, plan
from kimisys.reshard.safetensors import create_checkpoint, open_checkpoint


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "embed": torch.randn(7, 4),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "count": torch.arange(6, dtype=torch.int64),
        "scalar": torch.tensor(1.5),
    }


def describe(weights: dict[str, torch.Tensor]) -> list[Tensor]:
    return [
        Tensor(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in weights.items()
    ]


def write(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Save through the plan of one checkpoint to another, starting from the library's file."""
    library = folder.with_name(folder.name + "-library")
    library.mkdir()
    save_file(weights, library / "model.safetensors")
    source = open_checkpoint(library)
    with create_checkpoint(folder, describe(weights), {"config.json": "{}"}) as out:
        plan(source.layout, out.layout).execute(source.buffers, out.buffers)


def test_what_we_save_the_library_reads(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    write(tmp_path / "model", weights)
    loaded = load_file(tmp_path / "model" / "model.safetensors")
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


def test_several_files_are_one_layout(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(4)}, tmp_path / "two.safetensors")
    assert [t.name for t in open_checkpoint(tmp_path).layout.tensors] == ["a", "b"]
    save_file({"a": torch.ones(2, 3)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in one.* and in two"):
        open_checkpoint(tmp_path)


def test_an_error_while_saving_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="lost"),
        create_checkpoint(tmp_path / "model", [Tensor("a", "float32", (2,))]),
    ):
        raise RuntimeError("lost")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    with (
        pytest.raises(CheckpointError, match="exists"),
        create_checkpoint(tmp_path / "model", []),
    ):
        pass


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_refused(
    tmp_path: Path, weights: dict[str, torch.Tensor], keep: int
) -> None:
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"truncated|JSON"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "needs 8 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, "truncated"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "'a'"),
        ({"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}, "unknown dtype"),
        ({"dtype": "F32", "shape": 3}, "malformed"),
        ("nonsense", "malformed"),
        ({"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}, "malformed"),
        ({"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}, "malformed"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0.5, 8.5]}, "malformed"),
        ({"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 8]}, "malformed"),
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, entry: object, match: str) -> None:
    write_header(tmp_path, json.dumps({"a": entry}).encode())
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(tmp_path)


def write_header(folder: Path, header: bytes) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_header(tmp_path, json.dumps({"a": entry, "b": entry}).encode())
    with pytest.raises(CheckpointError, match="'a' and 'b' share bytes"):
        open_checkpoint(tmp_path)


def test_a_header_of_brackets_is_refused(tmp_path: Path) -> None:
    write_header(tmp_path, b"[" * 100_000)
    with pytest.raises(CheckpointError, match="not JSON"):
        open_checkpoint(tmp_path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match="cannot be made"),
        create_checkpoint(tmp_path / "file" / "model", []),
    ):
        pass


def test_an_index_must_agree(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'b' in two\.safetensors, which is missing"):
        open_checkpoint(tmp_path)


def destination(
    *tensors: tuple[str, tuple[int, ...]],
) -> tuple[Layout, dict[tuple[int, str], np.ndarray]]:
    """One buffer a tensor, filled with a mark that must survive a refusal."""
    fragments, buffers, arrays = [], [], {}
    for name, shape in tensors:
        strides = [4 * int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        fragments.append(Fragment(name, Region([0] * len(shape), shape), 0, name, 0, strides))
        arrays[0, name] = np.full(shape, 7, np.float32)
        buffers.append(Buffer(0, name, arrays[0, name].nbytes))
    return Layout([Tensor(n, "float32", s) for n, s in tensors], buffers, fragments), arrays


@pytest.mark.parametrize(
    ("held", "match"),
    [
        ((("a", (2, 3)), ("missing", (2,))), "missing"),  # a tensor that the checkpoint lacks
        ((("a", (3, 2)),), "'a'|\"a\"| a "),  # a shape that differs
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_a_byte_moves(
    tmp_path: Path, held: tuple[tuple[str, tuple[int, ...]], ...], match: str
) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    layout, arrays = destination(*held)
    with pytest.raises(KimisysError, match=match):
        plan(checkpoint.layout, layout).execute(checkpoint.buffers, arrays)
    assert all((array == 7).all() for array in arrays.values())


def test_no_folder_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no"):
        open_checkpoint(tmp_path)
