"""The options of `kimisys simulate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from kimisys.rollout.policies import policies
from kimisys.trainer.config import MANY, ConfigError, check_ranges

ALL = "all"
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class SimulateConfig:
    """Compare rollout policies on simulated engines, with the scheduler that runs in production.

    Without options: eight engines of an H100 each with a 7B model, long-tailed lengths.
    """

    policy: tuple[str, ...] = (ALL,)
    """Which to compare: all, or names; `--policy list` says what each does."""

    engines: int = 8
    """Inference engines; all alike."""
    engine: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = "h100-7b"
    """Time model of an engine: h100-7b, 2xh100-32b (tensor parallel 2), or the file that
    --calibrate --json wrote."""
    kv: int = 0
    """Tokens that an engine's KV cache holds; 0: the time model's own."""
    max_sequences: int = 0
    """Most sequences that an engine runs together; 0: the time model's own."""

    groups: int = 0
    """Prompts of a batch; 0: eight an engine."""
    samples: int = 8
    """Samples of a prompt."""
    median: float = 4000.0
    """Of the output lengths, tokens; they are lognormal."""
    sigma: float = 1.2
    """Their spread: the standard deviation of the logarithm. 1 and more is long-tailed."""
    alpha: float = 0.0
    """Make the longest fifth Pareto distributed with this exponent (1 to 3); 0: lognormal."""
    correlation: float = 0.8
    """How far the samples of a prompt resemble each other in length, 0 to 1 (ICC of logarithms)."""
    limit: int = 32_768
    """Most output tokens; longer ones are cut there."""
    prompt: int = 500
    """Tokens of a prompt."""
    trace: File = None
    """Lengths from a file instead, JSONL, a group a line: {"prompt_tokens": 90, "lengths": [700,
    1200]}. A run's rollouts/groups.jsonl is one. Where it is too short, the rest is drawn from the
    distribution that is fitted to it."""
    seed: int = 1
    """Of the lengths that are drawn."""

    iterations: int = 6
    """Batches that are measured."""
    warm_up: int = 3
    """Batches before, where iterations do not stand alone: at first only short trajectories are
    complete."""
    token_budget: int = 0
    """Output tokens of an iteration of partial rollouts; 0: what a batch has on average."""
    train_base: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 0.0
    """What a training step takes whatever its tokens."""
    train_token: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 0.0
    """And what it takes for each token."""
    reward_latency: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 0.0
    """From the end of a batch's last trajectory until its rewards are known and training begins."""
    search: int = 2_000
    """Schedules that the offline search looks at for each batch, to say what knowing all lengths
    would give; 0: no search."""
    tune: bool = False
    """Choose each policy's knob (a cap, an over-issue) on another draw first."""

    calibrate: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Instead: fit the time model to the steps that a run's engines took, say how well it predicts
    those held out, and predict the run's rollouts."""
    replay: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Instead: give a run's recorded events to the scheduler again, and say whether it decides the
    same."""

    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Draw who ran what on which engine, for each policy."""
    json: File = None
    """Also write all figures."""

    def check(self) -> None:
        """Raise ConfigError for what makes no sense."""
        if self.calibrate is not None and self.replay is not None:
            raise ConfigError("--calibrate and --replay exclude each other; ask one at a time")
        names = policies()
        for name in self.policy:
            if name not in {ALL, "list", *names}:
                raise ConfigError(
                    f"--policy: there is no {name!r}; there are: all, list, {', '.join(names)}"
                )
        check_ranges(
            [
                ("--engines", self.engines, 1, 4096),
                ("--kv", self.kv, 0, 1 << 40),
                ("--max-sequences", self.max_sequences, 0, MANY),
                ("--groups", self.groups, 0, MANY),
                ("--samples", self.samples, 1, 1024),
                ("--median", self.median, 1, 1e9),
                ("--sigma", self.sigma, 0, 10),
                ("--alpha", self.alpha, 0, 100),
                ("--correlation", self.correlation, 0, 1),
                ("--limit", self.limit, 1, 1 << 30),
                ("--prompt", self.prompt, 1, 1 << 30),
                ("--seed", self.seed, 0, 2**31 - 1),
                ("--iterations", self.iterations, 1, 10_000),
                ("--warm-up", self.warm_up, 0, 10_000),
                ("--token-budget", self.token_budget, 0, 1 << 50),
                ("--train-base", self.train_base, 0, 1e6),
                ("--train-token", self.train_token, 0, 1e3),
                ("--reward-latency", self.reward_latency, 0, 1e6),
                ("--search", self.search, 0, 1 << 30),
            ]
        )
        for option, file in (("--plot", self.plot), ("--json", self.json)):
            if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
                raise ConfigError(f"{option} {file}: name a file in a folder that exists")
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise ConfigError(f"--plot: {self.plot} is drawn as PNG; name it *.png")

    @property
    def batch(self) -> int:
        """Groups of a batch."""
        return self.groups or 8 * self.engines

    @property
    def chosen(self) -> list[str]:
        """The names of the policies to compare, each once."""
        names = list(policies()) if ALL in self.policy else self.policy
        return list(dict.fromkeys(names))
