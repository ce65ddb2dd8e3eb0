"""How the ranks of one engine go on together, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import torch

from kimisys.broadcast.agreement import PeerFailedError
from kimisys.errors import SnapshotError


class PeerTimeoutError(SnapshotError):
    """Other ranks of the same engine did not come to where this one waited, or were lost there."""


def sum_over_ranks(
    values: npt.NDArray[np.int64], group: torch.distributed.ProcessGroup, timeout_seconds: float
) -> npt.NDArray[np.int64]:
    """Sums over the ranks of an engine, wrapping around.

    Raises PeerTimeoutError naming the ranks waited for; the group cannot be used after it.
    """
    summed = torch.from_numpy(values.copy())
    options = torch.distributed.AllreduceOptions()
    options.timeout = timedelta(seconds=timeout_seconds)
    try:
        group.allreduce([summed], options).wait(options.timeout)
    except RuntimeError as error:
        others = [rank for rank in range(group.size()) if rank != group.rank()]
        raise PeerTimeoutError(
            f"rank {group.rank()} of the engine waited up to {timeout_seconds:g} s for its ranks "
            f"{others} to compare digests ({error}); see what became of them, and restart the "
            "engine: its ranks are out of step"
        ) from error
    return summed.numpy()


def check_together(
    check: Callable[[], None],
    size: int,
    rank: int,
    total: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]],
) -> None:
    """Lets all `size` ranks of an engine go on, or none: each calls it with a check of its own.

    What a rank may meet later, in a pull, the pull itself tells the others.
    total: sums over the ranks.
    Raises what the check raised; PeerFailedError naming the ranks whose checks did.
    """
    failure: BaseException | None = None
    try:
        check()
    except BaseException as error:
        failure = error
    if size > 1:
        flags = np.zeros(size, np.int64)
        flags[rank] = failure is not None
        try:
            flags = total(flags)
        except PeerTimeoutError as late:
            if failure is None:
                raise
            failure.add_note(str(late))  # this rank's own error tells more
    if failure is not None:
        raise failure
    failed = [int(other) for other in np.flatnonzero(flags)] if size > 1 else []
    if failed:
        raise PeerFailedError(
            f"rank {rank} could receive its weights, but ranks {failed} of the engine could not; "
            "their own errors say why"
        )
