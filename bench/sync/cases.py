"""What of a whole sync is timed, and against what."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
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

_USUAL = "mbridge gather, shared memory, load_weights"


def cases(hf_config: Mapping[str, Any], name: str) -> Iterator[Case]:
    """A sync from Megatron at TP 2 to vLLM at TP 1, both running, in bfloat16.

    `served` is until the engine computes with the new weights; `moved` leaves out, on both sides,
    what vLLM's own packing of weights takes. The last two are served against one copy of the same
    bytes. name: of the model.
    """
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        with console.status(f"starting {RANKS} Megatron ranks and a vLLM engine ({name})"):
            world = World(hf_config, Path(folder))
        faults: list[str] = []

        def served_is_right() -> bool:
            faults[:] = [fault] if (fault := world.what_is_wrong()) else []
            for fault in faults:
                console.print(fault, style="red", markup=False)
            return not faults

        def as_before() -> bool:
            """The same calls as those that were just looked at, in the same processes."""
            return not faults

        try:
            model = f"sync of {name}, TP {RANKS} to TP 1"
            yield Case(
                f"{model}, served",
                world.kimisys,
                _USUAL,
                world.usual,
                served_is_right,
                parts=lambda: _medians(world),
            )
            yield Case(
                f"{model}, moved",
                world.kimisys,
                _USUAL,
                world.usual,
                as_before,
                clock=lambda: time.perf_counter() - world.packing,
            )
            with ThreadPoolExecutor(2) as pool:
                other = np.empty_like(world.gathered)
                halves = list(zip(np.split(other, 2), np.split(world.gathered, 2), strict=True))

                def on_two_threads() -> None:
                    list(pool.map(lambda half: np.copyto(*half), halves))

                copies = {
                    "numpy copyto (one thread)": lambda: np.copyto(other, world.gathered),
                    "numpy copyto (two threads)": on_two_threads,
                }
                for peer, copy in copies.items():
                    yield Case(
                        f"{model}, served", world.kimisys, peer, copy, as_before, world.nbytes
                    )
        finally:
            world.close()


def _medians(world: World) -> dict[str, float]:
    """Milliseconds of each phase of both ways."""
    return {
        f"{way}: {phase}": round(1e3 * statistics.median(seconds), 1)
        for way, phases in world.seconds.items()
        for phase, seconds in phases.items()
    }
