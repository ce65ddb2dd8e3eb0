"""What is checked at every step: digests, and that trainer and engines compute the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kimisys.errors import KimisysError
from kimisys.trainer.engines import Sync


class EngineMismatchError(KimisysError):
    """An engine computes something else than the trainer, though the digests agree."""


class ReplicaError(KimisysError):
    """Ranks disagree on a parameter that each of them holds whole."""


@dataclass
class Watch:
    """What was checked so far, and the worst that was seen. bound: of the log-probability gap, per
    token. Sums are over all engines; nbytes were written there, wire_nbytes received. density: the
    share of changed elements, of each version that had a base. compared: versions in which a
    control engine agreed."""

    bound: float
    logprob_gap: float = 0.0
    probe_gap: float = 0.0
    digest_mismatches: int = 0
    exceeded_at: int | None = None
    syncs: int = 0
    nbytes: int = 0
    digests: int = 0
    sync_seconds: list[float] = field(default_factory=list)
    wire_nbytes: int = 0
    full_nbytes: int = 0
    density: list[float] = field(default_factory=list)
    compared: int = 0

    def note_sync(self, sync: Sync) -> None:
        """Count a version that is served."""
        self.syncs += 1
        self.nbytes += sync.nbytes
        self.digests += sync.digests
        self.wire_nbytes += sync.wire_nbytes
        self.full_nbytes += sync.full_nbytes

    def note_gap(self, step: int, gap: float, frozen: bool) -> None:
        """Note the log-probability gap of `step`; EngineMismatchError beyond the bound, unless
        `frozen`."""
        self.logprob_gap = max(self.logprob_gap, gap)
        if gap <= self.bound:  # NaN is beyond it
            return
        if not frozen:
            raise EngineMismatchError(
                f"step {step}: trainer and engine differ by {gap:.2e} a token in log-probability "
                f"(bound {self.bound:.0e}), so the engine does not serve the weights that it "
                "verified; look at what it derives from its parameters "
                "(kimisys/adapters/vllm/pack.py)"
            )
        self.exceeded_at = self.exceeded_at or step

    def note_probe(self, version: int, gap: float, served: bool) -> None:
        """Note the probe's gap; EngineMismatchError far beyond the bound if `version` is
        `served`."""
        self.probe_gap = max(self.probe_gap, gap)
        if served and not gap <= 10 * self.bound:
            raise EngineMismatchError(
                f"version {version}: an engine's log-probabilities of the probe differ from "
                f"the trainer's by up to {gap:.2e}, though the digests of the weights agree"
            )


def probe_gap(trainer: np.ndarray, engine: np.ndarray) -> float:
    """The largest difference of two log-softmaxes, float32[tokens, vocabulary], over what either
    side gives a probability of at least 1e-3; infinite where one is not finite."""
    if not (np.isfinite(trainer).all() and np.isfinite(engine).all()):
        return float("inf")
    likely = np.maximum(trainer, engine) >= np.log(1e-3)
    return float(np.abs(trainer - engine)[likely].max())
