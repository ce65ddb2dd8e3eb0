"""The named compositions are what other systems do, in the scheduler's own terms."""

from __future__ import annotations

import pytest

from kimisys._core.rollout import Config, Scheduler
from kimisys.errors import SchedulerError
from kimisys.rollout.policies import FOREVER, Policy, policies, policy


@pytest.mark.parametrize("each", policies().values(), ids=policies())
@pytest.mark.parametrize("position", [0, -1])
def test_a_scheduler_takes_every_policy_with_every_knob(each: Policy, position: int) -> None:
    knob = each.knob_values[position] if each.knob_values else None
    config = each.config(16, 100_000, 8, knob)
    assert Scheduler(config).config == config
    assert config.lease_timeout == FOREVER
    assert (config.token_budget > 0) is each.budget
    assert config.groups == (0 if each.budget else 16)


def test_the_default_is_what_config_defaults_to() -> None:
    assert policy("default").config(7, 0, 8) == Config(groups=7, lease_timeout=FOREVER)
    assert policy("partial").config(7, 500, 8) == Config(
        token_budget=500, live_limit=56, lease_timeout=FOREVER
    )


def test_a_knob_turns_what_it_names() -> None:
    assert policy("april").config(4, 0, 8, 2.5).over_issue == 2.5
    assert policy("areal").config(4, 0, 8, 3).max_staleness == 3
    assert policy("partial").config(4, 99, 8, 1.5).live_limit == 48
    assert policy("fifo_cap").cap(256, 32) == 32
    assert policy("fifo_cap").cap(16, 32) == 16
    assert policy("least_loaded").cap(256) == 256


def test_whole_are_those_that_leave_nothing_over() -> None:
    whole = [name for name, each in policies().items() if each.whole]
    assert whole == [
        "default", "group_round_robin", "least_loaded", "fifo_cap", "longest_first_oracle",
    ]  # fmt: skip


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(SchedulerError, match="no policy 'verl'; there are: default, "):
        policy("verl")
    with pytest.raises(SchedulerError, match="least_loaded has no knob"):
        policy("least_loaded").config(4, 0, 8, 2.0)
