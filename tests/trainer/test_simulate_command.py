"""`kimisys simulate` from end to end: the table, the picture, calibration and replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from recorded_runs import MODEL, UPDATE, write_recorded

from kimisys._core.rollout import (
    EVENT,
    ActionKind,
    Config,
    EndReason,
    EventKind,
    Lots,
    Scheduler,
)
from kimisys.rollout.policies import policies
from kimisys.rollout.trace import Trace, read_trace
from kimisys.rollout.workload import lognormal, write_lengths
from kimisys.trainer.cli import main
from kimisys.trainer.simulate_config import SimulateConfig
from kimisys.trainer.simulate_engines import FIELDS, SHIPPED
from kimisys.trainer.simulate_run import recorded_run, traces

SMALL = [
    "--engines", "2", "--groups", "4", "--samples", "4", "--median", "200", "--limit", "2000",
    "--iterations", "2", "--warm-up", "1", "--search", "50",
]  # fmt: skip


def simulated(tmp_path: Path, *arguments: str) -> Any:
    """What `kimisys simulate` writes as JSON."""
    out = tmp_path / "out.json"
    main(["simulate", "--json", str(out), *arguments])
    return json.loads(out.read_text())


def test_every_policy_is_measured_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = simulated(tmp_path, *SMALL)
    told = capsys.readouterr().out
    assert [one["policy"] for one in written["policies"]] == list(policies())
    for one in written["policies"]:
        assert one["policy"] in told
        assert one["speed"] == pytest.approx(one["tokens"] / one["seconds"])
        assert 0 < one["utilisation"] <= 1
        assert one["dropped"] == 0
    whole = [one for one in written["policies"] if policies()[one["policy"]].whole]
    floor = written["offline"]
    for one in whole:
        assert one["groups"] == 8
        assert one["bias"] == pytest.approx(1)
        assert (one["staleness"], one["recomputed"] > 0) == (0, one["moved"] > 0)
        assert sum(one["iterations"]) >= floor["bound"] * (1 - 1e-9)
    assert floor["bound"] <= floor["schedule"] * (1 + 1e-9)
    assert "offline, best of" in told
    assert "sibling correlation 0.8" in told


def test_one_trajectory_alone_takes_what_the_model_says(tmp_path: Path) -> None:
    trace = tmp_path / "lengths.jsonl"
    write_lengths(trace, Lots(np.array([50] * 16), np.array([300] * 16), samples=1, limit=300))
    engine = SHIPPED["h100-7b"].fields()
    written = simulated(
        tmp_path, "--engines", "1", "--groups", "1", "--iterations", "1", "--search", "10",
        "--trace", str(trace), "--policy", "least_loaded",
    )  # fmt: skip
    kv = sum(50 + made for made in range(300)) * engine["kv_token"]
    steps = 300 * (engine["step"] + engine["sequence"]) + kv + 50 * engine["prefill_token"]
    assert written["policies"][0]["seconds"] == pytest.approx(steps, rel=1e-3)
    assert written["offline"]["schedule"] == pytest.approx(steps, rel=1e-3)
    assert written["offline"]["bound"] <= written["offline"]["schedule"] * (1 + 1e-9)


def test_what_lies_between_two_batches_is_charged(tmp_path: Path) -> None:
    policy = ["--policy", "least_loaded"]
    (bare,) = simulated(tmp_path, *SMALL, *policy)["policies"]
    times = ["--train-base", "3", "--train-token", "0.01", "--reward-latency", "20"]
    (whole,) = simulated(tmp_path, *SMALL, *policy, *times)["policies"]
    between = 2 * (3 + 20) + 0.01 * bare["tokens"]
    assert whole["seconds"] == pytest.approx(bare["seconds"] + between)
    assert whole["iterations"] == pytest.approx(bare["iterations"])


def test_a_seed_gives_the_same_again(tmp_path: Path) -> None:
    first, again = (simulated(tmp_path, *SMALL) for _ in range(2))
    assert first == again
    assert simulated(tmp_path, *SMALL, "--seed", "2")["policies"] != first["policies"]


def test_a_trace_gives_the_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "lengths.jsonl"
    shape = {"median": 100, "sigma": 0.5, "correlation": 0.5, "limit": 400, "seed": 3}
    write_lengths(trace, lognormal(12, 4, **shape))  # type: ignore[arg-type]
    arguments = [*SMALL, "--trace", str(trace), "--policy", "group_round_robin"]
    written = simulated(tmp_path, *arguments)
    assert str(trace) in capsys.readouterr().out.replace("\n", "")
    lengths = [json.loads(line)["lengths"] for line in trace.read_text().splitlines()]
    assert written["policies"][0]["tokens"] == np.sum(lengths[:8])  # two batches of four, in order
    assert written["setting"]["groups"] == 4


def test_a_knob_is_tuned_on_another_draw(tmp_path: Path) -> None:
    arguments = ["--policy", "april", "fifo_cap", *SMALL, "--tune"]
    for one in simulated(tmp_path, *arguments)["policies"]:
        assert one["knob"] in policies()[one["policy"]].knob_values


def test_the_engines_are_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "gantt.png"
    simulated(tmp_path, *SMALL, "--policy", "least_loaded", "partial", "--plot", str(picture))
    pixels = matplotlib.image.imread(picture)[:, :, :3]
    coloured = pixels.max(axis=2) - pixels.min(axis=2) > 0.2
    half = coloured.shape[0] // 2
    assert min(coloured[:half].sum(), coloured[half:].sum()) > 5_000


def test_policies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["simulate", "--policy", "list"])
    told = capsys.readouterr().out
    for name, policy in policies().items():
        assert name in told
        assert policy.says in told


@pytest.fixture(scope="module", params=[0, 900], ids=["whole", "budget"])
def run_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose engines kept time by MODEL."""
    folder = tmp_path_factory.mktemp("run")
    budget = int(request.param)
    config = Config(
        token_budget=budget, groups=0 if budget else 6, live_limit=16 if budget else 0,
        lease_timeout=10**9,
    )  # fmt: skip
    shape = {"median": 40, "sigma": 0.8, "correlation": 0.5, "limit": 200, "seed": 5}
    write_recorded(folder, config, lognormal(200, 4, **shape), batches=8)  # type: ignore[arg-type]
    return folder


def test_calibration_finds_the_engine_and_predicts_the_run(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = simulated(tmp_path, "--calibrate", str(run_folder))
    told = capsys.readouterr().out
    assert set(written["engine"]) == set(FIELDS)
    for term, value in MODEL.items():
        assert written["engine"][term] == pytest.approx(value, rel=1e-3, abs=1e-9)
    assert written["engine"]["update"] == pytest.approx(UPDATE, rel=1e-3)
    assert written["calibration"]["total_error"] == pytest.approx(0, abs=1e-6)
    # the lengths of trajectories that were under way at the end are drawn
    assert abs(written["prediction"]["error"]) < 0.05
    assert "held out" in told and "measured" in told
    engine = tmp_path / "engine.json"
    engine.write_text(json.dumps(written))
    again = simulated(tmp_path, *SMALL, "--engine", str(engine), "--policy", "least_loaded")
    assert again["setting"]["engine"] == written["engine"]


def test_a_replay_decides_the_same(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (record,) = simulated(tmp_path, "--replay", str(run_folder))
    assert record["equal"] and record["events"] > 1000
    assert "the same decisions" in capsys.readouterr().out


@pytest.fixture(scope="module")
def other_build(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as a scheduler would have recorded it that decides otherwise early on."""
    recording = read_trace(run_folder / "rollouts" / "trace")
    folder = tmp_path_factory.mktemp("other")
    (folder / "rollouts").mkdir()
    writer = Trace(folder / "rollouts" / "trace", recording.config)
    for number, chunk in enumerate(recording.chunks):
        actions = chunk.actions.copy()
        if not number:
            first = np.flatnonzero(actions["kind"] == ActionKind.START)[3]
            actions["deadline"][first] += 1
        writer.add(chunk.events, actions, chunk.answers, chunk.digest)
        writer.flush()
    writer.close()
    return folder


def test_a_replay_says_where_it_differs(
    other_build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "--replay", str(other_build)])
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert "OTHER decisions" in told.out
    assert "trace: at event" in told.err and "the run decided Action(start" in told.err


def test_a_run_of_another_build_is_read_as_it_was(run_folder: Path, other_build: Path) -> None:
    here, there = (recorded_run(traces(folder)[0]) for folder in (run_folder, other_build))
    assert there.rollout_seconds == here.rollout_seconds
    assert there.begun == here.begun
    assert np.asarray(there.lots.lengths).tolist() == np.asarray(here.lots.lengths).tolist()


def test_what_a_dead_lease_sends_is_not_counted(tmp_path: Path) -> None:
    config = Config(groups=1)
    scheduler, path = Scheduler(config), tmp_path / "trace"
    writer = Trace(path, config)
    leases: list[int] = []

    def tell(kind: EventKind, **fields: int) -> None:
        event = np.zeros(1, EVENT)
        event["kind"], event["version"] = int(kind), -1
        for name, value in fields.items():
            event[name] = value
        actions, answers = scheduler.handle_each(event)
        writer.add(event, actions, answers, scheduler.digest())
        starts = np.isin(actions["kind"], [ActionKind.START, ActionKind.CONTINUE])
        leases.extend(int(lease) for lease in actions["lease"][starts])

    tell(EventKind.ENGINE_JOINED, engine=0, version=0, tokens=1000, count=4)
    tell(EventKind.TRAINER_READY)
    tell(EventKind.OFFERED, id=5, count=1, tokens=3, limit=50)
    tell(EventKind.TIME)
    tell(EventKind.TOKENS, id=leases[-1], tokens=7)
    tell(EventKind.ENGINE_JOINED, engine=1, version=0, tokens=1000, count=4)
    tell(EventKind.ENGINE_FAILED, engine=0)
    tell(EventKind.TOKENS, id=leases[0], tokens=9)
    tell(EventKind.SEGMENT_ENDED, id=leases[-1], tokens=2, reason=EndReason.STOP)
    writer.close()
    assert len(leases) == 2
    found = recorded_run(path)
    assert np.asarray(found.lots.lengths).tolist() == [9]


def test_a_header_that_was_changed_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "changed" / "rollouts"
    changed.mkdir(parents=True)
    content = (run_folder / "rollouts" / "trace").read_bytes()
    (changed / "trace").write_bytes(content.replace(b'"max_failures": 3', b'"max_failures": 4'))
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "--replay", str(changed.parent)])
    assert ended.value.code == 1  # the header's checksum
    assert "SchedulerError" in capsys.readouterr().err


def test_a_recorded_run_is_read_as_it_was(run_folder: Path) -> None:
    (path,) = traces(run_folder)
    found = recorded_run(path)
    shape = {"median": 40, "sigma": 0.8, "correlation": 0.5, "limit": 200, "seed": 5}
    lots = lognormal(200, 4, **shape)  # type: ignore[arg-type]
    groups = len(found.lots.prompt_tokens)
    assert (np.asarray(found.lots.prompt_tokens) == np.asarray(lots.prompt_tokens)[:groups]).all()
    known = np.minimum(np.asarray(lots.lengths), 200)[: groups * 4]
    assert (np.asarray(found.lots.lengths) != known).sum() <= found.unfinished + 4 * groups - (
        found.begun
    )
    assert len(found.rollout_seconds) == 8
    assert found.between_seconds == pytest.approx([0.4] * 7)
    assert found.engines == [(1 << 20, 64)] * 2


def test_an_engine_file_of_no_numbers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "engine.json"
    file.write_text(json.dumps({"engine": SHIPPED["h100-7b"].fields() | {"kv_capacity": 1.5}}))
    with pytest.raises(SystemExit):
        main(["simulate", *SMALL, "--engine", str(file)])
    assert "kv_capacity of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "verl"], "there is no 'verl'; there are: all, list, default"),
        (["--engines", "0"], "--engines is 0"),
        (["--engine", "h200"], "shipped are h100-7b, 2xh100-32b"),
        (["--calibrate", "a", "--replay", "b"], "exclude each other"),
        (["--calibrate", "nowhere"], "holds no rollouts/steps-engine"),
        (["--replay", "nowhere"], "holds no rollouts/trace"),
        (["--plot", "x.gif"], "name it *.png"),
        (["--plot", "nowhere/x.png"], "name a file in a folder that exists"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_errors_are_told_in_words(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *arguments])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


def test_the_defaults_are_legal() -> None:
    SimulateConfig().check()
    assert SimulateConfig(groups=0, engines=3).batch == 24
    assert SimulateConfig(policy=("partial", "all")).chosen == list(policies())
