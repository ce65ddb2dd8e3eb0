"""`kimisys simulate --replay RUN`: does the scheduler decide today what it decided then?"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from kimisys.errors import SchedulerError
from kimisys.rollout.trace import replay
from kimisys.trainer.metrics import write_json
from kimisys.trainer.simulate_config import SimulateConfig
from kimisys.trainer.simulate_run import traces


def replay_run(folder: Path, config: SimulateConfig, console: Console) -> None:
    """Give the events of each of the run's traces to a fresh scheduler, and say what came of it.

    Raises SchedulerError, after all are told, where a decision differs.
    """
    records, differ = [], []
    for path in traces(folder):
        found = replay(path, partial=True)
        record = {
            "trace": path.name,
            "events": len(found.events),
            "actions": len(found.actions),
            "equal": found.equal,
            "unread_bytes": found.unread,
        }
        first = found.first_difference
        if first is not None:
            record["first_difference"] = first.event
            differ.append(
                f"{path.name}: at event {first.event} the run decided {first.recorded}, the replay "
                f"{first.replayed}{f' ({first.error})' if first.error else ''}"
            )
        records.append(record)
        same = "the same decisions" if found.equal else "OTHER decisions"
        console.print(
            f"{path.name}: {len(found.events):,} events, {len(found.actions):,} actions: {same}"
            + (f"; {found.unread:,} bytes at its end are no whole record" if found.unread else ""),
            highlight=False,
        )
    if config.json is not None:
        write_json(config.json, records)
    if differ:
        raise SchedulerError(
            "; ".join(differ)
            + "; this build of the scheduler is not the one that ran: replay with "
            "that one, or take the difference as what has changed"
        )
