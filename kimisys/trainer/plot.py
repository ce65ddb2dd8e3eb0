"""The pictures of a run: every curve of the report, and the README's curve.png."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator

from kimisys.trainer.metrics import SftMetrics, StepMetrics, Summary
from kimisys.trainer.rollout_records import Rollouts

PHASES = ("rollout", "score", "train", "sync")
_MARKED_UP_TO = 40  # steps: beyond that, marks on a line are mush


@dataclass(frozen=True)
class History:
    """What is drawn: the steps of a run, its outcome if it has ended, and the bound of its
    log-probability gap, per token, if that is known."""

    steps: Sequence[StepMetrics]
    summary: Summary | None
    gap_bound: float | None
    sft: Sequence[SftMetrics] = ()
    """The supervised steps before."""
    rollouts: Rollouts | None = None
    """Segments as they ran, if the run has written them down."""

    @property
    def numbers(self) -> list[int]:
        """The numbers of the steps."""
        return [s.step for s in self.steps]

    def values(self, name: str) -> list[float]:
        """A metric at every step; NaN where it is not known or not finite."""
        known = [getattr(s, name) for s in self.steps]
        return [v if v is not None and math.isfinite(v) else math.nan for v in known]

    def has(self, name: str) -> bool:
        """Whether any step knows this metric; "sft", "rollouts": whether there were any."""
        if name == "sft":
            return bool(self.sft)
        if name == "rollouts":
            return self.rollouts is not None
        return any(getattr(s, name) is not None for s in self.steps)

    def phase_seconds(self) -> dict[str, list[float]]:
        """The seconds of each phase at every step; "other" is what is left of the step's time."""
        seconds = {phase: self.values(f"{phase}_seconds") for phase in PHASES}
        parts = zip(*seconds.values(), strict=True)
        whole = self.values("step_seconds")
        other = [max(0.0, all_ - sum(part)) for all_, part in zip(whole, parts, strict=True)]
        return {**seconds, "other": other}


@dataclass(frozen=True)
class Chart:
    """One picture. reading: how a newcomer reads it. needs: the metric without which there is
    nothing to draw. draw: puts the curves of a history on empty axes."""

    title: str
    reading: str
    unit: str
    needs: str
    draw: Callable[[Axes, History], None]
    steps: str = "RL step"


def draw_lines(**labels: str) -> Callable[[Axes, History], None]:
    """Draws one line for each metric that is known; keys are metrics, values labels."""

    def draw(axes: Axes, history: History) -> None:
        marker = "." if len(history.steps) <= _MARKED_UP_TO else ""
        for name, label in labels.items():
            if history.has(name):
                axes.plot(history.numbers, history.values(name), marker=marker, label=label)

    return draw


def draw_pass_rate(axes: Axes, history: History) -> None:
    """The pass rate in training, and before and after RL on the held-out problems."""
    draw_lines(pass_rate="training")(axes, history)
    summary = history.summary
    if summary is not None:
        ends = (0, max(history.numbers, default=0))
        for before, after, mark, label in (
            (summary.pass_rate_before, summary.pass_rate_after, "C1o", "held out, sampled"),
            (summary.greedy_before, summary.greedy_after, "C2s", "held out, greedy"),
        ):
            marks = [(x, y) for x, y in zip(ends, (before, after), strict=True) if y is not None]
            if marks:
                xs, ys = zip(*marks, strict=True)
                axes.plot(xs, ys, mark, label=label, markersize=8, fillstyle="none", mew=2)
    axes.set_ylim(0, 1.04)


def draw_phases(axes: Axes, history: History) -> None:
    """The seconds of each phase, stacked up to the whole step."""
    if not history.steps:
        return
    edges = [n - 0.5 for n in history.numbers] + [history.numbers[-1] + 0.5]
    below = [0.0] * len(history.steps)
    for i, (phase, seconds) in enumerate(history.phase_seconds().items()):
        top = [b + s for b, s in zip(below, seconds, strict=True)]
        axes.stairs(top, edges, baseline=below, fill=True, color=f"C{i}", label=phase)
        below = top
    axes.set_ylim(bottom=0)


def draw_gaps(axes: Axes, history: History) -> None:
    """How far trainer and engine differ in log-probability, on a logarithmic scale."""
    draw_lines(logprob_gap="mean", probe_gap="largest on a probe")(axes, history)
    axes.set_yscale("log", nonpositive="mask")
    if history.gap_bound is not None:
        axes.axhline(history.gap_bound, color="C3", linestyle="--", label="bound of the mean")
    elif not any(v > 0 for name in ("logprob_gap", "probe_gap") for v in history.values(name)):
        axes.set_yscale("linear")  # nothing but zeros has no logarithm


def _draw_sft(axes: Axes, history: History) -> None:
    axes.plot([s.step for s in history.sft], [s.loss for s in history.sft])
    axes.set_ylim(bottom=0)


def _draw_sync(axes: Axes, history: History) -> None:
    marker = "." if len(history.steps) <= _MARKED_UP_TO else ""
    milliseconds = [1e3 * s for s in history.values("sync_seconds")]
    axes.plot(history.numbers, milliseconds, marker=marker)
    axes.set_ylim(bottom=0)


def _draw_received(axes: Axes, history: History) -> None:
    marker = "." if len(history.steps) <= _MARKED_UP_TO else ""
    for name, label in (("delta_bytes", "received"), ("full_bytes", "in full")):
        megabytes = [v / 1e6 for v in history.values(name)]
        axes.plot(history.numbers, megabytes, marker=marker, label=label)
    axes.set_ylim(bottom=0)


def _draw_density(axes: Axes, history: History) -> None:
    marker = "." if len(history.steps) <= _MARKED_UP_TO else ""
    axes.plot(history.numbers, [1e2 * v for v in history.values("delta_density")], marker=marker)
    axes.set_ylim(bottom=0)


PASS_RATE = Chart(
    "Pass rate",
    "The share of right answers. The line is measured on each step's own samples, circles and "
    "squares on held-out problems before and after RL. Sampled: at temperature 1, as in training. "
    "Greedy: always the likeliest token.",
    "share of answers",
    "pass_rate",
    draw_pass_rate,
)
TIME = Chart(
    "Where a step's time goes",
    "rollout: the engine samples. score: the trainer computes the same tokens' log-probabilities. "
    "train: gradient steps. sync: new weights reach the engine. other: what is left.",
    "seconds",
    "step_seconds",
    draw_phases,
)
LENGTH = Chart(
    "Length of right answers",
    "The length reward prefers the short ones among right answers: with it, the line of right "
    "answers falls while the pass rate holds.",
    "tokens",
    "correct_length",
    draw_lines(correct_length="right answers", completion_length="all completions"),
)
WARM_UP = (
    Chart(
        "Supervised loss",
        "Mean cross-entropy of the demonstrations' tokens, before RL begins.",
        "nats per token",
        "sft",
        _draw_sft,
        "SFT step",
    ),
)
LEARNING = (
    PASS_RATE,
    Chart(
        "Reward",
        "What RL maximises, as a mean over the step's samples. It equals the pass rate where a "
        "right answer earns 1 and nothing else counts.",
        "mean reward",
        "reward",
        draw_lines(reward="reward", length_reward="of it, for the length"),
    ),
    Chart(
        "Length of completions",
        "Tokens that the model writes before it stops or is cut off. A jump often means that it "
        "has forgotten how to stop.",
        "tokens",
        "completion_length",
        draw_lines(completion_length="all completions"),
    ),
    Chart(
        "Loss",
        "The surrogate of Kimi k1.5. It falls below 0 when right answers become likelier. Each "
        "step has a new objective, so its level says little; a blow-up says much.",
        "loss",
        "loss",
        draw_lines(loss="loss"),
    ),
    Chart(
        "Divergence",
        "How far one step moves the policy: the estimated KL divergence from its first policy to "
        "its last. τ holds it down.",
        "nats per completion",
        "divergence",
        draw_lines(divergence="divergence"),
    ),
    Chart(
        "Gradient norm",
        "Its size before clipping. Peaks are steps that --clip-gradient has tamed.",
        "norm",
        "gradient_norm",
        draw_lines(gradient_norm="norm"),
    ),
)
SHAPING = (
    LENGTH,
    Chart(
        "Length reward",
        "What it adds to the mean reward. It compares the samples of one problem: right answers "
        "gain when they are short and lose when they are long; wrong ones can only lose.",
        "reward",
        "length_reward",
        draw_lines(length_reward="length reward"),
    ),
    Chart(
        "Difficulty of the problems drawn",
        "The curriculum goes from easy to hard; prioritised sampling prefers what still fails.",
        "mean difficulty",
        "difficulty",
        draw_lines(difficulty="difficulty"),
    ),
    Chart(
        "Tracked success rate",
        "Of the admitted problems, as the sampler remembers them. A problem is drawn in proportion "
        "to 1 minus its success rate.",
        "mean success rate",
        "success_rate",
        draw_lines(success_rate="success rate"),
    ),
    Chart(
        "Admitted problems",
        "How many problems the curriculum lets the sampler choose from.",
        "problems",
        "admitted",
        draw_lines(admitted="problems"),
    ),
)
AGREEMENT = (
    Chart(
        "Trainer against engine",
        "Both compute the same tokens' log-probabilities, and rounding alone keeps them apart. A "
        "mean above the dashed line says that the engine serves other weights than it should.",
        "nats per token",
        "logprob_gap",
        draw_gaps,
    ),
    Chart(
        "Weight sync",
        "From publishing the new weights to serving them, digests verified.",
        "milliseconds",
        "sync_seconds",
        _draw_sync,
    ),
)
DELTAS = (
    Chart(
        "Bytes of a sync",
        "What the engines received, beside what they would have received had every tensor come "
        "whole. The two meet where nearly every weight changes: then blocks are sent whole.",
        "megabytes",
        "delta_bytes",
        _draw_received,
    ),
    Chart(
        "Changed weights",
        "The share of the published weights whose bits changed in a step. It falls with the "
        "learning rate, and with the precision of --wire-dtype.",
        "per cent",
        "delta_density",
        _draw_density,
    ),
)
TIMES = (
    TIME,
    Chart(
        "Sampling speed",
        "Tokens that the engine writes in a second of rollout.",
        "tokens per second",
        "rollout_tokens_per_second",
        draw_lines(rollout_tokens_per_second="tokens per second"),
    ),
)

_INK, _FAINT = "#3b4450", "#d5dae0"
_SERIES = ("#2f6db3", "#e08a2e", "#3a9b74", "#c8504f", "#9aa4b0")
_ON_DARK = {
    **{_INK: "#c3ccd6", _FAINT: "#3a4452"},
    **dict(zip(_SERIES, ("#6cabea", "#f0a860", "#63c69c", "#ee7f7c", "#6f7b89"), strict=True)),
}
"""The colour that a dark background needs for each of ours."""

_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), _FAINT),
    "axes.prop_cycle": cycler(color=_SERIES),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": "medium",
    "legend.handlelength": 1.1,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.1,
    "lines.linewidth": 1.8,
    "font.size": 9.0,
    "svg.hashsalt": "kimisys",  # equal runs give equal files
}


def chart_svg(chart: Chart, history: History) -> str:
    """`chart` as SVG on a transparent background, letters as outlines (they look the same without
    the font)."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.3, 2.65), layout="constrained")  # inches of 96 CSS pixels
        _draw(figure.subplots(), chart, history)
        file = BytesIO()
        # the resolution is of what is drawn as pixels: pictures of thousands of segments
        figure.savefig(file, format="svg", metadata={"Date": None}, dpi=192)
    return file.getvalue().decode()


def on_dark(svg: str) -> str:
    """What `chart_svg` drew, in the colours that a dark background needs."""
    for light, dark in _ON_DARK.items():
        svg = svg.replace(light, dark)
    return svg


def plot_run(path: Path, steps: Sequence[StepMetrics], summary: Summary) -> None:
    """Pass rate in training and on the held-out problems, lengths, and the time of each phase, as
    one PNG."""
    history = History(steps, summary, summary.logprob_gap_bound)
    with rc_context({**_STYLE, "font.size": 10, "savefig.facecolor": "white"}):
        figure = Figure(figsize=(15, 3.8), layout="constrained")  # not pyplot: no display, no state
        for axes, chart in zip(figure.subplots(1, 3), (PASS_RATE, LENGTH, TIME), strict=True):
            _draw(axes, chart, history)
            axes.set_title(chart.title, pad=24)  # above the legend
        figure.savefig(path, dpi=110)


def _draw(axes: Axes, chart: Chart, history: History) -> None:
    chart.draw(axes, history)
    axes.set(xlabel=chart.steps, ylabel=chart.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    _, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:  # above the axes: there it hides no curve
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(labels))
