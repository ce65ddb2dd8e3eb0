"""Texts that do not loop: those that come with a Python environment, and scratchpads of numbers."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from kimisys.trainer.arithmetic import write_out

SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SHARED_TEXTS = Path("/usr/share/doc"), Path("/usr/share/common-licenses")
LONGEST = 200_000  # characters of one document


def documents(kind: str, characters: int, seed: int) -> list[str]:
    """Different documents of a kind, `characters` in all or as many as there are, in an order
    drawn from `seed`."""
    chosen: list[str] = []
    seen: set[bytes] = set()
    total = 0
    for text in KINDS[kind](random.Random(seed)):
        text = text[:LONGEST]
        digest = hashlib.sha256(text.encode(errors="replace")).digest()
        if len(text) < 200 or digest in seen:
            continue
        seen.add(digest)
        chosen.append(text)
        total += len(text)
        if total >= characters:
            break
    return chosen


def _prose(source: random.Random) -> Iterator[str]:
    """Licences, manuals and descriptions of packages, and Python's own language reference."""
    from pydoc_data.topics import topics

    yield from topics.values()
    paths = [
        *SITE_PACKAGES.glob("*.dist-info/**/*LICENSE*"),
        *SITE_PACKAGES.glob("*.dist-info/METADATA"),
        *SITE_PACKAGES.rglob("*.md"),
        *SITE_PACKAGES.rglob("*.rst"),
    ]
    for folder in SHARED_TEXTS:
        names = ("copyright", "README*", "NEWS*", "changelog*", "GPL*", "LGPL*", "Apache*")
        paths += (path for name in names for path in folder.rglob(name))
    yield from _read(paths, source)


def _code(source: random.Random) -> Iterator[str]:
    """Python sources: of the packages and of the standard library."""
    folders = (SITE_PACKAGES, STANDARD_LIBRARY)
    yield from _read([path for f in folders for path in f.rglob("*.py")], source)


def _read(paths: list[Path], source: random.Random) -> Iterator[str]:
    chosen = sorted({path for path in paths if path.is_file()})
    source.shuffle(chosen)
    for path in chosen:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        try:
            yield data.decode()
        except UnicodeDecodeError:
            continue  # not a text in UTF-8


def _additions(source: random.Random) -> Iterator[str]:
    """Chains of written-out additions, one after the other, of 2 to 40 digits."""
    while True:
        digits = source.choice([2, 3, 5, 8, 12, 20, 40])
        lines = []
        for _ in range(source.randrange(20, 200)):
            a, b = (source.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
            lines.append(f"{a}+{b}={write_out(a, b, 0.3, 0.2, source)}\n")
        yield "".join(lines)


def _columns(source: random.Random) -> Iterator[str]:
    """Sums of long columns with a running total, primes, squares, powers, long divisions."""
    while True:
        total, lines = 0, []
        for i in range(source.randrange(30, 300)):
            value = source.randrange(10 ** source.randrange(1, 7))
            total += value
            lines.append(f"Step {i + 1}: add {value}, so the running total is {total}.\n")
        yield "".join(lines)
        start = source.randrange(1, 1000)
        yield "".join(f"{i}^2 = {i * i}, {i}^3 = {i**3}\n" for i in range(start, start + 120))
        yield "".join(_division(source.randrange(1, 7), source.randrange(7, 9973)))
        modulus = source.randrange(100, 999)
        yield "\n".join(f"{source.randrange(99999)} mod {modulus}" for _ in range(200))


def _division(rest: int, divisor: int) -> Iterator[str]:
    """Long division, up to where the decimals come round: from there on it would be a loop."""
    seen: set[int] = set()
    while rest and rest not in seen and len(seen) < 1000:
        seen.add(rest)
        quotient, left = divmod(rest * 10, divisor)
        yield f"{rest * 10} / {divisor} = {quotient} remainder {left}; "
        rest = left


def _tables(source: random.Random) -> Iterator[str]:
    """Tables of numbers: comma-separated, aligned, Markdown, JSON."""
    while True:
        rows, width = source.randrange(20, 150), source.randrange(3, 9)
        cells = [[source.gauss(0, 100) for _ in range(width)] for _ in range(rows)]
        yield "\n".join(",".join(f"{cell:.3f}" for cell in row) for row in cells)
        yield "\n".join(" ".join(f"{cell:10.2f}" for cell in row) for row in cells)
        yield "\n".join("| " + " | ".join(str(round(cell)) for cell in row) + " |" for row in cells)
        records = [
            {"id": i, "x": round(row[0], 3), "ok": row[1] > 0, "n": round(row[2])}
            for i, row in enumerate(cells)
        ]
        yield json.dumps(records, indent=source.choice([None, 2]))
        yield "\n".join(" ".join(f"{i}*{j}={i * j}" for j in range(1, 10)) for i in range(1, rows))


def _logs(source: random.Random) -> Iterator[str]:
    """Logs of requests, of training, and of a package manager."""
    names = ["worker", "engine", "trainer", "scheduler", "store"]
    while True:
        seconds, lines = source.randrange(10**6), []
        for _ in range(source.randrange(50, 300)):
            seconds += source.randrange(1, 90)
            clock = f"{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            level = source.choices(["INFO", "WARNING", "DEBUG"], [8, 1, 3])[0]
            what = source.choice(["took", "wrote", "read", "sent"])
            lines.append(
                f"2026-03-{1 + seconds // 86400 % 28:02} {clock} {level} "
                f"{source.choice(names)}[{source.randrange(9999)}]: {what} "
                f"{source.randrange(10**6)} bytes in {source.random():.3f} s\n"
            )
        yield "".join(lines)
        loss, lines = 5.0, []
        for step in range(200):
            loss *= source.uniform(0.97, 1.02)
            lines.append(f"step {step:6d} loss {loss:.4f} grad_norm {source.random():.3f}\n")
        yield "".join(lines)
        address = f"10.0.{source.randrange(256)}"
        yield "".join(
            f'{address}.{source.randrange(256)} - - "GET /item/{source.randrange(9999)} HTTP/1.1" '
            f"200 {source.randrange(9999)}\n"
            for _ in range(150)
        )


KINDS: dict[str, Callable[[random.Random], Iterator[str]]] = {
    "prose": _prose,
    "code": _code,
    "additions": _additions,
    "columns": _columns,
    "tables": _tables,
    "logs": _logs,
}
"""What the study reads: each gives documents, in an order that the generator decides."""
