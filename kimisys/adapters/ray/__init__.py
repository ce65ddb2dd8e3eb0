"""Ray as the process manager: a local cluster with token authentication, and waits that end."""

from kimisys.adapters.ray.cluster import ActorLostError, local_cluster, wait

__all__ = ["ActorLostError", "local_cluster", "wait"]
