"""What a person sees while a run goes on: the phase, and a table with one row a step."""

from __future__ import annotations

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from kimisys.trainer.metrics import StepMetrics, Summary

_COLUMNS = ("step", "reward", "pass rate", "length", "tokens/s", "sync ms", "gap", "loss", "s/step")
_ROWS_SHOWN = 18


class Display:
    """A live table on a terminal; one line a step where the output is a file or a pipe."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        self._rows: list[tuple[str, ...]] = []
        self._phase = "starting"
        self._live = Live(self, console=console, refresh_per_second=8, transient=False)

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._phase = ""
        if self._console.is_terminal:
            self._live.stop()

    def phase(self, text: str) -> None:
        """What goes on now, until the next call."""
        self._phase = text
        if not self._console.is_terminal:
            self.note(text)

    def within_step(self, step: int, text: str) -> None:
        """What goes on inside a step; its row will say the rest, so only a terminal shows it."""
        self._phase = f"step {step}/{self._steps}: {text}"

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text), soft_wrap=True)

    def step(self, metrics: StepMetrics) -> None:
        """Add the row of one finished step."""
        row = (
            f"{metrics.step}/{self._steps}",
            f"{metrics.reward:.3f}",
            f"{metrics.pass_rate:.3f}",
            f"{metrics.completion_length:.1f}",
            f"{metrics.rollout_tokens_per_second:,.0f}",
            f"{metrics.sync_seconds * 1e3:.0f}",
            "" if metrics.logprob_gap is None else f"{metrics.logprob_gap:.1e}",
            f"{metrics.loss:+.3f}",
            f"{metrics.step_seconds:.1f}",
        )
        self._rows.append(row)
        if not self._console.is_terminal:
            if len(self._rows) == 1:
                self.note(" ".join(f"{name:>9}" for name in _COLUMNS))
            self.note(" ".join(f"{cell:>9}" for cell in row))

    def __rich__(self) -> Group:
        table = Table(box=None, padding=(0, 2))
        for name in _COLUMNS:
            table.add_column(name, justify="right")
        for row in self._rows[-_ROWS_SHOWN:]:
            table.add_row(*row)
        parts: list[Table | Spinner] = [table] if self._rows else []
        if self._phase:
            parts.append(Spinner("dots", self._phase))
        return Group(*parts)


def print_summary(console: Console, summary: Summary) -> None:
    """The outcome, as a person wants to read it."""
    table = Table(box=None, padding=(0, 2), show_header=False)
    if summary.steps:
        _add_reinforcement(table, summary)
    table.add_row("wall time", f"{summary.wall_seconds:.0f} s")
    console.print(table, soft_wrap=True)


def _add_deltas(table: Table, summary: Summary) -> None:
    if summary.delta_bytes_total is None or summary.full_bytes_total is None:
        return
    received = (
        f"{summary.delta_bytes_total / 1e6:.1f} MB, "
        f"{summary.full_bytes_total / 1e6:.1f} MB if every version had come whole"
    )
    if summary.delta_density_median is not None:
        received += f"; {summary.delta_density_median:.2%} of the weights change, in the median"
    table.add_row("received by the engines", received)
    if summary.control_compared is not None:
        agreed = f"computed the same bits in each of {summary.control_compared} versions"
        table.add_row("the control engine", agreed)


def _add_rollouts(table: Table, summary: Summary) -> None:
    told = f"{summary.steps} steps, {summary.rollout_tokens_per_second:,.0f} tokens/s"
    if summary.utilisation is not None:
        told += f"; something ran in {summary.utilisation:.0%} of the engines' time"
    table.add_row("rollouts", told)
    if summary.token_budget is not None:
        told = f"{summary.token_budget:,} tokens"
        if summary.continued is not None and summary.staleness_mean is not None:
            told += (
                f"; {summary.continued:.0%} of the completions were continued under newer weights; "
                f"a token is {summary.staleness_mean:.1f} versions old in the mean, "
                f"{summary.staleness_max} at most"
            )
        table.add_row("budget of a step", told)
    if summary.dropped_total:
        table.add_row("dropped", f"{summary.dropped_total} groups; rollouts/groups.jsonl says why")


def _add_reinforcement(table: Table, summary: Summary) -> None:
    for name, before, after, form in (
        (
            "pass rate (temperature 1, held out)",
            summary.pass_rate_before,
            summary.pass_rate_after,
            ".3f",
        ),
        ("pass rate (greedy, held out)", summary.greedy_before, summary.greedy_after, ".3f"),
        (
            "tokens of a right completion",
            summary.correct_length_before,
            summary.correct_length_after,
            ".1f",
        ),
    ):
        known = [format(value, form) for value in (before, after) if value is not None]
        if known:
            table.add_row(name, " → ".join(known))
    table.add_row(
        "weight syncs",
        f"{summary.syncs}, median {summary.sync_seconds_median * 1e3:.0f} ms, "
        f"{summary.digest_checks} digests compared, {summary.digest_mismatches} versions refused",
    )
    _add_deltas(table, summary)
    table.add_row(
        "trainer against engine",
        f"mean log-probability gap of a step at most {summary.logprob_gap_max:.1e} per token "
        f"(bound {summary.logprob_gap_bound:.0e}); probe at most {summary.probe_gap_max:.1e}",
    )
    _add_rollouts(table, summary)
    if summary.logprob_gap_exceeded_at is not None:
        table.add_row(
            "the engine was frozen",
            f"from step {summary.logprob_gap_exceeded_at} on, its log-probabilities differ from "
            "the trainer's beyond the bound",
        )
