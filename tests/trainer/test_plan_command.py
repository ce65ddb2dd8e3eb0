"""`kimisys plan` from end to end on models small enough to count by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from tiny_models import tiny_config

from kimisys.adapters.megatron.offline import offline_layout
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.adapters.vllm.offline import engine_layout
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.reshard import (
    Block,
    Buffer,
    Fragment,
    Instance,
    Layout,
    Region,
    SymbolicLayout,
    Tensor,
    itemsize,
)
from kimisys.trainer.cli import main
from kimisys.trainer.plan_command import placed
from kimisys.trainer.plan_config import PlanConfig, model_config, shipped

TRAIN, INFER = "tp=1,pp=2,ep=2,etp=1", "tp=2,ep=on,replicas=2"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config.json of a small mixture of experts; traces are kept beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny-moe" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(tiny_config("qwen3_moe")))
    return file


def planned(model: Path, *more: str, train: str = TRAIN, infer: str = INFER) -> dict[str, Any]:
    """What `kimisys plan` writes as JSON."""
    out = model.parent / "plan.json"
    layouts = ["--train", train, "--infer", infer]
    main(["plan", "--model", str(model), *layouts, "--json", str(out), *more])
    written = json.loads(out.read_text())
    assert isinstance(written, dict)
    return written


def sides(model: Path, train: str = TRAIN, infer: str = INFER) -> tuple[Layout, Layout]:
    """Both layouts, spelled out."""
    config = json.loads(model.read_text())
    source = offline_layout(config, Parallel.parse(train), "bfloat16")
    destination = engine_layout(config, source.tensors, EngineParallel.parse(infer), "bfloat16")
    return source.concrete(), destination.concrete()


def overlap(one: Fragment, other: Fragment) -> int:
    """How many elements two fragments of a tensor have in common."""
    elements = 1
    for a, n, b, m in zip(
        one.region.offset, one.region.extent, other.region.offset, other.region.extent, strict=True
    ):
        elements *= max(0, min(a + n, b + m) - max(a, b))
    return elements


def test_the_json_holds_what_a_count_of_all_fragments_gives(model: Path) -> None:
    written = planned(model)
    source, destination = sides(model)
    sizes = {tensor.name: itemsize(tensor.dtype) for tensor in destination.tensors}
    owners: dict[str, list[Fragment]] = {}
    for held in source.fragments:
        owners.setdefault(held.tensor, []).append(held)
    wanted: Counter[int] = Counter()  # by destination rank
    possible: Counter[tuple[int, int]] = Counter()  # what a source rank could send at most
    for want in destination.fragments:
        wanted[want.rank] += overlap(want, want) * sizes[want.tensor]
        for held in owners[want.tensor]:
            possible[held.rank, want.rank] += overlap(held, want) * sizes[want.tensor]
    received: Counter[int] = Counter()
    for pair in written["pairs"]:
        assert 0 < pair["bytes"] <= possible[pair["source_rank"], pair["destination_rank"]]
        received[pair["destination_rank"]] += pair["bytes"]
    assert received == wanted
    assert written["plan"]["bytes"] == sum(wanted.values())
    assert written["plan"]["copies"] == sum(pair["copies"] for pair in written["pairs"])
    assert written["plan"]["tensors"] == len(destination.tensors)
    assert (written["train"]["ranks"], written["infer"]["ranks"]) == (4, 4)


def test_bytes_of_nics_are_those_that_leave_a_node(model: Path) -> None:
    apart = planned(model)
    remote, local = apart["bytes"]["remote"], apart["bytes"]["local"]
    assert sum(nic["received"] for nic in apart["nics"]) == remote
    assert sum(nic["sent"] for nic in apart["nics"]) == remote
    assert remote + local == apart["plan"]["bytes"]
    assert {nic["node"] for nic in apart["nics"] if nic["received"]} == {1}
    assert 0 < apart["seconds"]["bound"] <= apart["seconds"]["simulated"]
    together = planned(model, "--colocated")
    assert together["bytes"] == {"local": together["plan"]["bytes"], "remote": 0, "relayed": 0}
    assert together["seconds"]["bound"] == 0


def test_a_faster_nic_takes_less_time(model: Path) -> None:
    slow, fast = (planned(model, "--nic", nic, "--ranks-per-node", "2") for nic in ("1e6", "2e6"))
    assert slow["seconds"]["bound"] == pytest.approx(2 * fast["seconds"]["bound"])
    assert slow["plan"] == fast["plan"]


def test_it_prints_the_figures_and_draws_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plan.png"
    written = planned(model, "--plot", str(picture))
    told = capsys.readouterr().out
    for text in (TRAIN, INFER, f"{written['plan']['copies']:,} copies", "lower bound"):
        assert text in told
    assert written["plan"]["fingerprint"] in told
    assert matplotlib.image.imread(picture).shape[0] > 500


@pytest.mark.parametrize(
    ("train", "infer", "message"),
    [
        ("tp=3", INFER, "3"),
        ("tp=1,ep=3,etp=1", INFER, "expert"),
        ("tp=1,width=2", INFER, "width"),
        (TRAIN, "tp=3", "tp=3 does not divide the 4 attention heads; legal are tp=1, 2, 4"),
        (TRAIN, "tp=2,ep=maybe", "give ep=on or ep=off"),
    ],
)
def test_an_illegal_layout_ends_with_one_message(
    model: Path, train: str, infer: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        planned(model, train=train, infer=infer)
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("LayoutError: ") and message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "file", "message"),
    [
        ("--plot", "plan.tiff", "--plot: .*plan.tiff is drawn as PNG"),
        ("--plot", "absent/plan.png", "--plot: there is no folder"),
        ("--json", ".", "--json: .* is a folder"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_anything_is_traced(
    option: str, file: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", "absent", "--train", TRAIN, "--infer", INFER,
              option, str(tmp_path / file)])  # fmt: skip
    assert ended.value.code == 1
    assert re.match(f"ConfigError: {message}", capsys.readouterr().err)


def test_a_rank_that_holds_nothing_keeps_its_seat() -> None:
    held = Layout(
        [Tensor("w", "int8", [1])],
        [Buffer(0, "w", 1)],
        [Fragment("w", Region([0], [1]), 0, "w", 0, [1])],
    )
    side = SymbolicLayout([Block(held, [Instance("", [9])])])
    config = PlanConfig("", "", "", ranks_per_node=8)
    source, destination = placed(side, side, config)
    assert [(p.rank, p.node, p.device) for p in source.places] == [(9, 1, 1)]
    assert [p.node for p in destination.places] == [3]  # the source's nodes are 0 and 1


@pytest.mark.parametrize("model_name", ["no-such-model", "/dev/null"])
def test_an_unknown_model_is_told_what_there_is(
    model_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", model_name, "--train", TRAIN, "--infer", INFER])
    assert ended.value.code == 1
    assert "--model" in capsys.readouterr().err


def test_shipped_configurations_are_found_by_name_and_folder(tmp_path: Path) -> None:
    assert set(shipped()) == {"deepseek-v3", "kimi-k2", "qwen3-0.6b", "qwen3-235b-a22b"}
    for name in shipped():
        found, config = model_config(name)
        assert (found, "hidden_size" in config) == (name, True)
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    assert model_config(str(tmp_path)) == (tmp_path.name, {"hidden_size": 8})
