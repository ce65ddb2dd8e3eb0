"""What a run writes down: metrics.jsonl, an object a step; samples.jsonl, what the model answers
before and after; summary.json, the outcome."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

import msgspec

from kimisys.errors import KimisysError

Record = TypeVar("Record")


class RunFolderError(KimisysError):
    """A file of a run that cannot be read. The message names it, the line, and the remedy."""


@dataclass(frozen=True)
class StepMetrics:
    """One RL iteration. Times are seconds, lengths tokens, rates tokens per second.

    The fields with a default are known only where the recipe has what they measure.
    """

    step: int
    version: int
    reward: float
    pass_rate: float
    completion_length: float
    tokens: int
    rollout_tokens_per_second: float
    loss: float
    gradient_norm: float
    divergence: float
    logprob_gap: float | None  # None: no token of the step was of the weights that were trained
    probe_gap: float
    sync_bytes: int
    sync_seconds: float
    rollout_seconds: float
    score_seconds: float
    train_seconds: float
    step_seconds: float
    correct_length: float | None = None
    """Mean tokens of the right completions."""
    length_reward: float | None = None
    """Mean part of `reward` that the length reward gave."""
    difficulty: float | None = None
    """Mean difficulty of the problems drawn in this step."""
    success_rate: float | None = None
    """Mean tracked success rate of the admitted problems."""
    admitted: float | None = None
    """Problems that the curriculum has admitted so far."""
    delta_density: float | None = None
    """The share of the published elements whose bits changed; not known of a full publication."""
    delta_bytes: int | None = None
    """Bytes that the engines received."""
    full_bytes: int | None = None
    """Bytes that they would have received in full pulls of the same version."""
    groups: int | None = None
    """Finished groups, which the step trained; `tokens` are those of their completions."""
    made_tokens: int | None = None
    """Tokens that the engines wrote in the step, whichever completion they belong to."""
    token_budget: int | None = None
    """How many they were to write; not known where whole groups are waited for."""
    trained_tokens: int | None = None
    """Of `tokens`, those that count in the loss."""
    masked_tokens: int | None = None
    """Of `tokens`, those that do not: --loss-mask."""
    staleness_mean: float | None = None
    """Versions that a token of the groups is behind the weights that were trained, in the mean."""
    staleness_max: int | None = None
    """That of the stalest token."""
    continued: float | None = None
    """The share of the completions that more than one version wrote."""
    dropped: int | None = None
    """Groups that will never be trained."""
    early_stopped: int | None = None
    """Completions that were ended for repeating themselves."""
    utilisation: float | None = None
    """The share of the step's engine time in which something ran."""
    idle_seconds: float | None = None
    """Engine time in which nothing ran while the batch was waited for."""
    stale_gap: float | None = None
    """As logprob_gap, over the tokens of older versions: how far the policy has moved since."""


@dataclass(frozen=True)
class SftMetrics:
    """One supervised step. loss: mean cross-entropy, nats per token."""

    step: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class Sample:
    """A greedy answer to a held-out problem, before or after RL. tokens: of the completion."""

    when: Literal["before", "after"]
    prompt: str
    answer: str
    completion: str
    finished: bool
    """Whether the model ended it; otherwise the token limit cut it off."""
    reward: float
    tokens: int


@dataclass(frozen=True)
class Summary:
    """The outcome of a run, as `summary.json` holds it. status: "completed", or what ended it."""

    status: str
    pass_rate_before: float | None
    pass_rate_after: float | None
    greedy_before: float | None
    greedy_after: float | None
    length_before: float | None
    length_after: float | None
    correct_length_before: float | None
    correct_length_after: float | None
    steps: int
    resumed_at: list[int]
    wall_seconds: float
    syncs: int
    sync_seconds_median: float
    sync_bytes_total: int
    digest_checks: int
    digest_mismatches: int
    logprob_gap_max: float
    logprob_gap_bound: float
    logprob_gap_exceeded_at: int | None
    probe_gap_max: float
    rollout_tokens_per_second: float
    seed: int
    delta_density_median: float | None = None
    """Of StepMetrics.delta_density, over the versions that had a base; None where none had."""
    delta_bytes_total: int | None = None
    """Bytes that the engines received; like the next one, not known of runs before deltas."""
    full_bytes_total: int | None = None
    """Bytes that full pulls of the same versions would have been."""
    control_compared: int | None = None
    """Versions in which the engines agreed, bit for bit, with --control-engine."""
    groups_total: int | None = None
    """Groups that were trained; like those that follow, not known of runs before the scheduler."""
    dropped_total: int | None = None
    """Groups that were dropped."""
    made_tokens_total: int | None = None
    """Tokens that the engines wrote in RL steps."""
    trained_tokens_total: int | None = None
    """Tokens that counted in a loss."""
    token_budget: int | None = None
    """Tokens of an iteration, with --rollouts budget."""
    staleness_mean: float | None = None
    """Versions that a trained group's token was behind, mean of the steps."""
    staleness_max: int | None = None
    continued: float | None = None
    """The share of completions that more than one version wrote, mean of the steps."""
    utilisation: float | None = None
    """The share of engine time in which something ran, mean of the steps."""
    idle_seconds_total: float | None = None
    """Engine time in which nothing ran while a batch was waited for."""
    step_seconds_total: float | None = None
    """Of all RL steps."""


def open_records(path: Path, last_step: int | None = None) -> TextIO:
    """Open `path` to append to it; the unfinished last line that a crash has left is cut off.

    last_step: records of later steps are dropped too, since the run will do these steps again.
    Raises RunFolderError for a line that is no record.
    """
    if path.exists():
        lines = path.read_bytes().split(b"\n")[:-1]
        if last_step is not None:
            lines = [line for line in lines if _step_of(path, line) <= last_step]
        partial = path.with_suffix(".partial")
        partial.write_bytes(b"".join(line + b"\n" for line in lines))
        os.replace(partial, path)
    return open(path, "a", encoding="utf-8")


def _step_of(path: Path, line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"{path}: {line[:60]!r} is no record; delete that line") from error


def append_record(stream: TextIO, record: Mapping[str, object]) -> None:
    """Add one line of JSON to `stream`, for others to read at once."""
    stream.write(json.dumps(record) + "\n")
    stream.flush()


def write_json(path: Path, record: object) -> None:
    """Write `record` (JSON types) so that `path` holds either the old content or the new, whole."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_metrics(path: Path) -> list[StepMetrics]:
    """The RL steps in `path`, in order; of several records of one step (a resumed run) the last.

    The unfinished last line of a crash is dropped, keys of newer versions are ignored. Raises
    RunFolderError, naming file and line, for what is not a record.
    """
    steps = {metrics.step: metrics for metrics in _records(path, StepMetrics)}
    return [steps[step] for step in sorted(steps)]


def read_sft(path: Path) -> list[SftMetrics]:
    """The supervised steps in `path`; tolerant and strict like `read_metrics`."""
    steps = {metrics.step: metrics for metrics in _records(path, SftMetrics)}
    return [steps[step] for step in sorted(steps)]


def read_samples(path: Path) -> list[Sample]:
    """The samples in `path`, in the order of their first mention; of several of one problem and
    moment the last. Tolerant and strict like `read_metrics`."""
    return list({(one.when, one.prompt): one for one in _records(path, Sample)}.values())


def read_record(path: Path, kind: type[Record]) -> Record:
    """The one record of `kind` (a dataclass or TypedDict, as Summary) that `path` holds. Raises
    RunFolderError for what is none."""
    return _record(read_object(path), kind, str(path))


def read_lines(path: Path, kind: type[Record]) -> list[Record]:
    """Every record of `kind` (a dataclass) in `path`, an object a line, in order. Tolerant and
    strict like `read_metrics`."""
    return list(_records(path, kind))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that `path` holds. Raises RunFolderError naming `path`."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise RunFolderError(f"{path} holds no JSON object")
    return record


def _records(path: Path, kind: type[Record]) -> Iterator[Record]:
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # a record is written with its end of line
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RunFolderError(f"{where} is no JSON ({error}); delete that line") from error
        yield _record(record, kind, where)


def _record(value: object, kind: type[Record], where: str) -> Record:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise RunFolderError(
            f"{where} is no record of {kind.__name__}: {error}; it is damaged, or an older version "
            "of kimisys wrote it"
        ) from error
