"""One tensor-parallel Megatron rank of the sync benchmark, in a process of its own."""

from __future__ import annotations

import mmap
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.sync.child import serve
from bench.sync.fused_names import FusedNames
from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import build_model
from kimisys.adapters.megatron.policy import Policy
from kimisys.broadcast import Publisher, snapshot_layout
from kimisys.reshard import Layout

_THREADS = 1  # of each rank: two ranks on two cores, for torch and for kimisys alike


class Rank:
    """Holds its shards in bfloat16; both ways of bringing them to an engine begin here.

    memory: descriptor of the shared memory into which the gathered tensors go (rank 0 writes).
    """

    def __init__(
        self, rank: int, world: int, port: int, hf_config: dict[str, Any], memory: int
    ) -> None:
        torch.set_num_threads(_THREADS)
        runtime.initialize(world, 1, rank, world, "127.0.0.1", port, seed=rank, hf_config=hf_config)
        self.rank = rank
        self._model = build_model(hf_config, torch.bfloat16)
        self._layout = model_layout(self._model, hf_config, rank)
        self._buffers = model_buffers(self._model, rank)
        self._bridge = _bridge(hf_config)
        self._renamed = FusedNames(self._model)
        self._shared = torch.frombuffer(mmap.mmap(memory, 0), dtype=torch.uint8)
        self._publisher: Publisher | None = None
        self._changes: list[tuple[torch.Tensor, ...]] = []

    def snapshot(self) -> str:
        """The layout of this rank's snapshot, as JSON."""
        return snapshot_layout(self._layout, "bfloat16").to_json()

    def open_publisher(self, snapshots: list[str], address: str) -> None:
        """Serves the snapshot at `address`, given the snapshot layouts of all ranks."""
        merged = Layout.merge([Layout.from_json(text) for text in snapshots])
        self._publisher = Publisher(self._layout, merged, self.rank, Path(address))

    def scramble(self, seed: int) -> None:
        """New random weights: norms around one and equal on all ranks, the others of each rank's
        own. What was prepared is forgotten."""
        self._changes = []
        common = torch.Generator().manual_seed(seed)
        own = torch.Generator().manual_seed(1_000_003 * seed + self.rank)
        with torch.no_grad():
            for parameter in self._model.parameters():
                if parameter.dim() == 1:
                    parameter.normal_(1.0, 0.1, generator=common)
                else:
                    parameter.normal_(0.0, 0.03, generator=own)

    def prepare(self, density: float, seed: int) -> int:
        """Draws which elements `change` changes, each with probability `density`, and to what: the
        bfloat16 next to it, as a small step of an optimizer would. Returns how many."""
        common = torch.Generator().manual_seed(seed)
        own = torch.Generator().manual_seed(1_000_003 * seed + self.rank)
        self._changes = []
        for parameter in self._model.parameters():
            bits = parameter.detach().view(torch.int16).view(-1)
            generator = common if parameter.dim() == 1 else own
            drawn = torch.rand(bits.numel(), generator=generator) < density
            places = drawn.nonzero().view(-1)
            old = bits[places]
            self._changes.append((bits, places, old, old ^ 1))
        return sum(places.numel() for _, places, _, _ in self._changes)

    def change(self) -> None:
        """Changes what was prepared, or changes it back."""
        for number, (bits, places, old, new) in enumerate(self._changes):
            bits.index_copy_(0, places, new)
            self._changes[number] = (bits, places, new, old)

    def probe(self, tokens: list[int]) -> list[list[float]]:
        """Log-softmax over the vocabulary after each token but the last."""
        return Policy(self._model).full_log_probs(torch.tensor([tokens]))[0, :-1].tolist()

    def publish(self, version: int, full: bool) -> dict[str, Any]:
        """Our way. Returns `seconds`, `changed` (elements) and `nbytes` (of the record)."""
        assert self._publisher is not None
        done = self._publisher.publish(version, self._buffers, threads=_THREADS, full=full)
        return {"seconds": done.seconds, "changed": done.changed, "nbytes": done.delta_nbytes}

    @torch.no_grad()
    def gather(self) -> dict[str, Any]:
        """The usual way: mbridge gathers tensor by tensor, on all ranks, and names them as Hugging
        Face does; rank 0 copies each into the shared memory as soon as it is there.

        Returns seconds by phase, and in `table` (name, byte offset, shape) of each tensor.
        """
        began = time.perf_counter()
        copying, offset, table = 0.0, 0, []
        for name, tensor in self._bridge.export_weights([self._renamed]):
            if self.rank == 0:
                started = time.perf_counter()
                # One copy, from wherever mbridge left it: no .contiguous() on the way.
                place = self._shared[offset : offset + tensor.nbytes].view(tensor.dtype)
                place.view(tensor.shape).copy_(tensor)
                copying += time.perf_counter() - started
                table.append((name, offset, list(tensor.shape)))
                offset += tensor.nbytes
        whole = time.perf_counter() - began
        return {"seconds": {"gather": whole - copying, "to memory": copying}, "table": table}

    @torch.no_grad()
    def save(self, folder: str) -> dict[str, float]:
        """The way by files: mbridge gathers, rank 0 writes one safetensors file of Hugging Face's
        names. Returns seconds by phase."""
        began = time.perf_counter()
        tensors = {}
        for name, tensor in self._bridge.export_weights([self._renamed]):
            if self.rank == 0:
                tensors[name] = tensor.contiguous()  # as safetensors wants them
        gathered = time.perf_counter()
        if self.rank == 0:
            save_file(tensors, Path(folder) / "model.safetensors")
        return {"gather": gathered - began, "save": time.perf_counter() - gathered}

    def close(self) -> None:
        """Removes the socket and leaves the process group."""
        if self._publisher is not None:
            self._publisher.close()
        runtime.shutdown()


def _bridge(hf_config: dict[str, Any]) -> Any:
    from transformers import Qwen3Config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Transformer Engine is absent, from many modules
        from mbridge import AutoBridge
    return AutoBridge.from_config(Qwen3Config(**hf_config))


if __name__ == "__main__":
    serve(Rank)
