"""`python -m bench` lists the benchmarks, `python -m bench NAME` runs one."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import bench
from bench.harness import Case, Record, machine, measure_all


def names() -> list[str]:
    """The benchmarks: the modules here that define `GROUPS`; a package is a part of one, or, as
    bench.density, a study with a command of its own."""
    found = (
        m.name
        for m in pkgutil.iter_modules(bench.__path__)
        if not m.ispkg and m.name not in {"__main__", "ceiling", "harness", "kimi_k2"}
    )
    return sorted(found)


def run(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = "",
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    repeats: int = 9,
    only: tuple[str, ...] = (),
) -> int:
    """Run the benchmark NAME; without a name, list what there is.

    Every case checks its answer, then times ours and its peers in turn; it says on stderr when it
    is done, the results come at the end. All of `reshard` takes ten minutes or more: one plan of
    mooncake.reshard takes over a minute, and so does tracing Kimi-K2 for the first time. Exit
    status 1: a wrong answer.

    Args:
        name: Which benchmark.
        json_file: Also write the records to this file, anew after each case.
        repeats: Timed runs of ours and of each peer; a peer that takes a minute gets one.
        only: These groups of cases alone; a name that is none lists them.
    """
    console = Console(width=None if sys.stdout.isatty() else 110)
    if not name:
        for each in names():
            summary = (importlib.import_module(f"bench.{each}").__doc__ or "").partition("\n")[0]
            console.print(f"  {each:<12}{summary}", highlight=False)
        return 0
    if name not in names():
        console.print(f"there is no benchmark {name!r}; there are: {', '.join(names())}")
        return 2
    if json_file is not None and not json_file.parent.is_dir():
        console.print(f"--json: there is no folder {json_file.parent}")
        return 2
    if repeats < 1:
        console.print(f"--repeats is {repeats}; it must be 1 at least")
        return 2
    groups = importlib.import_module(f"bench.{name}").GROUPS
    if unknown := [group for group in only if group not in groups]:
        console.print(f"--only: {name} has no group {unknown[0]!r}; it has: {', '.join(groups)}")
        return 2
    records: list[Record] = []
    for record in _measured(name, [groups[group] for group in only or groups], repeats):
        records.append(record)
        if json_file is not None:
            text = json.dumps([asdict(each) for each in records], indent=2)
            json_file.write_text(text + "\n")
    console.print(_table(records))
    for record in records:
        if record.parts is not None:
            console.print(f"\n  {record.case}, medians in ms", highlight=False)
            console.print(_parts(record.parts))
        if record.figures is not None:
            console.print(f"\n  {record.case}", highlight=False)
            console.print(_parts(record.figures, digits=3))
    console.print(
        f"{machine()}; medians of {repeats} interleaved runs, extremes in brackets", highlight=False
    )
    return 0 if all(record.correct for record in records) else 1


def _measured(
    name: str, groups: Iterable[Callable[[], Iterator[Case]]], repeats: int
) -> Iterator[Record]:
    """Case after case, telling on stderr what goes on and what is done."""
    told = Console(stderr=True, markup=False, highlight=False)
    with told.status("the first case is made") as status:
        started = time.monotonic()
        for number, case in enumerate(chain.from_iterable(g() for g in groups), start=1):
            title = f"case {number}: {case.name}"

            def tell(what: str, title: str = title) -> None:
                status.update(f"{title}: {what}")

            yield from measure_all(name, case, repeats, tell)
            told.print(f"{time.monotonic() - started:7.1f} s  {title}", soft_wrap=True)
            started = time.monotonic()
            status.update(f"case {number + 1} is made")


def _table(records: list[Record]) -> Table:
    table = Table(box=None, padding=(0, 2))
    for column, justify in (
        ("case", "left"),
        ("kimisys", "right"),
        ("peer", "right"),
        ("", "left"),
        ("ratio", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for r in records:
        if not r.correct:
            table.add_row(r.case, "[red]wrong answer[/]", "", "", "")
            continue
        own = escape(f"{r.value:.2f} {r.unit} [{r.low:.2f} {r.high:.2f}]")
        for i, peer in enumerate(r.peers):
            first = ("", "") if i else (r.case, own)
            name = peer.name if peer.rounds == r.rounds else f"{peer.name} (x{peer.rounds})"
            table.add_row(*first, f"{peer.value:.2f} {r.unit}", escape(name), f"{peer.ratio:.2f}")
        if not r.peers:
            table.add_row(r.case, own, "", "", "")
    return table


def _parts(parts: dict[str, float], digits: int = 0) -> Table:
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    for part, value in parts.items():
        table.add_row(part, f"{value:,.{digits}f}")
    return table


if __name__ == "__main__":
    sys.exit(tyro.cli(run, prog="python -m bench"))
