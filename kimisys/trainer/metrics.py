"""What a run writes down: metrics.jsonl, an object a step; summary.json, its outcome."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO


@dataclass(frozen=True)
class StepMetrics:
    """One RL iteration. Times are seconds, lengths tokens, rates tokens per second."""

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
    logprob_gap: float
    probe_gap: float
    sync_bytes: int
    sync_seconds: float
    rollout_seconds: float
    score_seconds: float
    train_seconds: float
    step_seconds: float


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


def append_record(stream: TextIO, record: Mapping[str, object]) -> None:
    """Add one line of JSON to `stream`, for others to read at once."""
    stream.write(json.dumps(record) + "\n")
    stream.flush()


def write_json(path: Path, record: object) -> None:
    """Write `record` (JSON types) so that `path` holds either the old content or the new, whole."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
