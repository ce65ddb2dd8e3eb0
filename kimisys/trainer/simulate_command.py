"""`kimisys simulate`: rollout policies side by side, on the lengths and engines that one names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from kimisys.errors import WorkloadError
from kimisys.rollout import Lots, Outcome
from kimisys.rollout.measure import (
    Floor,
    Measured,
    Setting,
    floor,
    mean_length,
    measure,
    run,
    tuned,
)
from kimisys.rollout.policies import Policy, policies
from kimisys.rollout.workload import Prompts, extended, lognormal, pareto, read_lengths
from kimisys.trainer.metrics import write_json
from kimisys.trainer.simulate_calibrate import calibrate
from kimisys.trainer.simulate_config import SimulateConfig
from kimisys.trainer.simulate_engines import engine_fields
from kimisys.trainer.simulate_plot import plot_policies
from kimisys.trainer.simulate_replay import replay_run
from kimisys.trainer.simulate_table import comparison_table, policy_list

_SPARE = 4
"""Times as many groups as are trained: what is under way, and the short ones that go first."""


@dataclass(frozen=True)
class Comparison:
    """What was simulated, and what came of it. best: of the same lengths with all of them known,
    where whole iterations were asked for."""

    setting: Setting
    lots: Lots
    workload: str
    measured: list[Measured]
    best: Floor | None

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON types; seconds and tokens."""
        return {
            "workload": self.workload,
            "setting": dataclasses.asdict(self.setting),
            "mean_length": mean_length(self.lots),
            "policies": [
                dataclasses.asdict(one)
                | {"speed": one.speed, "recomputed_share": one.recomputed_share}
                for one in self.measured
            ],
            "offline": dataclasses.asdict(self.best) if self.best is not None else None,
        }


def execute(config: SimulateConfig, console: Console) -> None:
    """Do what the options ask for, print it, and write the files of --json and --plot."""
    if config.calibrate is not None:
        calibrate(config.calibrate, config, console)
    elif config.replay is not None:
        replay_run(config.replay, config, console)
    elif "list" in config.policy:
        console.print(policy_list())
    else:
        compare(config, console)


def compare(config: SimulateConfig, console: Console) -> Comparison:
    """Simulate each policy on the same lots; print the table."""
    setting, lots, workload = prepared(config)
    known = policies()
    chosen = [known[name] for name in config.chosen]
    with console.status("") as status:
        measured, knobs = [], {}
        for policy in chosen:
            status.update(f"{policy.name}: {policy.says}")
            mine = _of(setting, policy)
            if config.tune and policy.knob:
                status.update(f"{policy.name}: choosing its {policy.knob} on another draw")
                knobs[policy.name] = tuned(policy, mine, [drawn(config, config.seed + 1_000_003)])
            measured.append(measure(policy, mine, lots, knobs.get(policy.name)))
        best = None
        if any(policy.whole for policy in chosen):
            status.update("bounds" + (", and the offline search" if config.search else ""))
            best = floor(setting, lots, config.search, config.seed)
        result = Comparison(setting, lots, workload, measured, best)
        if config.plot is not None:
            status.update(f"drawing {config.plot}")
            runs = [(each.name, _pictured(each, setting, lots, knobs)) for each in chosen]
            plot_policies(config.plot, runs, setting.engines, workload)
    console.print(comparison_table(measured, best, setting))
    console.print(f"{workload}; {describe(setting, lots)}", highlight=False)
    if config.json is not None:
        write_json(config.json, result.to_json())
    return result


def prepared(config: SimulateConfig) -> tuple[Setting, Lots, str]:
    """The setting, the lots, and the latter in words. Raises ConfigError, WorkloadError."""
    engine = engine_fields(config.engine)
    if config.kv:
        engine |= {"kv_capacity": config.kv}
    if config.max_sequences:
        engine |= {"max_sequences": config.max_sequences}
    lots = drawn(config, config.seed)
    workload = (
        f"lengths of {config.trace}"
        if config.trace is not None
        else f"lengths of median {config.median:,.0f}, sigma {config.sigma:g}, "
        f"sibling correlation {config.correlation:g}"
    )
    budget = config.token_budget or round(config.batch * lots.samples * mean_length(lots))
    setting = Setting(
        engines=config.engines,
        engine=engine,
        groups=config.batch,
        token_budget=budget,
        iterations=config.iterations,
        warm_up=config.warm_up,
        train_base=config.train_base,
        train_token=config.train_token,
        reward_latency=config.reward_latency,
    )
    return setting, lots, workload


def drawn(config: SimulateConfig, seed: int) -> Lots:
    """Enough lots for every policy: of the trace, or as the options describe them."""
    groups = _SPARE * config.batch * (config.iterations + config.warm_up + 1)
    if config.trace is not None:
        return extended(read_lengths(config.trace), groups, seed)
    shape: dict[str, Any] = {
        "median": config.median,
        "sigma": config.sigma,
        "correlation": config.correlation,
        "limit": config.limit,
        "seed": seed,
        "prompts": Prompts(config.prompt),
    }
    if config.alpha:
        return pareto(groups, config.samples, alpha=config.alpha, **shape)
    return lognormal(groups, config.samples, **shape)


def describe(setting: Setting, lots: Lots) -> str:
    """The setting in words."""
    engine = setting.engine
    return (
        f"{setting.engines} engines of {engine['kv_capacity']:,} KV tokens and "
        f"{engine['max_sequences']} sequences, batches of {setting.groups} x {lots.samples}, "
        f"mean length {mean_length(lots):,.0f}"
    )


def _of(setting: Setting, policy: Policy) -> Setting:
    """Iterations that stand alone need no warm-up."""
    return dataclasses.replace(setting, warm_up=0) if policy.whole else setting


def _pictured(
    policy: Policy, setting: Setting, lots: Lots, knobs: dict[str, float | None]
) -> Outcome:
    """The first iterations of a policy, with their spans."""
    if setting.groups > len(lots.prompt_tokens):
        raise WorkloadError("there are fewer groups than a batch has")
    first = min(3, setting.iterations)
    return run(policy, setting, lots, iterations=first, knob=knobs.get(policy.name), spans=True)
