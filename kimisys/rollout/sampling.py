"""How the segments of a run are sampled."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from kimisys.rollout.buffer import Prompt
from kimisys.rollout.engine import SegmentRequest


@dataclass(frozen=True)
class Sampling:
    """temperature, stop_token_ids: of all segments. seed: of the run; None: the engines' own."""

    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = 0

    def request(
        self, lease: int, prompt: Prompt, sample: int, output: list[int], limit: int
    ) -> SegmentRequest:
        """The segment that goes on after `output` for at most `limit` tokens."""
        seed = None
        if self.seed is not None:
            seed = segment_seed(self.seed, prompt.key, sample, len(output))
        return SegmentRequest(
            lease, [*prompt.token_ids, *output], limit, self.temperature, self.stop_token_ids, seed
        )


def segment_seed(seed: int, key: int, sample: int, tokens: int) -> int:
    """63 bits from the run's seed, the prompt's key, the sample and the tokens of output before
    the segment: the same in a run that does the same, whichever engine has the segment."""
    text = f"{seed} {key} {sample} {tokens}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
