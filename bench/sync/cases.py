"""What of a whole sync is timed, and against what.

The usual way is made of the frameworks' own parts: mbridge's `export_weights` gathers whole tensors
at the ranks, one rank puts them into shared memory, vLLM's `load_weights` takes them from there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from bench.ceiling import LINE, ceilings
from bench.harness import Case
from bench.sync.world import RANKS, World

QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
"""The shape of Qwen3-0.6B: 1.19 GB in bfloat16."""

_USUAL = "mbridge gather, shared memory, load_weights"


def cases(world: World, name: str) -> Iterator[Case]:
    """A sync of `world`, whose model is `name`.

    `served` is until the engine computes with the new weights; `moved` leaves out, on both sides,
    what vLLM's own packing takes. The last is served, against one copy of the same bytes.
    """
    faults = ["no way's answer has been looked at"]

    def served_is_right() -> bool:
        faults[:] = world.faults()
        for fault in faults:
            Console(stderr=True).print(fault, style="red", markup=False)
        return not faults

    def as_before() -> bool:
        """The very calls that were looked at before, in the same processes."""
        return not faults

    sync = f"sync of {name}, TP {RANKS} to TP 1"
    usual: dict[str, Callable[[], object]] = {_USUAL: world.usual}
    yield Case(
        f"{sync}, served", world.kimisys, usual, served_is_right, parts=lambda: _medians(world)
    )
    yield Case(
        f"{sync}, moved",
        world.kimisys,
        usual,
        as_before,
        clock=lambda: time.perf_counter() - world.packing,
    )
    copies = ceilings(world.nbytes // LINE * LINE)
    yield Case(f"{sync}, served, against one copy", world.kimisys, copies, as_before, world.nbytes)


def _medians(world: World) -> dict[str, float]:
    """Milliseconds of each phase of both ways."""
    return {
        f"{way}: {phase}": round(1e3 * statistics.median(seconds), 1)
        for way, phases in world.seconds.items()
        for phase, seconds in phases.items()
    }
