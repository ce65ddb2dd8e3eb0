"""The scheduler's events per second, the detector's tokens and the simulator's, against plain
ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

from bench.harness import Case
from bench.scheduling.loops import first_loop
from bench.scheduling.plain import PlainScheduler
from bench.scheduling.steps import makespan
from bench.scheduling.stream import World, as_answers, as_events, same
from kimisys.rollout import (
    Config,
    EngineModel,
    Lots,
    Outcome,
    Repetition,
    RepetitionConfig,
    RepetitionDetector,
    Scheduler,
    Simulation,
    simulate,
)

LIVE, ENGINES = 100_000, 64
PLAIN = "plain Python state machine"
PLAIN_ROUNDS = 3
NEVER = 2**60  # microseconds
# What the plain ones do too. A batch of one group is a placeholder: each case says what it wants.
FIRST_COME = Config(
    placement="least_loaded", order="fifo", concurrency="fixed", lease_timeout=NEVER, groups=1
)


def _timed(times: list[float], call: Callable[[], object]) -> None:
    """CPU seconds, for figures that others on the machine do not change."""
    start = time.process_time()
    call()
    times.append(time.process_time() - start)


def _filled(config: Config, world: World, events: int) -> PlainScheduler:
    """A plain scheduler that has been told the first `events`, its answers forgotten."""
    machine = PlainScheduler(config.token_budget, config.groups)
    for _, call in world.records[:events]:
        call(machine)
    machine.answers.clear()
    return machine


def scheduling(
    name: str, config: Config, live: int, engines: int, count: int, plain: bool = True
) -> Case:
    """`count` events of `live` trajectories. What fills the engines beforehand is untimed. plain:
    whether the policies are those of the plain state machine, so that it answers too."""
    world = World(config, live, engines)
    world.fill()
    filled = len(world.records)
    world.words(count)
    before, events = as_events(world.records[:filled]), as_events(world.records, filled)
    calls = [call for _, call in world.records[filled:]]
    schedulers: list[Scheduler] = []
    actions: list[np.ndarray] = []
    plains: list[PlainScheduler] = []
    times: list[float] = []

    def fresh() -> None:
        schedulers[:] = [Scheduler(config)]
        schedulers[0].handle(before)

    def ours() -> None:
        actions[:] = [schedulers[0].handle(events)]

    if plain:
        plains += [_filled(config, world, filled) for _ in range(PLAIN_ROUNDS)]
    waiting = list(plains)

    def plainly() -> None:
        machine = waiting.pop()
        for call in calls:
            call(machine)

    def correct() -> bool:
        schedulers[0].audit()
        return schedulers[0].counts().running >= 0.9 * live and len(actions[0]) > 0

    def figures() -> dict[str, float]:
        return {
            "events": len(events),
            "of them, words of running trajectories": float((events["kind"] == 2).sum()),
            "actions": len(actions[0]),
            "million events per CPU second (median)": len(events) / statistics.median(times) / 1e6,
        }

    def agree() -> bool:
        told = [machine.answers for machine in plains if machine not in waiting]
        return all(same(as_answers(actions[0]), answers) for answers in told)

    peers: dict[str, Callable[[], object]] = {PLAIN: plainly} if plain else {}
    return Case(
        f"scheduler, {name}, {len(events):,} events, {live:,} live",
        lambda: _timed(times, ours),
        peers,
        correct,
        figures=figures,
        peer_rounds=dict.fromkeys(peers, PLAIN_ROUNDS),
        agree=agree,
        before=fresh,
    )


def _schedulers() -> Iterator[Case]:
    whole, budget = (
        FIRST_COME.replace(groups=40_000),
        FIRST_COME.replace(groups=0, token_budget=3_000_000),
    )
    yield scheduling("whole iterations", whole, LIVE, ENGINES, 500_000)
    yield scheduling("token budget", budget, LIVE, ENGINES, 500_000)
    # What users run: predictions, placement by step times, room in caches that are not full.
    for name, default in (
        ("whole iterations", Config(lease_timeout=NEVER, groups=40_000)),
        ("token budget", Config(lease_timeout=NEVER, token_budget=3_000_000)),
    ):
        policies = f"{name} by the default policies"
        yield scheduling(policies, default, LIVE, ENGINES, 500_000, plain=False)


def detecting(name: str, tokens: np.ndarray, rare: bool) -> Case:
    """The detector over a text, against every period at every token. rare: whether the naive one
    gets but one round."""
    config = RepetitionConfig()
    found: list[Repetition | None] = []
    naive: list[tuple[int, int] | None] = []
    times: list[float] = []

    def ours() -> None:
        found[:] = [RepetitionDetector(config).feed(tokens)]

    def peer() -> None:
        naive[:] = [first_loop(tokens, config)]

    def agree() -> bool:
        return (found[0] and (found[0].position, found[0].period)) == naive[0]

    peers = "every period at every token (numpy)"
    return Case(
        f"detector, {name}, {len(tokens):,} tokens",
        lambda: _timed(times, ours),
        {peers: peer},
        lambda: found[0] is not None,
        figures=lambda: {"CPU ns per token (median)": 1e9 * statistics.median(times) / len(tokens)},
        peer_rounds={peers: 1 if rare else 3},
        agree=agree,
    )


def _detectors() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    loop = np.tile(rng.integers(0, 50_000, 100), 6)
    words = np.minimum(rng.zipf(1.2, 1_000_000), 50_000)
    yield detecting("words by Zipf's law", np.concatenate([words[:100_000], loop]), rare=True)
    yield detecting("digits", np.concatenate([rng.integers(0, 10, 100_000), loop]), rare=True)
    near = np.tile([1, 2], 50_000)
    near[rng.random(len(near)) < 0.13] = 3
    yield detecting("near loops of all even periods", np.concatenate([near, loop]), rare=True)


def _lots(groups: int, median: float) -> Lots:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(median), 1.0, groups * 8)).astype(np.int64) + 1
    return Lots(rng.integers(50, 500, groups), lengths, samples=8, limit=32 * int(median))


def simulating(name: str, config: Config, engines: int, lots: Lots, naive: bool) -> Case:
    """One iteration of `lots` on some engines with slack KV memory."""
    models = [EngineModel(max_sequences=64, kv_capacity=2**26)] * engines
    simulation = Simulation(config=config, engines=models, report_interval=0.0)
    outcomes: list[Outcome] = []
    seconds: list[float] = []
    times: list[float] = []

    def ours() -> None:
        outcomes[:] = [simulate(simulation, lots)]

    def figures() -> dict[str, float]:
        tokens = int(np.minimum(lots.lengths, lots.limit).sum())
        return {
            "simulated seconds": outcomes[0].seconds,
            "million simulated tokens": tokens / 1e6,
            "million simulated tokens per CPU second (median)": tokens
            / statistics.median(times)
            / 1e6,
        }

    def correct() -> bool:
        return int(outcomes[0].tokens.sum()) == int(np.minimum(lots.lengths, lots.limit).sum())

    def stepwise() -> None:
        seconds.append(makespan(models, lots))

    peers: dict[str, Callable[[], object]] = {"every token of every step (Python)": stepwise}
    return Case(
        f"simulator, {name}",
        lambda: _timed(times, ours),
        peers if naive else {},
        correct,
        figures=figures,
        peer_rounds=dict.fromkeys(peers, 3),
        agree=lambda: all(each == outcomes[0].seconds for each in seconds),
    )


def _simulators() -> Iterator[Case]:
    small, large = _lots(64, 200), _lots(1000, 4000)
    plain = FIRST_COME.replace(groups=64)
    yield simulating("64 groups of 8, about 300 tokens each, 8 engines", plain, 8, small, True)
    yield simulating(
        "1,000 groups of 8, about 6,600 tokens each, 64 engines",
        plain.replace(groups=1000), 64, large, False,
    )  # fmt: skip
    yield simulating(
        "the same by the default policies",
        Config(groups=1000, lease_timeout=NEVER), 64, large, False,
    )  # fmt: skip


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "events": _schedulers,
    "detector": _detectors,
    "simulator": _simulators,
}
"""What `python -m bench rollout` runs."""
