"""How well policies schedule rollouts, simulated: a study with a command of its own, `python -m
bench.schedules`."""
