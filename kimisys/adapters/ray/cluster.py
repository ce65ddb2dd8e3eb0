"""A Ray cluster for one run.

Ray pickles what passes between actors and listens on all interfaces: token authentication is on,
and weights never pass through it (docs/security.md).
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Ray reads these when it is imported, and not again
_IMPORTED_BEFORE = "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token"
os.environ.update(
    RAY_AUTH_MODE="token", RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0"
)

import ray  # noqa: E402
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # noqa: E402

from kimisys.errors import KimisysError  # noqa: E402


@contextmanager
def local_cluster(cpus: int) -> Iterator[None]:
    """A Ray cluster of this process' own, gone with the block. Tokens are new for each run."""
    if _IMPORTED_BEFORE:
        raise KimisysError(
            "ray was imported before kimisys.adapters.ray, so token authentication is off; import "
            "kimisys.adapters.ray first, or set RAY_AUTH_MODE=token"
        )
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray keeps the token that it has read: that of this process' last cluster
    AuthenticationTokenLoader.instance().reset_cache()
    # below /tmp whatever TMPDIR says: Ray's socket paths have 107 bytes
    folder = f"/tmp/kimisys-ray-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with signals_deferred():
            os.mkdir(folder, 0o700)
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
                object_store_memory=256 << 20,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        yield
    finally:
        with signals_deferred():
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """SIGINT and SIGTERM that come inside the block are delivered after it.

    What starts or ends processes must not stop half-way. It also puts the handlers back: Ray's
    core installs one for SIGTERM that aborts the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
