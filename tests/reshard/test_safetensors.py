"""Checkpoint folders against the safetensors library, and what becomes of damaged ones."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kimisys.errors import CheckpointError, KimisysError, LayoutError
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor, plan, safetensors
from kimisys.reshard.safetensors import (
    create_checkpoint,
    new_checkpoint,
    open_checkpoint,
    open_for_writing,
)


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


FILES = {
    "model.safetensors": [Tensor("w", "float32", (6, 8)), Tensor("b", "float32", (8,))],
    "optimizer.safetensors": [Tensor("exp_avg.w", "float32", (6, 8))],
}


def columns(rank: int) -> tuple[Layout, dict[tuple[int, str], np.ndarray]]:
    """One of two ranks: half of the columns of each matrix, and all of "b"; values tell the rank
    of a replica, and the place of an element that only one rank has."""
    half = slice(4 * rank, 4 * rank + 4)
    held = {
        "w": np.arange(48, dtype=np.float32).reshape(6, 8)[:, half].copy(),
        "exp_avg.w": -np.arange(48, dtype=np.float32).reshape(6, 8)[:, half].copy(),
        "b": np.arange(8, dtype=np.float32),
    }
    tensors = [tensor for file in FILES.values() for tensor in file]
    fragments = [
        Fragment(n, Region([0, 4 * rank] if a.ndim == 2 else [0], a.shape), rank, n, 0, a.strides)
        for n, a in held.items()
    ]
    buffers = [Buffer(rank, name, array.nbytes) for name, array in held.items()]
    return Layout(tensors, buffers, fragments), {(rank, n): a for n, a in held.items()}


def fill_share(partial: Path, rank: int) -> None:
    """What one of two processes does, knowing the partial folder's name and its rank alone."""
    everyone = Layout.merge([columns(0)[0], columns(1)[0]])
    for name in FILES:
        with open_for_writing(partial / name) as file:
            share = plan(everyone, file.layout).of_source(rank)
            share.execute(columns(rank)[1], file.buffers, threads=1)


def test_processes_fill_one_checkpoint_together(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "step-7"
    spawn = multiprocessing.get_context("spawn")
    with new_checkpoint(folder, FILES, {"state.json": "{}"}) as partial:
        ranks = [spawn.Process(target=fill_share, args=(partial, rank)) for rank in (0, 1)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
            assert process.exitcode == 0
        assert not folder.exists()
    matrix = torch.arange(48, dtype=torch.float32).view(6, 8)
    model = load_file(folder / "model.safetensors")
    assert torch.equal(model["w"], matrix) and torch.equal(model["b"], torch.arange(8.0))
    assert torch.equal(load_file(folder / "optimizer.safetensors")["exp_avg.w"], -matrix)
    assert (folder / "state.json").read_text() == "{}"
    assert [t.name for t in open_checkpoint(folder).layout.tensors] == ["b", "exp_avg.w", "w"]
    assert [path.name for path in folder.parent.iterdir()] == ["step-7"]


def coordinate_and_die(folder: Path) -> None:
    with new_checkpoint(folder, FILES, {"state.json": "{}"}) as partial:
        fill_share(partial, 0)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_coordinator_leaves_no_checkpoint_under_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "step-7"
    process = multiprocessing.get_context("spawn").Process(
        target=coordinate_and_die, args=(folder,)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name[:8] for path in tmp_path.iterdir()] == [".step-7."]
    with new_checkpoint(folder, FILES) as partial:  # what was left is in nobody's way
        for rank in (0, 1):
            fill_share(partial, rank)
    assert torch.equal(load_file(folder / "model.safetensors")["b"], torch.arange(8.0))


def test_all_is_on_the_disk_before_the_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that survives a power cut: contents, then the folder's entries, the new name, and
    the entries of the folder that holds it."""
    order: list[str] = []

    def fsync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    real_rename = os.rename

    def rename(old: Path, new: Path) -> None:
        order.append("renamed")
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    folder = tmp_path / "a" / "b" / "step-7"
    with new_checkpoint(folder, FILES, {"state.json": "{}"}) as partial:
        assert order == ["a", tmp_path.name]  # the entries "b" and "a" are new
        order.clear()
        with open_for_writing(partial / "model.safetensors"):
            pass
        assert order == ["model.safetensors"]
    assert sorted(order[1:4]) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert order[4:] == [partial.name, "renamed", "b"]


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"model.bin": []}, "NAME.safetensors"),
        ({"../model.safetensors": []}, "NAME.safetensors"),
        (
            {f"{n}.safetensors": [Tensor("w", "int8", (1,))] for n in "ab"},
            "'w' would be in a.safetensors and in b",
        ),
    ],
)
def test_a_checkpoint_that_would_not_open_again_is_not_begun(
    tmp_path: Path, files: dict[str, list[Tensor]], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match), new_checkpoint(tmp_path / "model", files):
        raise AssertionError("the block began")
    assert list(tmp_path.iterdir()) == []


def test_only_a_safetensors_file_is_opened_for_writing(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be written"),
        open_for_writing(tmp_path / "gone.safetensors"),
    ):
        pass
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    with (
        pytest.raises(CheckpointError, match="truncated"),
        open_for_writing(tmp_path / "short.safetensors"),
    ):
        pass


@pytest.mark.parametrize("kind", [TimeoutError, BrokenPipeError, KeyboardInterrupt])
def test_an_error_of_the_block_passes_as_it_is_and_leaves_nothing(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    with (
        pytest.raises(kind, match="theirs"),
        create_checkpoint(tmp_path / "model", FILES["model.safetensors"]),
    ):
        raise kind("theirs")
    assert list(tmp_path.iterdir()) == []


def test_writing_that_fails_names_the_folder_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, *_: int) -> None:
        raise OSError(28, "No space left on device")

    for call in ("posix_fallocate", "fsync"):
        with (
            monkeypatch.context() as patched,
            pytest.raises(CheckpointError, match=r"model cannot be written: .*No space"),
        ):
            patched.setattr(os, call, full)
            with new_checkpoint(tmp_path / "model", FILES):
                assert call == "fsync", "the block began"
        assert list(tmp_path.iterdir()) == []


def test_a_name_that_may_not_survive_is_not_called_unwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")) == tmp_path:
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with (
        pytest.raises(CheckpointError, match=r"model is complete, but .* Input/output error"),
        new_checkpoint(tmp_path / "model", FILES),
    ):
        pass
    assert len(open_checkpoint(tmp_path / "model").layout.tensors) == 3


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_checkpoint_is_as_open_as_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with new_checkpoint(tmp_path / "model", FILES):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_header_that_makes_no_layout_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")

    def no_layout(*_: object) -> Layout:
        raise LayoutError("no layout")

    monkeypatch.setattr(safetensors, "Layout", no_layout)
    with (
        pytest.raises(CheckpointError, match=r"model\.safetensors: no layout"),
        open_for_writing(tmp_path / "model.safetensors"),
    ):
        pass
    with pytest.raises(CheckpointError, match="no layout"):
        open_checkpoint(tmp_path)
