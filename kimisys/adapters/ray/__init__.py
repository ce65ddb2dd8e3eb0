"""Ray as the process manager: a local cluster with token authentication, and waits that end."""

from kimisys.adapters.ray.cluster import (
    ActorLostError,
    kill,
    local_cluster,
    share,
    signals_deferred,
    spawn,
    wait,
)

__all__ = [
    "ActorLostError",
    "kill",
    "local_cluster",
    "share",
    "signals_deferred",
    "spawn",
    "wait",
]
