"""The scheduler in an asyncio loop of one's own: two engines, a budget of tokens, three batches."""

import asyncio
import itertools
import random
import time
from collections.abc import Callable

from kimisys.rollout import Config, Scheduler


class Engine:
    """Makes a token every millisecond for each segment; `report` hears of leases and tokens."""

    def __init__(self, number: int, report: Callable[..., None]) -> None:
        self.number, self.report = number, report
        self.running: dict[int, asyncio.Task[None]] = {}

    async def segment(self, lease: int, limit: int) -> None:
        for made in range(1, limit + 1):
            await asyncio.sleep(0.001)
            if random.random() < 0.02:
                return self.report("ended", lease, "stop", 1)
            if made < limit:
                self.report("tokens", lease, 1)
        self.report("ended", lease, "length", 1)

    def start(self, lease: int, limit: int) -> None:
        self.running[lease] = asyncio.create_task(self.segment(lease, limit))

    def pause(self, lease: int) -> None:
        if self.running.pop(lease).cancel():
            self.report("ended", lease, "paused", 0)


async def main(batches: int) -> None:
    scheduler = Scheduler(Config(token_budget=2000))
    news: asyncio.Queue = asyncio.Queue()
    engines = [Engine(number, lambda *event: news.put_nowait(event)) for number in range(2)]
    for engine in engines:
        news.put_nowait(("joined", engine.number, 0, 100_000, 16))
    news.put_nowait(("ready",))
    groups, version = itertools.count(), 0
    while version < batches:
        due, now = scheduler.next_deadline(), time.monotonic_ns() // 1000
        try:
            wait = None if due is None else max(0, due - now) / 1e6
            event, *about = await asyncio.wait_for(news.get(), wait)
        except TimeoutError:
            event, about = "elapsed", []
        for action in getattr(scheduler, event)(time.monotonic_ns() // 1000, *about):
            if action.kind in ("start", "continue"):  # token ids: the prompt and those so far
                engines[action.engine].start(action.lease, action.limit)
            elif action.kind in ("pause", "abort"):
                engines[action.engine].pause(action.lease)
            elif action.kind == "want":  # samples, prompt tokens, most output tokens
                for group in itertools.islice(groups, action.count):
                    news.put_nowait(("offered", group, 4, 20, 300))
            elif action.kind == "hand_over":
                print(f"group {action.group}: train it; its oldest token: {action.version}")
            elif action.kind == "update":  # fetch the weights, then say so
                news.put_nowait(("updated", action.engine, action.version))
            elif action.kind == "batch":
                version += 1
                news.put_nowait(("published", version))
                news.put_nowait(("ready",))
    print(f"{batches} batches; {scheduler.ledger()}")


asyncio.run(main(batches=3))
