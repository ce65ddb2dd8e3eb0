"""Wall time per trained token on real engines: the synchronous loop against partial rollouts."""
