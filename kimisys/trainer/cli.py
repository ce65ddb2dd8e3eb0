"""The command line: `kimisys train`."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from kimisys.errors import KimisysError
from kimisys.trainer.config import ConfigError, TrainConfig


def main() -> None:
    """Entry point of the `kimisys` command. Exit status: 0 done, 1 a clear error, 130
    interrupted."""
    tyro.extras.subcommand_cli_from_dict(
        {"train": train},
        prog="kimisys",
        description="The systems layer of reinforcement learning for large language models.",
    )


def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Run the reference recipe: a short SFT, then RL, of a small Qwen3 on arithmetic."""
    started = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 110)
    errors = Console(stderr=True)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        config.check()
        out = _make_folder(config)
        console.print(f"writing to {out}", highlight=False, soft_wrap=True)
        _run(config, out, console, started)
    except KimisysError as error:
        name = type(error).__name__
        errors.print(Text(name, "bold red"), Text(f": {error}"), sep="", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted: every process of the run has ended", highlight=False)
        sys.exit(130)


def _make_folder(config: TrainConfig) -> Path:
    out = config.out or Path("runs") / time.strftime(f"%Y%m%d-%H%M%S-seed{config.seed}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(_record(config), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from error
    return out


def _run(config: TrainConfig, out: Path, console: Console, started: float) -> None:
    # after the configuration is known to be good: these imports take seconds
    from kimisys.trainer.display import Display, print_summary
    from kimisys.trainer.master import Master

    with Display(console, config.steps) as display:
        summary = Master(config, out, display, started).run()
    print_summary(console, summary)
    if summary.logprob_gap_exceeded_at is not None:
        console.print(
            f"[yellow]the engine was frozen[/]: from step {summary.logprob_gap_exceeded_at} on, "
            "its log-probabilities differ from the trainer's beyond "
            f"{summary.logprob_gap_bound:.0e} per token (up to {summary.logprob_gap_max:.2e})",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"curve: {out / 'curve.png'}   weights: {out / 'model'}", highlight=False, soft_wrap=True
    )


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _record(config: TrainConfig) -> dict[str, object]:
    record = dataclasses.asdict(config)
    record["out"] = str(config.out) if config.out else None
    return record


if __name__ == "__main__":
    main()
