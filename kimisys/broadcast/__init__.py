"""Publish once, pull anywhere: versioned snapshots in shared memory, verified by digest.

A trainer rank's ``Publisher`` copies its shards into shared memory, with layout-independent
digests beside them. An engine worker's ``Subscriber`` maps the memory of all publishers, reads
straight from it what its plan needs, and compares the digests of what landed. Needs numpy alone.

    snapshot = snapshot_layout(Layout.merge(live_layouts), "bfloat16")
    with Publisher(live_layouts[rank], snapshot, rank, folder / f"rank{rank}.sock") as publisher:
        publisher.publish(1, live_buffers)

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
