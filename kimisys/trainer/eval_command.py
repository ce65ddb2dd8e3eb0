"""`kimisys eval`: pass@1, pass@k and mean length of any checkpoint."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kimisys.rl.pass_at_k import pass_at_k
from kimisys.trainer.answers import Answers, sample
from kimisys.trainer.metrics import write_json
from kimisys.trainer.model_folder import check_engine, open_model
from kimisys.trainer.serve_config import EvalConfig
from kimisys.trainer.serving import VERSION, find_weights, served
from kimisys.trainer.task import load_task


def run(config: EvalConfig, console: Console) -> None:
    """Measure, print a table, and write the file of --json if one was asked for."""
    task = load_task(config.task)
    model = open_model(find_weights(config.folder).resolve())
    check_engine(model.hf_config, config.tensor_parallel, "--tensor-parallel")
    problems = task.held_out[: config.problems]
    room = model.context - max(len(model.tokenizer.encode_prompt(p.prompt)) for p in problems)
    limit = config.max_tokens or max(1, min(task.max_completion_tokens, room))
    task = replace(task, max_completion_tokens=limit)
    longest = model.longest(task, problems)
    started = time.monotonic()
    serving = served(
        model, config.dtype, longest, config.tensor_parallel, config.seed, config.ready_timeout
    )
    starting = console.status(f"starting an engine with {model.folder}")
    with starting as status, serving as engines:
        status.update(f"sampling {len(problems)} problems x {config.samples}")
        answers = sample(
            engines,
            model.tokenizer,
            task,
            problems,
            config.samples,
            config.temperature,
            config.seed,
            VERSION,
        )
    figures = _figures(answers, config.samples)
    console.print(_table(figures))
    speed = answers.tokens / answers.seconds
    console.print(
        f"{len(problems)} problems, {config.samples} samples each at temperature "
        f"{config.temperature:g}, at most {limit} tokens, {config.dtype}; {speed:,.0f} tokens/s, "
        f"{time.monotonic() - started:.0f} s in all; weights: {model.folder}",
        highlight=False,
        soft_wrap=True,
    )
    if config.json is not None:
        records = [
            {"prompt": problems[group].prompt, "answer": problems[group].answer, **asdict(one)}
            for group, one in zip(answers.groups, answers.completions, strict=True)
        ]
        write_json(config.json, {"figures": figures, "completions": records})


def _figures(answers: Answers, samples: int) -> dict[str, Any]:
    right = np.bincount(answers.groups, weights=answers.right).astype(int).tolist()
    powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    ks = sorted({*powers, samples})
    finished = float(np.mean([one.finished for one in answers.completions]))
    return {
        **{f"pass@{k}": pass_at_k(right, samples, k) for k in ks},
        "mean reward": float(answers.outcomes.mean()),
        "mean length": float(answers.lengths.mean()),
        "mean length of right completions": answers.correct_length,
        "finished": finished,
    }


def _table(figures: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name, value in figures.items():
        shown = "none is right" if value is None else f"{value:.3f}"
        if "length" in name and value is not None:
            shown = f"{value:.1f} tokens"
        table.add_row(name, shown)
    return table
