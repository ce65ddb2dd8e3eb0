"""report.html: a run in one file that opens offline, in any browser, without scripts."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from kimisys.trainer.config import LOGPROB_GAP_BOUNDS, TrainConfig
from kimisys.trainer.machine import MachineRecord
from kimisys.trainer.metrics import (
    RunFolderError,
    Sample,
    Summary,
    read_metrics,
    read_object,
    read_record,
    read_samples,
    read_sft,
)
from kimisys.trainer.plot import (
    AGREEMENT,
    DELTAS,
    LEARNING,
    SHAPING,
    TIMES,
    WARM_UP,
    Chart,
    History,
    chart_svg,
    on_dark,
)
from kimisys.trainer.plot_rollouts import ROLLOUTS
from kimisys.trainer.rollout_records import read_rollouts

Read = TypeVar("Read")
Else = TypeVar("Else")

_SECTIONS = (
    ("Supervised warm-up", "warm-up", WARM_UP),
    ("Learning", "learning", LEARNING),
    ("Rollouts", "rollouts", ROLLOUTS),
    ("Length reward and choice of problems", "shaping", SHAPING),
    ("Do trainer and engine agree?", "agreement", AGREEMENT),
    ("Weight syncs by deltas", "deltas", DELTAS),
    ("Time", "time", TIMES),
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A chart drawn for both kinds of background, as data: URIs."""

    chart: Chart
    light: str
    dark: str


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of the run. default: None where this version has no such option."""

    name: str
    value: str
    default: str | None

    @property
    def changed(self) -> bool:
        """Whether the run differs from the defaults here."""
        return self.default is not None and self.value != self.default


@dataclasses.dataclass(frozen=True)
class Pair:
    """What the model wrote for one problem before and after RL; None where it was not asked."""

    prompt: str
    answer: str
    before: Sample | None
    after: Sample | None


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from the other files of the run in `folder`; returns its path.

    Reads config.json, and what there is of metrics.jsonl, summary.json, samples.jsonl and
    machine.json, so that a run can be reported on while it goes on, and after it has failed.
    Raises RunFolderError naming the file (and line) that cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise RunFolderError(
            f"{folder} is not the folder of a run: it holds no config.json; name a folder in runs/ "
            "or what --out named"
        )
    config = read_object(folder / "config.json")
    history = _history(folder, config)
    pairs = _pairs(_read_if_there(folder / "samples.jsonl", read_samples, []))
    machine = _read_if_there(
        folder / "machine.json", partial(read_record, kind=MachineRecord), None
    )
    sections = ((title, anchor, _pictures(charts, history)) for title, anchor, charts in _SECTIONS)
    page = _template().render(
        name=folder.resolve().name,
        steps=history.steps,
        planned=config.get("steps"),
        summary=history.summary,
        sections=[section for section in sections if section[2]],
        phases=_phase_rows(history) if history.steps else [],
        pairs=pairs,
        options=_options(config),
        machine=machine,
        outcome=_outcome(history.summary) if history.summary else [],
    )
    path = folder / "report.html"
    unfinished = path.with_suffix(".html.partial")
    unfinished.write_bytes(page.encode("utf-8", "replace"))  # a lone surrogate has no UTF-8
    os.replace(unfinished, path)
    return path


def _read_if_there(path: Path, read: Callable[[Path], Read], otherwise: Else) -> Read | Else:
    return read(path) if path.exists() else otherwise


def _history(folder: Path, config: dict[str, Any]) -> History:
    summary = _read_if_there(folder / "summary.json", partial(read_record, kind=Summary), None)
    steps = _read_if_there(folder / "metrics.jsonl", read_metrics, [])
    bound = summary.logprob_gap_bound if summary else _gap_bound(config)
    sft = _read_if_there(folder / "sft.jsonl", read_sft, [])
    return History(steps, summary, bound, sft, read_rollouts(folder))


def _gap_bound(config: dict[str, Any]) -> float | None:
    """What the summary of a run that goes on will say."""
    bounds = {str(dtype): bound for dtype, bound in LOGPROB_GAP_BOUNDS.items()}
    return bounds.get(str(config.get("wire_dtype")))


def _pictures(charts: tuple[Chart, ...], history: History) -> list[Picture]:
    drawn = [(chart, chart_svg(chart, history)) for chart in charts if history.has(chart.needs)]
    return [Picture(chart, _data_uri(svg), _data_uri(on_dark(svg))) for chart, svg in drawn]


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _phase_rows(history: History) -> list[tuple[str, str, str]]:
    """Phase, its median, its share of all the time."""
    seconds = history.phase_seconds()
    whole = sum(map(sum, seconds.values()))
    return [
        (phase, _seconds(statistics.median(each)), f"{sum(each) / whole:.1%}" if whole else "")
        for phase, each in seconds.items()
    ]


def _pairs(samples: list[Sample]) -> list[Pair]:
    found = {(one.when, one.prompt): one for one in samples}
    answers = {one.prompt: one.answer for one in samples}
    return [
        Pair(prompt, answer, found.get(("before", prompt)), found.get(("after", prompt)))
        for prompt, answer in answers.items()
    ]


def _options(config: dict[str, Any]) -> list[Option]:
    defaults = dict(_flat(json.loads(json.dumps(dataclasses.asdict(TrainConfig()), default=str))))
    return [Option(name, value, defaults.get(name)) for name, value in _flat(config)]


def _flat(config: dict[str, Any], prefix: str = "--") -> Iterator[tuple[str, str]]:
    """The options as one writes them on the command line, with their values."""
    for name, value in config.items():
        if prefix == "--" and name == "command":
            continue
        option = prefix + name.replace("_", "-")
        if isinstance(value, dict):
            yield from _flat(value, option + ".")
        else:
            yield option, value if isinstance(value, str) else json.dumps(value)


def _outcome(summary: Summary) -> list[tuple[str, str]]:
    """The rows of the outcome's table: what was measured, and the value."""
    return [
        (_LABELS.get(field.name, field.name.replace("_", " ")), _number(field.name, value))
        for field in dataclasses.fields(summary)
        if (value := getattr(summary, field.name)) is not None
    ]


def _number(name: str, value: object) -> str:
    """`value` as a person reads it; `name` says its unit."""
    if "bytes" in name and isinstance(value, int):
        return f"{value / 1e6:,.1f} MB"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)
    if "seconds" in name:
        return _seconds(value)
    if "gap" in name:
        return f"{value:.1e}"
    if "density" in name:
        return f"{value:.2%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1e3:.0f} ms"
    return f"{value:.1f} s" if value < 600 else f"{value / 60:,.0f} min"


_LABELS = {
    "status": "how the run ended",
    "pass_rate_before": "held-out pass rate before RL, temperature 1",
    "pass_rate_after": "held-out pass rate after RL, temperature 1",
    "greedy_before": "held-out pass rate before RL, greedy",
    "greedy_after": "held-out pass rate after RL, greedy",
    "length_before": "mean completion length before RL, temperature 1, tokens",
    "length_after": "mean completion length after RL, temperature 1, tokens",
    "correct_length_before": "of right completions before RL, tokens",
    "correct_length_after": "of right completions after RL, tokens",
    "resumed_at": "resumed after the RL steps",
    "steps": "RL steps",
    "wall_seconds": "wall time, starts and measurements included",
    "syncs": "weight syncs",
    "sync_seconds_median": "median time of a sync",
    "sync_bytes_total": "bytes of weights written in the engines by syncs",
    "digest_checks": "tensors compared by digest",
    "digest_mismatches": "versions refused because a digest differed",
    "logprob_gap_max": "trainer against engine, worst mean of a step, nats per token",
    "logprob_gap_bound": "its bound",
    "logprob_gap_exceeded_at": "step that first exceeded the bound (the engine was frozen)",
    "probe_gap_max": "trainer against engine, largest on the probe, nats",
    "rollout_tokens_per_second": "sampling, tokens per second",
    "delta_density_median": "weights that changed from one version to the next, median",
    "delta_bytes_total": "bytes that the engines received",
    "full_bytes_total": "bytes that they would have received in full",
    "control_compared": "versions in which the control engine computed the same bits",
}


def _template() -> jinja2.Template:
    environment = jinja2.Environment(  # completions are foreign text: everything is escaped
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["seconds"] = _seconds
    source = Path(__file__).with_name("report.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)
