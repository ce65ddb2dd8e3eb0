"""One attempt at a segment, as the driver follows it."""

from __future__ import annotations

from dataclasses import dataclass

from kimisys.errors import EngineError
from kimisys.rollout.engine import END_REASONS, SegmentOutput
from kimisys.rollout.link import Link


@dataclass
class Lease:
    """A segment that runs.

    limit, made: tokens of output, most and so far. version: that the engine serves.
    start: microseconds.
    """

    number: int
    link: Link
    group: int
    sample: int
    limit: int
    version: int
    start: int
    made: int = 0


def check_output(link: Link, output: SegmentOutput, lease: Lease | None) -> None:
    """Raises EngineError for an output that no honest engine sends. lease: None: it is dead."""
    fault = None
    token_ids = output.token_ids
    if output.reason and output.reason not in END_REASONS:
        fault = f"ends with reason {output.reason!r}, which is none of {END_REASONS}"
    elif len(token_ids) != len(output.log_probs):
        fault = f"has {len(token_ids)} tokens and {len(output.log_probs)} log-probs"
    elif len(token_ids) and not 0 <= min(token_ids) <= max(token_ids) < 1 << 31:
        fault = "has token ids that are negative or need more than 31 bits"
    elif lease is None and not 0 <= output.lease < 1 << 63:
        fault = "is of a lease that was never made"
    elif lease is None:
        return
    elif lease.link is not link:
        fault = f"belongs to engine {lease.link.number}"
    elif lease.made + len(token_ids) > lease.limit:
        fault = f"has more than the {lease.limit} tokens that were asked for"
    elif len(token_ids) and output.version != lease.version:
        fault = f"was made by version {output.version}, but the engine served {lease.version}"
    if fault is not None:
        raise EngineError(
            f"engine {link.number}: its output for lease {output.lease} {fault}; the engine is "
            "left out, mend its adapter"
        )
