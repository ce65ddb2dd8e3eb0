"""Named compositions of the scheduler's policies: the default ones, and those of other systems.

`policies()` lists them. Each gives the Config of a scheduler for a batch of so many groups; what a
policy leaves open, its knob, is a number that has to be tuned to the workload.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kimisys._core.rollout import Config
from kimisys.errors import SchedulerError

FOREVER = 1 << 50
"""Microseconds: the lease timeout of simulations, where no engine falls silent."""


@dataclass(frozen=True)
class Policy:
    """One composition. says: what it does, for a table. budget: an iteration ends by output tokens,
    and the unfinished go on in the next; otherwise it ends when its groups are complete. fields:
    of Config. oracle: it is shown true lengths, as only a simulation can."""

    name: str
    says: str
    budget: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)
    knob: str = ""
    knob_values: tuple[float, ...] = ()
    """To choose from; the first is what is taken untuned."""
    oracle: bool = False

    @property
    def whole(self) -> bool:
        """Whether every trajectory begins and finishes in one iteration, as on-policy RL has it."""
        return not self.budget and self.knob not in {"over_issue", "max_staleness"}

    def config(
        self, groups: int, token_budget: int, samples: int, knob: float | None = None
    ) -> Config:
        """For batches of `groups`, or of about as many by `token_budget` output tokens."""
        knob = self._value(knob)
        fields = {"groups": groups, "lease_timeout": FOREVER, **self.fields}
        if self.budget:
            fields |= {"token_budget": token_budget, "groups": 0}
        if self.knob == "live":
            fields["live_limit"] = max(1, round(knob * groups * samples))
        elif self.knob == "over_issue":
            fields["over_issue"] = knob
        elif self.knob == "max_staleness":
            fields["max_staleness"] = int(knob)
        return Config(**fields)

    def cap(self, most: int, knob: float | None = None) -> int:
        """The sequences that an engine is told to take, where it could take `most`."""
        return min(most, int(self._value(knob))) if self.knob == "cap" else most

    def _value(self, knob: float | None) -> float:
        if knob is None:
            return self.knob_values[0] if self.knob_values else 0.0
        if not self.knob:
            raise SchedulerError(f"policy {self.name} has no knob; it was given {knob}")
        return knob


_PLAIN = {"order": "fifo", "concurrency": "fixed"}

_POLICIES = (
    Policy(
        "default",
        "KV-aware placement with moves, a probe of each group first",
    ),
    Policy(
        "group_round_robin",
        "a group to one engine, groups in turn (veRL)",
        fields={"placement": "group_round_robin", **_PLAIN},
    ),
    Policy(
        "least_loaded",
        "a sample to the engine with the fewest",
        fields={"placement": "least_loaded", **_PLAIN},
    ),
    Policy(
        "fifo_cap",
        "as least_loaded, so many sequences an engine at most",
        fields={"placement": "least_loaded", **_PLAIN},
        knob="cap",
        knob_values=(64, 16, 32, 48, 96, 128, 192, 256),
    ),
    Policy(
        "longest_first_oracle",
        "longest first, shown the true lengths",
        fields={"placement": "kv_aware", "order": "longest_first", "concurrency": "kv"},
        oracle=True,
    ),
    Policy(
        "partial",
        "a token budget ends the iteration, the unfinished go on (k1.5)",
        budget=True,
        knob="live",
        knob_values=(1.0,),
    ),
    Policy(
        "partial_round_robin",
        "the same budget, placed as group_round_robin",
        budget=True,
        fields={"placement": "group_round_robin", **_PLAIN},
        knob="live",
        knob_values=(1.0,),
    ),
    Policy(
        "april",
        "begins more groups than it waits for, recycles the rest (APRIL)",
        fields={"placement": "least_loaded", **_PLAIN},
        knob="over_issue",
        knob_values=(2.0, 1.25, 1.5, 1.75, 2.5, 3.0),
    ),
    Policy(
        "areal",
        "never stops, admits by a count against staleness (AReaL)",
        fields={
            "deployment": "overlap",
            "placement": "least_loaded",
            "staleness": "admission",
            "update": "interrupt",
            **_PLAIN,
        },
        knob="max_staleness",
        knob_values=(4, 1, 2, 8),
    ),
)


def policies() -> dict[str, Policy]:
    """All there are, by name."""
    return {policy.name: policy for policy in _POLICIES}


def policy(name: str) -> Policy:
    """The one of that name. Raises SchedulerError naming those that there are."""
    known = policies()
    if name not in known:
        raise SchedulerError(f"there is no policy {name!r}; there are: {', '.join(known)}")
    return known[name]
