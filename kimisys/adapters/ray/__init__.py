"""Ray as the process manager: a local cluster with token authentication, and waits that end."""

# cluster first: it sets what Ray reads when it is imported
from kimisys.adapters.ray.cluster import local_cluster, signals_deferred  # isort: skip
from kimisys.adapters.ray.actors import Actor, ActorLostError, Actors, share

__all__ = ["Actor", "ActorLostError", "Actors", "local_cluster", "share", "signals_deferred"]
