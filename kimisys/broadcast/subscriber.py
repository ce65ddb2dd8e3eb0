"""An engine worker's side: pull what the plan needs from the snapshots, verify what landed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

from kimisys._core.broadcast import Scatter
from kimisys.broadcast.agreement import Combine, Digests, Part, Ranks
from kimisys.broadcast.full import Full
from kimisys.broadcast.near import Near
from kimisys.broadcast.peers import Peers
from kimisys.broadcast.pull import Buffers, Held, Pull, Source, Way, listed
from kimisys.broadcast.rounds import element_counts, incomplete, rounds
from kimisys.broadcast.version import checked_version
from kimisys.broadcast.wire import Deadline
from kimisys.errors import LayoutError, VersionError
from kimisys.reshard import Layout, plan

_HEADER_SECONDS = 30.0
"""For reading the headers of all publishers' memories."""


@dataclass(frozen=True)
class Pulled:
    """What one pull did.

    Attributes:
        version: whose weights are now in the destination.
        base: what it held before, where only the changes since were pulled; None for a full pull.
        nbytes: bytes of tensor elements written to the destination (for deltas: ``changed`` times
            the mean size, where tensors of several sizes are held).
        wire_nbytes: bytes read from the publishers: headers, records, data, retries.
        full_nbytes: bytes of data that a full pull reads.
        changed: elements written.
        digests_checked: tensors whose digest, or what was added to it, was compared.
        verified_fully: whether all that the destination holds was digested.
        seconds: of wall time by phase: "read", "measure", "apply", "land", "verify".
        total_seconds: of wall time, with the waits for other ranks.
        touched: (rank, buffer name) of the destination's buffers that were written to.
    """

    version: int
    base: int | None
    nbytes: int
    wire_nbytes: int
    full_nbytes: int
    changed: int
    digests_checked: int
    verified_fully: bool
    seconds: dict[str, float]
    total_seconds: float
    touched: frozenset[tuple[int, str]]
    _replay: Callable[[Buffers], None] | None = field(repr=False)

    def replay(self, buffers: Buffers) -> bool:
        """Writes the same changes into other copies of some of the destination's buffers.

        Args:
            buffers: copies that hold ``base``, by (rank, name); buffers that are not given are left
                out. See that they do hold ``base``: a pull that fails on its way can leave the
                destination at a version between, and nothing is verified here.

        Returns False, and writes nothing, when there is no delta to replay: copy the touched
        buffers from the destination instead.
        """
        if self._replay is None:
            return False
        self._replay(buffers)
        return True


class Subscriber:
    """Pulls one engine rank's part of the published weights and verifies it where it landed.

    Args:
        peers: the publishers, see ``connect``.
        destination: the layout of ALL engine ranks, in the dtypes that are published.
        rank: this engine rank.
        verify_every: after so many versions by deltas everything that landed is digested.

    Attributes:
        version: that the destination verifiably holds, None when it may hold anything.
        plan: the copies of a pull.
        absent: published tensors that this rank holds no part of; a pull does not touch them.

    Raises:
        LayoutError: a dtype differs from the published one, or the destination holds only a part of
            some tensor, so that its digest can never be compared.
        PlanError: the published weights cannot fill the destination. ValueError: ``verify_every``
        is below 1.
    """

    def __init__(
        self, peers: Peers, destination: Layout, rank: int, verify_every: int = 16
    ) -> None:
        if rank not in destination.ranks:
            raise LayoutError(
                f"rank {rank} is not in the destination's layout, whose ranks are "
                f"{sorted(destination.ranks)}; pass the merged layout of all engine ranks"
            )
        if verify_every < 1:
            raise ValueError(f"verify_every is {verify_every}; it must be 1 at least")
        self._peers = peers
        self.rank = rank
        self._verify_every = verify_every
        here = destination.of_rank(rank)
        held = element_counts(here)
        _check_dtypes(peers.layout, destination, held.keys())
        self.plan = plan(peers.layout, here)
        self._elements = sum(held.values())
        self._buffers = frozenset((buffer.rank, buffer.name) for buffer in here.buffers)
        self.absent = tuple(t.name for t in peers.layout.tensors if t.name not in held)
        if parts := incomplete(destination):
            name, (count, size) = next(iter(parts.items()))
            raise LayoutError(
                f"the destination holds {count} of the {size} elements of '{name}', so its digest "
                "can never be compared; pass the merged layout of all engine ranks"
            )
        # Alone, a rank verifies what it holds whole; together, the ranks verify everything.
        self._parts = tuple(incomplete(here))
        self._ranks = tuple(sorted(destination.ranks))
        self._here, self._destination = here, destination
        self._ways: dict[bool, Way] = {}
        self._held = Held()
        remotes = peers.remotes(Deadline(_HEADER_SECONDS))
        self._sources = {rank: Source(*remotes[rank]) for rank in sorted(remotes)}
        self._way(alone=len(self._ranks) == 1)

    @property
    def source(self) -> Layout:
        """The merged layout of the publishers' snapshots."""
        return self._peers.layout

    @property
    def version(self) -> int | None:
        """What the destination verifiably holds; None when it may hold anything."""
        return self._held.version

    def pull(
        self,
        version: int | None,
        destinations: Buffers,
        combine: Combine | None = None,
        threads: int = 0,
        full: bool = False,
        timeout_seconds: float = 60.0,
    ) -> Pulled:
        """Brings this rank's buffers to ``version`` and verifies them before it returns.

        By deltas if the destination holds a version that the publishers' logs lead on from, whole
        otherwise. After a DigestError ``self.version`` is what the destination still holds, whole,
        or None when it may hold anything; after other errors too. The next pull is full then.

        Args:
            version: that every publisher must have; None takes the newest that all have.
            destinations: this rank's buffers, by (rank, name), as the last pull left them. A full
                pull writes all their bytes.
            combine: sums over the engine's ranks, needed when tensors are split between them. All
                ranks call it equally often with equal shapes, whatever they meet: a rank that fails
                says so in the sum that the others wait in. So all must call ``pull``, with the same
                ``version``. It must have a deadline of its own, as a rank that died never comes.
            threads: 0 means all that the process may use.
            full: pull everything, whatever the destination holds.
            timeout_seconds: for all waits for publishers together.

        Raises:
            VersionError: a publisher does not have the version. LayoutError: ``combine`` is needed
            and missing. BufferMismatchError: a buffer is missing, read-only or has another size.
            Until then nothing has changed. VersionError, too: the version was overwritten while it
            was read in full (``self.version`` is None then). SnapshotError: a publisher is gone,
            failed or died while writing, or was faster until the deadline, or what it wrote is
            malformed; or another rank of the engine failed. DigestError: what came is not what was
            published; the tensors are named.
        """
        started = time.perf_counter()
        run = self._run(destinations, combine, threads, timeout_seconds)
        before = self._bytes_read()
        answers = run.ranks.together(partial(self._wish, run, version, full))
        base, target = _agreed(answers.words)
        near = Near(run, target)
        if base is None or not near.run():
            base = None
            Full(run, version).run()
        elif near.done + int(answers.words[:, 2].max()) >= self._verify_every:
            self._verify(run)
        return self._pulled(run, base, self._bytes_read() - before, started)

    def verify(self, destinations: Buffers, combine: Combine | None = None) -> int:
        """Digests everything that the destination holds and compares it with ``version``.

        All ranks of the engine call it, as they call ``pull``. Returns the tensors compared. Raises
        LayoutError as ``pull`` does; VersionError when nothing is held; DigestError, and nothing
        that is verified is held then.
        """
        run = self._run(destinations, combine, 0, 60.0)
        self._verify(run)
        return run.tally.digests_checked

    def _run(
        self, destinations: Buffers, combine: Combine | None, threads: int, timeout_seconds: float
    ) -> Pull:
        if combine is None and self._parts:
            raise LayoutError(
                f"rank {self.rank} holds only a part of {listed(self._parts)}, so their digests "
                "do not compare alone; pass combine, a sum over the engine's ranks"
            )
        way = self._way(alone=combine is None)
        ranks = Ranks(self._ranks, self.rank, way.shape, combine)
        deadline = Deadline(timeout_seconds)
        return Pull(self._sources, way, ranks, self._held, destinations, threads, deadline)

    def _way(self, alone: bool) -> Way:
        """Made when it is first needed: a subscriber mostly needs one of the two."""
        alone = alone or len(self._ranks) == 1  # no difference then
        if alone not in self._ways:
            covers = rounds(self._here) if alone else rounds(self._destination)
            parts = [each.of_rank(self.rank) for each in covers]
            scatter = Scatter(self.plan, [each.layout for each in parts])
            names = [tensor.name for tensor in self.source.tensors]
            self._ways[alone] = Way(scatter, parts, names, f"rank {self.rank}")
        return self._ways[alone]

    def _wish(self, run: Pull, version: int | None, full: bool) -> Part:
        """The version that this rank can go on from (plus one; 0 for none), that which it wants
        (with a bit for one that was asked for), and how far its last full verification is."""
        run.check()
        asked = None if version is None else checked_version(version)
        newest = min(run.newest(rank, asked) for rank in self._sources)
        held = self._held
        base = 0 if full or held.suspect or held.version is None else held.version + 1
        wanted = 2 * newest if asked is None else 2 * asked + 1
        return Part(words=(base, wanted, held.steps))

    def _verify(self, run: Pull) -> None:
        held = self._held
        if held.version is None:
            raise VersionError("the destination holds no verified version; pull one first")
        answers = run.ranks.together(lambda: Part(sums=run.digest()))
        version, held.version = held.version, None
        run.tally.digests_checked = run.way.compare(
            answers.sums,
            held.digests,
            f"version {version}",
            "what the destination holds is not what was published",
            "do not serve from it, see who else writes to it, and pull again",
        )
        held.version, held.steps = version, 0
        run.tally.verified_fully = True

    def _bytes_read(self) -> int:
        return sum(source.meter.nbytes_read for source in self._sources.values())

    def _pulled(self, run: Pull, base: int | None, wire_nbytes: int, started: float) -> Pulled:
        tally, scatter = run.tally, run.way.scatter
        assert self._held.version is not None  # as the pull succeeded
        steps = tally.replay
        itemsize = self.plan.nbytes / self._elements if self._elements else 1.0
        changed = tally.changed + round(tally.referred_nbytes / itemsize)

        def replay(buffers: Buffers) -> None:
            for staged in steps or ():
                scatter.apply(staged, buffers, run.threads)

        return Pulled(
            version=self._held.version,
            base=base,
            nbytes=self.plan.nbytes if base is None else round(changed * itemsize),
            wire_nbytes=wire_nbytes,
            full_nbytes=run.way.full_nbytes,
            changed=self._elements if base is None else changed,
            digests_checked=tally.digests_checked,
            verified_fully=tally.verified_fully,
            seconds=tally.seconds,
            total_seconds=time.perf_counter() - started,
            touched=self._buffers if base is None else frozenset(tally.touched),
            _replay=None if steps is None else replay,
        )


def _agreed(words: Digests) -> tuple[int | None, int]:
    """The version that all ranks go on from, None for none; the version that all can reach."""
    wanted = words[:, 1].tolist()
    if len(set(wanted)) > 1 and any(each % 2 for each in wanted):
        raise VersionError(
            f"the ranks of the engine ask for versions {[each // 2 for each in wanted]}; ask for "
            "the same one on all of them"
        )
    target = min(wanted) // 2
    bases = set(words[:, 0].tolist())
    base = bases.pop() - 1
    return (base if not bases and 0 <= base <= target else None), target


def _check_dtypes(source: Layout, destination: Layout, held: Collection[str]) -> None:
    published = {tensor.name: tensor.dtype for tensor in source.tensors}
    for tensor in destination.tensors:
        dtype = published.get(tensor.name, tensor.dtype)
        if tensor.name in held and dtype != tensor.dtype:
            raise LayoutError(
                f"tensor '{tensor.name}' is published as {dtype}, the destination holds "
                f"{tensor.dtype}, and digests compare bits; publish with wire dtype "
                f"{tensor.dtype}, or pull into {dtype} and cast afterwards"
            )
