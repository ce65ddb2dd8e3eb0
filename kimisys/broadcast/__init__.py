"""Publish what changed, pull anywhere: versioned snapshots in shared memory, verified by digest.

A trainer rank's ``Publisher`` keeps a snapshot of its shards in shared memory, layout-independent
digests and a log of what changed beside it. An engine worker's ``Subscriber`` reads the records
since the version that it holds, or its share whole, maps them through its plan to its own elements,
and verifies them by digest. Needs numpy alone; docs/broadcast.md explains it.

    snapshot = snapshot_layout(Layout.merge(live_layouts), "bfloat16")
    with Publisher(live_layouts[rank], snapshot, rank, folder / f"rank{rank}.sock") as publisher:
        publisher.publish(1, live_buffers)      # the first in full, later ones by deltas

    peers = connect(addresses)                  # peers.layout: what is published
    subscriber = Subscriber(peers, engine_layout, engine_rank)
    subscriber.pull(1, engine_buffers)
"""

from kimisys._core.broadcast import Snapshot, digest, implementations
from kimisys.broadcast.layout import SNAPSHOT_BUFFER, snapshot_layout
from kimisys.broadcast.peers import Peers, connect
from kimisys.broadcast.publisher import Publication, Publisher
from kimisys.broadcast.subscriber import Pulled, Subscriber

__all__ = [
    "SNAPSHOT_BUFFER",
    "Peers",
    "Publication",
    "Publisher",
    "Pulled",
    "Snapshot",
    "Subscriber",
    "connect",
    "digest",
    "implementations",
    "snapshot_layout",
]
