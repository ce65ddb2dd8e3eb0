"""Measured policies as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from kimisys.rollout.measure import Floor, Measured, Setting
from kimisys.rollout.policies import policies

_COLUMNS = (
    "policy", "knob", "s/batch", "tokens/s", "x", "busy", "recomputed", "stale (most)", "length",
)  # fmt: skip


def comparison_table(measured: Sequence[Measured], best: Floor | None, setting: Setting) -> Table:
    """A row for each policy; x: tokens per second against group_round_robin's (without it, against
    the first one's). Below, for whole iterations, the best schedule of known lengths and a bound.
    """
    table = Table(
        box=None,
        padding=(0, 1),
        caption="tokens: those trained, a second; busy: of the engines' time; recomputed: KV made "
        "again, per token made; stale: versions, the mean and the most; length: of what was "
        "trained, against what was dispatched",
        caption_justify="left",
    )
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in {"policy", "knob"} else "right")
    against = next((one for one in measured if one.policy == "group_round_robin"), measured[0])
    known = policies()
    for whole in (True, False):
        rows = [one for one in measured if known[one.policy].whole is whole]
        if rows:
            title = "whole iterations" if whole else "the unfinished go on"
            table.add_row(Text(title, "bold"))
        for one in rows:
            table.add_row(*_row(one, against))
        if rows and whole and best is not None:
            for line in _floor(best, against):
                table.add_row(*line)
    return table


def _row(one: Measured, against: Measured) -> list[str]:
    knob = policies()[one.policy].knob
    value = one.knob if one.knob is not None else next(iter(policies()[one.policy].knob_values), 0)
    per_batch = one.seconds * against.groups / len(against.iterations) / max(1, one.groups)
    return [
        f"  {one.policy}",
        f"{knob} {value:g}" if knob else "",
        f"{per_batch:,.1f}",
        f"{one.speed:,.0f}",
        f"{one.speed / against.speed:.2f}",
        f"{one.utilisation:.0%}",
        f"{one.recomputed_share:.1%}",
        f"{one.staleness:.2f} ({one.staleness_most})",
        f"{one.bias:.2f}",
    ]


def _floor(best: Floor, against: Measured) -> list[list[str]]:
    """The rows of what no online policy can know."""
    tokens = against.tokens / len(against.iterations) * best.batches
    rows = []
    for name, seconds in (
        (f"  offline, best of {best.evaluations:,}", best.schedule),
        ("  lower bound", best.bound),
    ):
        if seconds is not None:
            speed = tokens / seconds
            rows.append(
                [name, "", f"{seconds / best.batches:,.1f}", f"{speed:,.0f}",
                 f"{speed / against.speed:.2f}"]
            )  # fmt: skip
    return rows


def policy_list() -> Table:
    """What each policy does, and its knob."""
    table = Table(box=None, padding=(0, 2))
    for column in ("policy", "what it does", "knob"):
        table.add_column(column)
    for policy in policies().values():
        table.add_row(policy.name, policy.says, policy.knob)
    return table
