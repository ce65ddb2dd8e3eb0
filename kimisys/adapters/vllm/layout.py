"""vLLM's own answer to where each rank of an engine keeps every element of a checkpoint.

The model is built on the meta device for the rank in question, and vLLM's own loader runs on
full-size meta tensors, traced. No weights, no process group: a stand-in answers what constructors
ask of one. Nothing of a running engine is changed: what is replaced for the duration is put back.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization.kv_cache import KVCacheScaleParameter
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.adapters.vllm.stand_in import as_rank, every_kernel
from kimisys.errors import KimisysError, LayoutError, TraceError
from kimisys.reshard import Layout, Tensor
from kimisys.reshard.tracer import trace_layout


def offline_config(
    model: Path | str, dtype: Literal["auto", "float32", "bfloat16"] = "auto"
) -> VllmConfig:
    """A vLLM configuration for tracing without an engine.

    model: a folder with a config.json. dtype: of the parameters; "auto" is what config.json says.
    Raises LayoutError, with vLLM's own reason, for a configuration that it does not take.
    """
    arguments = EngineArgs(
        model=str(model),
        dtype=dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
    )
    variables = dict(os.environ)
    try:
        return arguments.create_engine_config()
    except Exception as error:  # whatever vLLM and transformers find wrong with it
        raise LayoutError(
            f"vLLM takes no model from {str(model)!r}: {_reason(error)}; compare its config.json "
            "with one of an architecture that this vLLM knows"
        ) from error
    finally:  # vLLM prepares this process for being an engine, LD_PRELOAD included
        os.environ.clear()
        os.environ.update(variables)


def trace_vllm_layout(
    vllm_config: VllmConfig, tensors: Sequence[Tensor], parallel: EngineParallel, rank: int
) -> Layout:
    """Where rank `rank` of an engine keeps which part of `tensors`.

    Works with and without a running engine in the process.

    vllm_config: of the model; its own sizes of parallelism do not matter.
    parallel: of one engine; its `replicas` do not matter: `rank` is a rank of the first.
    tensors: the checkpoint's tensors by their Hugging Face names, of any dtype.
    Returns a layout with one buffer per parameter of vLLM's, in vLLM's names and dtypes. All bytes
    of all parameters are covered, by fragments or by padding. Tied parameters are one buffer.
    Tensors that vLLM's loader ignores do not appear.
    Raises TraceError, naming the parameter or tensor, when the loader does what the tracer cannot
    follow or leaves a part of a parameter unwritten; LayoutError for an impossible rank or size.
    """
    return trace_model(build_model(vllm_config, parallel, rank), tensors)


@dataclass(frozen=True)
class RankModel:
    """The model of one rank as its constructor leaves it, and its configuration."""

    config: VllmConfig
    module: torch.nn.Module
    parallel: EngineParallel
    rank: int
    layers: range | None = None

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Runs vLLM's own loader on the checkpoint's full-size tensors."""
        with set_current_vllm_config(self.config), self.as_rank():
            # torch types it as a tensor or a module, as any attribute of a module may be
            cast(Any, self.module).load_weights(iter(weights.items()))

    def as_rank(self) -> AbstractContextManager[None]:
        """This process answers as the model's rank inside the `with` block."""
        return as_rank(self.parallel, self.rank, self.layers)


def build_model(
    vllm_config: VllmConfig,
    parallel: EngineParallel,
    rank: int,
    device: str = "meta",
    layers: range | None = None,
) -> RankModel:
    """The model of one rank, before any loading.

    layers: the only ones that are made; None: all of the rank's pipeline stage.
    Raises LayoutError when the model cannot be split so, with vLLM's own reason.
    """
    parallel = parallel.engine
    config = _private_copy(vllm_config, parallel, rank)
    parallel.check(config.model_config.hf_text_config.to_dict())
    dtype = cast(torch.dtype, config.model_config.dtype)
    try:
        with (
            as_rank(parallel, rank, layers),
            every_kernel() if config.quant_config is not None else nullcontext(),
            torch.device(device),
            set_default_torch_dtype(dtype),
        ):
            module = initialize_model(vllm_config=config)
    except (AssertionError, ValueError, RuntimeError, NotImplementedError) as error:
        raise LayoutError(
            f"vLLM cannot build {config.model_config.architectures} for {parallel}: "
            f"{_reason(error)}; choose sizes that divide heads, key-value heads, hidden sizes and "
            "experts"
        ) from error
    return RankModel(config, module, parallel, rank, layers)


def trace_model(
    model: RankModel,
    tensors: Sequence[Tensor],
    wanted: Callable[[str], bool] = lambda name: True,
) -> Layout:
    """The layout of a model that was built on the meta device; see ``trace_vllm_layout``.

    wanted: which of its parameters the layout is of, by name.
    """

    def parameters() -> dict[str, torch.Tensor]:
        return {name: p for name, p in model.module.named_parameters() if wanted(name)}

    try:
        buffers = dict(model.module.named_buffers())
        layout = trace_layout(
            tensors, parameters(), model.load, model.rank, current=parameters, guarded=buffers
        )
    except KimisysError:
        raise
    except Exception as error:  # whatever a foreign loader raises
        raise TraceError(
            f"vLLM's loader failed on the tensors given to it, at rank {model.rank} of "
            f"{model.parallel}: {_reason(error)}; compare their names and shapes with the "
            "model's config.json"
        ) from error
    layout = _without_kv_scales(layout, parameters())
    _check_covered(layout)
    return layout


def _without_kv_scales(layout: Layout, parameters: Mapping[str, torch.Tensor]) -> Layout:
    """Without the scales of an FP8 model's key-value cache that its checkpoint does not have: vLLM
    has a default for each, and takes these parameters away after loading."""
    written = {fragment.buffer for fragment in layout.fragments}
    unread = {
        name
        for name, parameter in parameters.items()
        if isinstance(parameter, KVCacheScaleParameter) and name not in written
    }
    if not unread:
        return layout
    buffers = [buffer for buffer in layout.buffers if buffer.name not in unread]
    return Layout(layout.tensors, buffers, layout.fragments, layout.padding, layout.places)


def _check_covered(layout: Layout) -> None:
    """Raises TraceError for parameters of which some bytes are neither loaded nor filled.

    Bytes written twice are left to the plan's proof.
    """
    size = {tensor.name: tensor.nbytes // max(tensor.elements, 1) for tensor in layout.tensors}
    written: Counter[str] = Counter()
    for fragment in layout.fragments:
        written[fragment.buffer] += fragment.region.elements * size[fragment.tensor]
    for padding in layout.padding:
        written[padding.buffer] += padding.nbytes
    missing = [
        f"{buffer.name!r} ({buffer.nbytes - written[buffer.name]} of {buffer.nbytes} bytes)"
        for buffer in layout.buffers
        if written[buffer.name] < buffer.nbytes
    ]
    if missing:
        raise TraceError(
            f"vLLM's loader leaves parts of its parameters unwritten: {', '.join(missing[:8])}"
            f"{' and more' if len(missing) > 8 else ''}; a tensor is missing from the checkpoint, "
            "or the model needs something that is not in it"
        )


def _private_copy(vllm_config: VllmConfig, parallel: EngineParallel, rank: int) -> VllmConfig:
    """A copy for another rank; what constructors write into (layers by name) is the copy's own."""
    at = parallel.place(rank)
    config = copy.copy(vllm_config)
    config.parallel_config = copy.copy(vllm_config.parallel_config)
    config.parallel_config.tensor_parallel_size = parallel.tensor
    config.parallel_config.pipeline_parallel_size = parallel.pipeline
    config.parallel_config.data_parallel_size = parallel.data
    config.parallel_config.data_parallel_rank = at.data
    config.parallel_config.enable_expert_parallel = parallel.expert
    config.parallel_config.world_size = parallel.tensor * parallel.pipeline
    config.parallel_config.rank = rank % config.parallel_config.world_size
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}
    return config


def _reason(error: BaseException) -> str:
    """What an error says, or where it was raised: vLLM's assertions say nothing."""
    if str(error):
        return f"{type(error).__name__}: {error}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return type(error).__name__
    code = trace.tb_frame.f_code
    file = Path(code.co_filename).name
    return f"{type(error).__name__} in {code.co_name} ({file}:{trace.tb_lineno})"
