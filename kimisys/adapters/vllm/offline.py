"""The layout of all ranks of engines that do not run, of any size: no weights, no GPU.

Every rank is asked, but of layers that are alike only one: vLLM builds each rank's model with a few
consecutive layers that hold one of each kind, on the meta device, and its loader is traced.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import vllm
from vllm.config import VllmConfig
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform
from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_general_plugins

from kimisys.adapters.trace_cache import asked, cached
from kimisys.adapters.vllm.layers import (
    Checkpoint,
    Numbered,
    alike,
    layer_of,
    layer_prefixes,
    layer_signatures,
    shortest_window,
)
from kimisys.adapters.vllm.layout import RankModel, build_model, offline_config, trace_model
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.errors import LayoutError, TraceError
from kimisys.reshard import (
    Block,
    Buffer,
    Fragment,
    Instance,
    Layout,
    Padding,
    Place,
    SymbolicLayout,
    Tensor,
)

Dtype = Literal["auto", "float32", "bfloat16"]


def engine_layout(
    model: Path | str | Mapping[str, Any],
    tensors: Sequence[Tensor],
    parallel: EngineParallel,
    dtype: Dtype = "auto",
    places: Sequence[Place] = (),
) -> SymbolicLayout:
    """Where vLLM's ranks keep every element of a checkpoint.

    model: a folder with a config.json, or what is in one.
    tensors: the checkpoint's, by their Hugging Face names. Those that vLLM's loader ignores do not
    appear.
    dtype: of the parameters; "auto" is what config.json says. places: of the ranks.
    Returns blocks with one buffer per parameter and rank, in vLLM's names, of `parallel.world_size`
    ranks. Layers that are alike are instances of one block, whose label is the layer's number; the
    rest is one block with the label "". Kept in the trace cache.
    Raises LayoutError for what vLLM cannot split so, for a tensor of which the ranks together would
    not hold every element, and for a folder without a config.json; TraceError for what vLLM's
    loader does that cannot be followed, or leaves unwritten.
    """
    config = dict(model) if isinstance(model, Mapping) else _read_config(Path(model))

    def trace() -> SymbolicLayout:
        with tempfile.TemporaryDirectory(prefix="kimisys-") as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            return symbolic_layout(offline_config(folder, dtype), tensors, parallel)

    if _is_registered_elsewhere(config):
        found = trace()  # code that the cache's key does not know
    else:
        key = {
            "config": config,
            "tensors": _digest(sorted((t.name, t.dtype, t.shape) for t in tensors)),
            "parallel": str(parallel),
            "dtype": dtype,
            **_vllm_itself(),
            **asked(["transformers"], ["adapters/vllm"]),
        }
        found = cached("vllm", key, trace, SymbolicLayout.to_bytes, SymbolicLayout.from_bytes)
    return SymbolicLayout(found.blocks, places) if places else found


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise LayoutError(
            f"{file} cannot be read: {error}; name the folder of a checkpoint, or give what is in "
            "its config.json"
        ) from error
    if not isinstance(config, dict):
        raise LayoutError(f"{file} holds no JSON object: take the checkpoint's own config.json")
    return config


def _is_registered_elsewhere(config: Mapping[str, Any]) -> bool:
    """Whether vLLM would build the model by code that a plug-in has brought."""
    load_general_plugins()
    for name in config.get("architectures") or []:
        known: Any = ModelRegistry.models.get(name)
        if known is None:  # vLLM refuses it
            continue
        lazy = hasattr(known, "module_name")
        module: str = known.module_name if lazy else known.model_cls.__module__
        if not module.startswith("vllm."):
            return True
    return False


def _vllm_itself() -> dict[str, Any]:
    """What the answer depends on beside the question, for the cache's key. Only a digest of the
    environment, which may hold secrets (VLLM_API_KEY)."""
    environment = {k: v for k, v in os.environ.items() if k.startswith("VLLM_")}
    plugins = entry_points(group=DEFAULT_PLUGINS_GROUP)
    return {
        "vllm": [vllm.__version__, type(current_platform).__name__],
        "plugins": sorted([p.name, p.value, p.dist.version if p.dist else ""] for p in plugins),
        "environment": _digest(environment),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def symbolic_layout(
    vllm_config: VllmConfig, tensors: Sequence[Tensor], parallel: EngineParallel
) -> SymbolicLayout:
    """``engine_layout`` of a configuration that vLLM made, without the trace cache."""
    checkpoint = Checkpoint(tensors)
    outer = _Part()
    parts: list[_Part] = []
    for stage in range(parallel.pipeline):
        parts += _trace_stage(vllm_config, checkpoint, parallel, stage, outer)
    blocks: list[tuple[Layout, list[Instance]]] = []
    for part in [*parts, outer]:
        if not part.ranks:
            continue
        layout, instances = part.layout(parallel), part.instances(parallel)
        same = next((others for known, others in blocks if known == layout), None)
        if same is not None:  # alike layers of different stages
            same += instances
            continue
        _check_whole(layout)
        blocks.append((layout, instances))
    return SymbolicLayout([Block(layout, instances) for layout, instances in blocks])


@dataclass
class _Part:
    """One block in the making: what is kept of `labels` by `ranks`, in the order of local ranks."""

    labels: Sequence[str] = ("",)
    ranks: list[int] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    buffers: list[Buffer] = field(default_factory=list)
    fragments: list[tuple[Fragment, str, int, str]] = field(default_factory=list)
    padding: list[tuple[Padding, int, str]] = field(default_factory=list)

    def local(self, rank: int) -> int:
        """The local number of a rank; ranks come in order."""
        if not self.ranks or self.ranks[-1] != rank:
            self.ranks.append(rank)
        return len(self.ranks) - 1

    def layout(self, parallel: EngineParallel) -> Layout:
        """The block's layout; each replica's ranks are further local ranks."""
        count = len(self.ranks)
        starts = [replica * count for replica in range(parallel.replicas)]
        return Layout(
            list(self.tensors.values()),
            [Buffer(s + b.rank, b.name, b.nbytes) for s in starts for b in self.buffers],
            [
                Fragment(tensor, f.region, s + local, buffer, f.byte_offset, f.byte_strides)
                for s in starts
                for f, tensor, local, buffer in self.fragments
            ],
            [
                Padding(s + local, buffer, p.byte_offset, p.nbytes)
                for s in starts
                for p, local, buffer in self.padding
            ],
        )

    def instances(self, parallel: EngineParallel) -> list[Instance]:
        """One for each label, on the ranks of all replicas."""
        ranks = [
            replica * parallel.engine_size + rank
            for replica in range(parallel.replicas)
            for rank in self.ranks
        ]
        return [Instance(label, ranks) for label in self.labels]


def _trace_stage(
    vllm_config: VllmConfig,
    checkpoint: Checkpoint,
    parallel: EngineParallel,
    stage: int,
    outer: _Part,
) -> list[_Part]:
    """Parts of one pipeline stage's layers; what else the stage has is added to `outer`."""
    ranks = [r for r in range(parallel.engine_size) if parallel.place(r).pipeline == stage]
    whole = build_model(vllm_config, parallel, ranks[0])
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    prefixes = layer_prefixes(whole.module, layers, parallel.pipeline)
    groups = alike(layer_signatures(whole.module, prefixes, checkpoint))
    del whole
    window = shortest_window(groups) if groups else None
    parts: dict[int, _Part] = {}  # by the layer that stands for its likes
    for group in groups:
        chosen = next(number for number in group if window is not None and number in window)
        parts[chosen] = _Part([str(number) for number in group])

    def made(name: str) -> bool:
        at = layer_of(name, prefixes)
        return at is None or window is None or at.number in window

    given: Sequence[Tensor] = ()
    for rank in ranks:
        model = build_model(vllm_config, parallel, rank, layers=window)
        if rank == ranks[0]:
            given = _given(checkpoint, model, window, prefixes, made)
        traced = trace_model(model, given, made)
        _sort_into(traced, rank, prefixes, parts, outer)
    return list(parts.values())


def _given(
    checkpoint: Checkpoint,
    model: RankModel,
    window: range | None,
    prefixes: Collection[str],
    made: Callable[[str], bool],
) -> Sequence[Tensor]:
    """The checkpoint's tensors but those of layers that were not made."""
    if window is None:
        return checkpoint.without_layers((), ())
    layers = trace_model(
        model,
        checkpoint.of_layers(window),
        lambda name: made(name) and layer_of(name, prefixes) is not None,
    )
    return checkpoint.without_layers(checkpoint.prefixes_of(layers), window)


def _sort_into(
    traced: Layout,
    rank: int,
    prefixes: Collection[str],
    parts: Mapping[int, _Part],
    outer: _Part,
) -> None:
    """Adds what one rank keeps to the parts it belongs to, under names with "{}" for the number."""
    tensors = {tensor.name: tensor for tensor in traced.tensors}
    where: dict[str, tuple[_Part, int, str, int | None] | None] = {}
    for buffer in traced.buffers:
        at = layer_of(buffer.name, prefixes)
        part = outer if at is None else parts.get(at.number)
        if part is None:  # beside a layer that stands for it
            where[buffer.name] = None
            continue
        name = buffer.name if at is None else at.template
        local = part.local(rank)
        where[buffer.name] = part, local, name, None if at is None else at.number
        part.buffers.append(Buffer(local, name, buffer.nbytes))
    for fragment in traced.fragments:
        found = where[fragment.buffer]
        if found is None:
            continue
        part, local, name, number = found
        tensor = tensors[fragment.tensor]
        label = _template(tensor.name, number, fragment.buffer)
        if label not in part.tensors:
            part.tensors[label] = Tensor(label, tensor.dtype, tensor.shape)
        part.fragments.append((fragment, label, local, name))
    for padding in traced.padding:
        found = where[padding.buffer]
        if found is not None:
            part, local, name, _ = found
            part.padding.append((padding, local, name))


def _template(tensor: str, number: int | None, buffer: str) -> str:
    if number is None:
        return tensor
    at = Numbered.of(tensor)
    if at is None or at.number != number:
        raise TraceError(
            f"{buffer!r} of layer {number} is loaded from {tensor!r}, which is not of that number; "
            "alike layers cannot be told from one"
        )
    return at.template


def _check_whole(layout: Layout) -> None:
    """Raises LayoutError for a tensor of which no rank keeps some element: vLLM would lose it."""
    held: Counter[str] = Counter()
    for fragment in layout.cover().fragments:
        held[fragment.tensor] += fragment.region.elements
    for tensor in layout.tensors:
        if held[tensor.name] < tensor.elements:
            raise LayoutError(
                f"{tensor.elements - held[tensor.name]} of the {tensor.elements} elements of "
                f"{tensor.name!r} would be on none of the ranks {layout.ranks[0]} to "
                f"{layout.ranks[-1]}; choose sizes of parallelism that divide its shape "
                f"{tensor.shape}"
            )
