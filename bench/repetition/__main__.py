"""`python -m bench.repetition --json FILE`: run the study, print it, keep its numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from bench.repetition.study import Alarms, Planted, alarms, planted
from bench.repetition.texts import KINDS, documents
from bench.repetition.tokens import characters, trained_bpe, utf8_bytes
from kimisys.rollout import RepetitionConfig


@dataclass(frozen=True)
class Settings:
    """How much is read, and with what settings the detector runs."""

    characters: int = 6_000_000
    """Characters of prose and of code, each; of the other kinds, which are generated, a third."""
    loops: int = 100
    """Loops planted of each kind and period."""
    seed: int = 0
    min_tokens: tuple[int, ...] = (128, 256, 512, 1024)
    min_repeats: tuple[int, ...] = (4, 6, 8)
    agreement: tuple[float, ...] = (0.9, 0.95, 1.0)


def run(
    settings: Annotated[Settings, tyro.conf.arg(name="")],
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """False alarms by kind of text, encoding and configuration; delays on planted loops with the
    default configuration."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    texts = {}
    for kind in KINDS:
        share = 1 if kind in ("prose", "code") else 3
        texts[kind] = documents(kind, settings.characters // share, settings.seed)
    bpe = trained_bpe(text for each in texts.values() for text in each[: len(each) // 4 + 1])
    encodings = {"characters": characters, "bytes": utf8_bytes, "bpe": bpe}
    ids = {
        (kind, name): [encode(text) for text in each]
        for kind, each in texts.items()
        for name, encode in encodings.items()
    }
    record: dict[str, object] = {"settings": asdict(settings), "configs": []}
    grid = [
        RepetitionConfig(min_tokens=tokens, min_repeats=repeats, agreement=agreement)
        for agreement in settings.agreement
        for repeats in settings.min_repeats
        for tokens in settings.min_tokens
    ]
    table = _table("alarms per million tokens", encodings)
    rows = []
    for config in dict.fromkeys([RepetitionConfig(), *grid]):
        found = [alarms(kind, name, each, config) for (kind, name), each in ids.items()]
        rows.append({"config": repr(config), "alarms": [asdict(each) for each in found]})
        table.add_row(*_cells(config, found, list(encodings)))
    record["configs"] = rows
    console.print(table)
    loops = list(planted(ids["prose", "bpe"], RepetitionConfig(), settings.loops, settings.seed))
    record["planted"] = [asdict(each) for each in loops]
    console.print(_delays(loops))
    console.print(", ".join(_size(ids, kind) for kind in KINDS), highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=1) + "\n")


def _size(ids: dict[tuple[str, str], list], kind: str) -> str:
    tokens = {name: sum(map(len, each)) for (k, name), each in ids.items() if k == kind}
    return f"{kind}: {len(ids[kind, 'bpe'])} documents, {tokens['bpe']:,} BPE tokens"


def _table(title: str, encodings: Iterable[str]) -> Table:
    table = Table(box=None, title=f"{title}: {', '.join(encodings)}", title_justify="left")
    for name in ("min_tokens", "min_repeats", "agreement", *KINDS):
        table.add_column(name, justify="right")
    return table


def _cells(config: RepetitionConfig, found: list[Alarms], encodings: list[str]) -> list[str]:
    cells = [str(config.min_tokens), str(config.min_repeats), str(config.agreement)]
    for kind in KINDS:
        rates = {each.encoding: each.per_million for each in found if each.kind == kind}
        cells.append(" ".join(f"{rates[name]:.1f}" for name in encodings))
    return cells


def _delays(loops: list[Planted]) -> Table:
    table = Table(box=None, title="planted loops, defaults, BPE tokens", title_justify="left")
    for name in (
        "kind",
        "period",
        "found",
        "earlier alarm",
        "window",
        "delay (median)",
        "delay (most)",
    ):
        table.add_column(name, justify="right")
    for each in loops:
        share = f"{each.found} of {each.loops}"
        delay = (f"{each.delay:.0f}", str(each.longest_delay))
        table.add_row(
            each.kind, str(each.period), share, str(each.earlier), str(each.window), *delay
        )
    return table


if __name__ == "__main__":
    tyro.cli(run, prog="python -m bench.repetition")
