"""Problem files: JSONL, one problem a line, UTF-8.

    {"prompt": "12+34=", "answer": "46"}
    {"prompt": "5+7=", "answer": "12", "difficulty": 1, "completion": "5+7=12#12"}
    {"prompt": "8+8=", "answer": "16", "split": "held_out"}

`prompt` and `answer` are needed, the others may be left out: `difficulty` is 0 then, and a line
without `completion` is no demonstration. Split: `"split": "held_out"` or `"train"`. If no line of
a file says `held_out`, a hash of the prompt holds out about one in ten of the lines that say
nothing: the same ones in every run, on every machine, whatever else is in the file. The completion
of a held-out problem is not trained on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kimisys.trainer.problem import Demonstration, Problem, TaskError

Split = Literal["train", "held_out"]

HELD_OUT_ONE_IN = 10
_FIELDS = ("prompt", "answer", "completion", "difficulty", "split")


@dataclass(frozen=True)
class ProblemFile:
    """The problems of a file, in its order, and the demonstrations that its training lines hold."""

    problems: tuple[Problem, ...]
    held_out: tuple[Problem, ...]
    demonstrations: tuple[Demonstration, ...]


@dataclass(frozen=True)
class _Line:
    where: str  # file and line, as messages name it
    problem: Problem
    completion: str | None
    split: Split | None


def read_problems(path: str | Path) -> ProblemFile:
    """Read a problem file; the format is at the head of this file.

    Raises TaskError, which names the file and the line, for what is not in the format, for a prompt
    that occurs twice, and when nothing is left to train on or to measure.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from error
    # split at \n alone: a JSON text may hold other line separators of Unicode
    raw = [(f"{path}:{number}", line) for number, line in enumerate(content.split(b"\n"), 1)]
    lines = [_parse(where, line) for where, line in raw if line.strip()]
    _check_distinct(lines)
    explicit = any(line.split == "held_out" for line in lines)
    held_out = [line for line in lines if _is_held_out(line, explicit)]
    train = [line for line in lines if not _is_held_out(line, explicit)]
    for part, name in ((train, "train"), (held_out, "held_out")):
        if not part:
            raise TaskError(
                f"{path} has {len(lines)} problems, but none in its {name} split; "
                f'add problems, or mark some lines with "split": "{name}"'
            )
    return ProblemFile(
        problems=tuple(line.problem for line in train),
        held_out=tuple(line.problem for line in held_out),
        demonstrations=tuple(
            Demonstration(line.problem.prompt, line.completion)
            for line in train
            if line.completion is not None
        ),
    )


def _is_held_out(line: _Line, explicit: bool) -> bool:
    """explicit: whether any line of the file says that it is held out."""
    if explicit or line.split is not None:
        return line.split == "held_out"
    prompt = line.problem.prompt.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(prompt, digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def _check_distinct(lines: list[_Line]) -> None:
    first: dict[str, str] = {}
    for line in lines:
        earlier = first.setdefault(line.problem.prompt, line.where)
        if earlier is not line.where:
            raise TaskError(
                f"{line.where}: the prompt {line.problem.prompt!r} is that of {earlier}; keep one"
            )


def _parse(where: str, raw: bytes) -> _Line:
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: not a line of JSON in UTF-8: {error}") from error
    if not isinstance(values, dict):
        raise TaskError(f'{where}: not an object; write {{"prompt": "...", "answer": "..."}}')
    unknown = sorted(values.keys() - set(_FIELDS))
    if unknown:
        raise TaskError(
            f"{where}: unknown field {unknown[0]!r}; a problem has {', '.join(_FIELDS)}"
        )
    split = values.get("split")
    if split not in (None, "train", "held_out"):
        raise TaskError(f'{where}: split is {split!r}; it is "train" or "held_out"')
    prompt, answer = (_text(where, values, name) for name in ("prompt", "answer"))
    completion = _text(where, values, "completion") if "completion" in values else None
    problem = Problem(prompt, answer, _difficulty(where, values.get("difficulty", 0.0)))
    return _Line(where, problem, completion, split)


def _text(where: str, values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value.strip():
        got = repr(value) if name in values else "missing"
        raise TaskError(f"{where}: {name} is {got}; it must be a text that is not empty")
    return value


def _difficulty(where: str, value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond all floats
            if math.isfinite(value):
                return float(value)
    raise TaskError(f"{where}: difficulty is {value!r}; it must be a finite number")
