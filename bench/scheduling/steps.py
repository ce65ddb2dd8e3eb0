"""The simulator again: step by step and token by token, one whole iteration, first in first out,
each trajectory to the engine with the fewest."""

from __future__ import annotations

from collections import deque

import numpy as np

from kimisys.rollout import EngineModel, Lots

TICKS = 10**13  # in a second: what the simulator rounds costs to


def makespan(models: list[EngineModel], lots: Lots) -> float:
    """Seconds until all are done. Where no cache overflows."""
    costs = [
        [
            round(cost * TICKS)
            for cost in (model.step, model.sequence, model.kv_token, model.prefill_token)
        ]
        for model in models
    ]
    lengths = np.minimum(lots.lengths, lots.limit).tolist()
    prompts = np.repeat(lots.prompt_tokens, lots.samples).tolist()
    todo = deque(range(len(lengths)))
    running: list[list[list[int]]] = [[] for _ in models]  # [tokens to make, tokens held]
    waiting: list[list[list[int]]] = [[] for _ in models]
    ends: list[int | None] = [None for _ in models]
    now = 0

    def place() -> None:
        while todo:
            held = [len(a) + len(b) for a, b in zip(running, waiting, strict=True)]
            engine = held.index(min(held))
            if held[engine] >= models[engine].max_sequences:
                return
            one = todo.popleft()
            waiting[engine].append([lengths[one], prompts[one]])

    place()
    while True:
        for engine, (step, sequence, kv_token, prefill_token) in enumerate(costs):
            if ends[engine] is None and (running[engine] or waiting[engine]):
                prefill = sum(held for _, held in waiting[engine])
                running[engine] += waiting[engine]
                waiting[engine] = []
                held = sum(one[1] for one in running[engine])
                batch = len(running[engine])
                ends[engine] = (
                    now + step + sequence * batch + kv_token * held + prefill_token * prefill
                )
        due = [end for end in ends if end is not None]
        if not due:
            return now / TICKS
        now = min(due)
        finished = [engine for engine, end in enumerate(ends) if end == now]
        for engine in finished:
            ends[engine] = None
            for one in running[engine]:
                one[0] -= 1
                one[1] += 1
        for engine in finished:
            for one in [one for one in running[engine] if not one[0]]:
                running[engine].remove(one)
                place()
