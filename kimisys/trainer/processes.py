"""The processes of one command: a Ray cluster of its own, its actors, a folder for their sockets;
none of it outlives the command, however that ends."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kimisys.adapters.ray import Actors, local_cluster, signals_deferred
from kimisys.trainer.keeper import keeper

CLOSE_SECONDS = 10.0


@contextmanager
def processes(timeout_seconds: float, if_killed: str) -> Iterator[tuple[Actors, Path]]:
    """Actors, none yet, and a folder of mode 0700 for sockets.

    timeout_seconds: of every wait for an actor. if_killed: what the keeper says should this process
    be killed.
    """
    with keeper(if_killed), local_cluster(cpus=len(os.sched_getaffinity(0))):
        actors = Actors(timeout_seconds)
        # the keeper knows the folder by its name
        name = f"kimisys-{os.getpid()}-{secrets.token_hex(4)}"
        sockets = Path(tempfile.gettempdir()) / name
        sockets.mkdir(mode=0o700)
        try:
            yield actors, sockets
        finally:
            with signals_deferred():
                actors.close(CLOSE_SECONDS)
                shutil.rmtree(sockets, ignore_errors=True)
