"""The command line: `kimisys train`, `sft`, `eval`, `generate`, `export`, `report`, `plan`,
`simulate`."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.text import Text

from kimisys.errors import KimisysError
from kimisys.trainer.config import ConfigError, RunConfig, TrainConfig
from kimisys.trainer.plan_config import PlanConfig
from kimisys.trainer.run_folder import (
    check_resumable,
    command_of,
    folder_of,
    locked,
    make_folder,
    resolved,
    saved_config,
)
from kimisys.trainer.serve_config import EvalConfig, ExportConfig, GenerateConfig
from kimisys.trainer.simulate_config import SimulateConfig

_CONFIGS: dict[str, type[RunConfig]] = {"train": TrainConfig, "sft": RunConfig}

Flat = tyro.conf.arg(name="")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `kimisys` command. Exit status: 0 done, 1 a clear error, 130
    interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console(width=None if sys.stdout.isatty() else 110, markup=False)
    with _told(console):
        tyro.extras.subcommand_cli_from_dict(
            _commands(console, _saved(arguments)),
            prog="kimisys",
            description="The systems layer of reinforcement learning for large language models.",
            args=arguments,
        )


def _commands(console: Console, saved: RunConfig | None) -> dict[str, Any]:
    """The commands by name, those that train first; a run that is resumed takes its defaults from
    what was `saved`."""
    started = time.monotonic()
    train_defaults = saved if isinstance(saved, TrainConfig) else TrainConfig()
    sft_defaults = RunConfig() if saved is None or isinstance(saved, TrainConfig) else saved

    def train(config: Annotated[TrainConfig, Flat] = train_defaults) -> None:
        """SFT, then RL: without options, the reference recipe on arithmetic."""
        _run(config, saved, console, started)

    def sft(config: Annotated[RunConfig, Flat] = sft_defaults) -> None:
        """Supervised steps alone, on a task's demonstrations."""
        _run(config, saved, console, started)

    return {"train": train, "sft": sft, **_other_commands(console)}


def _other_commands(console: Console) -> dict[str, Any]:
    def evaluate(config: Annotated[EvalConfig, Flat]) -> None:
        """Measure a model: pass@1, pass@k, completion length, on a task's held-out problems."""
        config.check()
        from kimisys.trainer.eval_command import run

        run(config, console)

    def generate(config: Annotated[GenerateConfig, Flat]) -> None:
        """Look at what a model writes after prompts of your own."""
        config.check()
        from kimisys.trainer.generate_command import run

        run(config, console)

    def export(config: Annotated[ExportConfig, Flat]) -> None:
        """Turn a checkpoint, of a run or of Megatron, into a Hugging Face folder."""
        config.check()
        from kimisys.trainer.export_command import run

        run(config, console)

    def report(folder: Annotated[Path, tyro.conf.Positional]) -> None:
        """Write report.html of a run anew.

        Args:
            folder: Folder of the run.
        """
        from kimisys.trainer.report import write_report

        console.print(str(write_report(folder)), highlight=False, soft_wrap=True)

    return {
        "eval": evaluate,
        "generate": generate,
        "export": export,
        "report": report,
        **_studies(console),
    }


def _studies(console: Console) -> dict[str, Any]:
    """The commands that start no process and need no GPU."""

    def plan(config: Annotated[PlanConfig, Flat]) -> None:
        """Plan a weight sync from configurations alone (no weights, no GPU), for example: kimisys
        plan --model kimi-k2 --train tp=8,pp=8,ep=32,etp=1,first=7,last=6 --infer tp=16,dp=8,ep=on
        --plot k2.png"""
        config.check()
        from kimisys.adapters.vllm import environment

        environment.apply(1)  # before vLLM is imported: it says less, and asks no network
        from kimisys.trainer.plan_command import run

        run(config, console)

    def simulate(config: Annotated[SimulateConfig, Flat] = SimulateConfig()) -> None:  # noqa: B008
        """Compare rollout policies on simulated engines, with the scheduler that runs in
        production; the policy never sees a length before it happens.

        How much would partial rollouts give me? kimisys simulate --engines 16 --plot gantt.png

        What would other policies have given my run? kimisys simulate --trace
        RUN/rollouts/groups.jsonl

        Can I trust it? kimisys simulate --calibrate RUN; kimisys simulate --replay RUN
        """
        config.check()
        from kimisys.trainer.simulate_command import execute

        execute(config, console)

    return {"plan": plan, "simulate": simulate}


def _run(config: RunConfig, saved: RunConfig | None, console: Console, started: float) -> None:
    config = resolved(config)
    if saved is not None:
        check_resumable(config, saved)
    elif config.resume is not None:
        raise ConfigError("--resume must be written out, and names one folder")
    config.check()
    # after the configuration is known to be good: these imports take seconds
    from kimisys.trainer.display import Display, print_summary
    from kimisys.trainer.master import Master
    from kimisys.trainer.setting import prepare

    model, task = prepare(config)
    out = folder_of(config)
    steps = config.steps if isinstance(config, TrainConfig) else 0
    display = Display(console, steps)
    master = Master(config, out, model, task, display, started)
    with locked(make_folder(config, out)):
        console.print(f"writing to {out}", highlight=False, soft_wrap=True)
        try:
            with display:
                summary = master.run()
        except BaseException as error:
            command = command_of(type(config))
            error.add_note(f"to go on from the last checkpoint: kimisys {command} --resume {out}")
            raise
    print_summary(console, summary)
    console.print(
        f"report: {out / 'report.html'}   weights: {out / 'model'}", highlight=False, soft_wrap=True
    )


def _saved(arguments: Sequence[str]) -> RunConfig | None:
    """The configuration of the run that `arguments` resume, if they do."""
    folder = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == "--resume":
            folder = following
        elif argument.startswith("--resume="):
            folder = argument.partition("=")[2]
    if not folder or not arguments or arguments[0] not in _CONFIGS:
        return None
    return saved_config(Path(folder), _CONFIGS[arguments[0]])


@contextmanager
def _told(console: Console) -> Iterator[None]:
    """Errors of ours and interrupts in words, on stderr, and as an exit status."""
    errors = Console(stderr=True, width=console.width, markup=False)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except KimisysError as error:
        name = type(error).__name__
        errors.print(Text(name, "bold red"), Text(f": {error}"), sep="", soft_wrap=True)
        _print_notes(errors, error)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        errors.print("interrupted: every process of the run has ended", highlight=False)
        _print_notes(errors, interrupt)
        sys.exit(130)


def _print_notes(errors: Console, error: BaseException) -> None:
    for note in getattr(error, "__notes__", []):
        errors.print(Text(note), soft_wrap=True)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
