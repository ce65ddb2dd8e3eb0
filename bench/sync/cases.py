"""What of a whole sync is timed, and against what.

The usual ways are made of the frameworks' own parts: mbridge's `export_weights` gathers whole
tensors at the ranks; one rank puts them into shared memory, from where vLLM's `load_weights` takes
them, or into a safetensors file on a RAM disk, from where vLLM's `reload_weights` does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

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


def cases(world: World, name: str) -> Iterator[Case]:
    """A sync of `world`, whose model is `name`: everything, then what changed.

    `served` is until the engine computes with the new weights; `moved` leaves out, on both sides,
    what vLLM's own packing takes.
    """
    faults = ["no way's answer has been looked at"]

    def is_right() -> bool:
        faults[:] = world.faults()
        for fault in faults:
            Console(stderr=True).print(fault, style="red", markup=False)
        return not faults

    def as_before() -> bool:
        """The very calls that were looked at before, in the same processes."""
        return not faults

    sync = f"sync of {name}, TP {RANKS} to TP {world.engine_ranks}"
    peers: dict[str, Callable[[], object]] = {
        "mbridge gather, shared memory, load_weights": world.load_weights,
        "mbridge gather, safetensors, reload_weights": world.reload_weights,
    }

    def moved() -> float:
        return time.perf_counter() - world.packing

    yield Case(
        f"{sync}, full, served",
        world.full,
        peers,
        is_right,
        parts=lambda: _medians(world, "kimisys full"),
        before=world.change,
        also={f"{sync}, full, moved": moved},
    )
    world.seconds.clear()
    yield Case(
        f"{sync}, {100 * world.density:g} % delta, served",
        world.delta,
        peers,
        as_before,
        parts=lambda: _medians(world, "kimisys delta"),
        figures=lambda: world.figures,
        before=world.change,
        also={f"{sync}, {100 * world.density:g} % delta, moved": moved},
    )


def _medians(world: World, ours: str) -> dict[str, float]:
    """Milliseconds of each phase of each way that was timed."""
    ways = (ours, "load_weights", "reload_weights")
    return {
        f"{way}: {phase}": round(1e3 * statistics.median(seconds), 1)
        for way in ways
        for phase, seconds in world.seconds[way].items()
    }
