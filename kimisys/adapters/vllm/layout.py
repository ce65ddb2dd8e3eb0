"""vLLM's own answer to where each tensor-parallel rank keeps every element of a checkpoint.

The model is built on the meta device for the rank in question, and vLLM's own loader runs on
full-size meta tensors, traced. No weights, no process group: a stand-in answers what constructors
ask of one. Nothing of a running engine is changed: what is replaced for the duration is put back.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import vllm.distributed.parallel_state as parallel_state
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from kimisys.errors import KimisysError, LayoutError, TraceError
from kimisys.reshard import Layout, Tensor
from kimisys.reshard.tracer import trace_layout


@dataclass(frozen=True)
class _Group:
    """What a model's constructor and loader ask of a process group; it cannot communicate."""

    world_size: int = 1
    rank_in_group: int = 0

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1


_SINGLE_GROUPS = ("_PP", "_DP", "_EP", "_PCP", "_DCP")
"""Groups that vLLM has for other kinds of parallelism, each of one rank here."""


def offline_config(
    model: Path | str, dtype: Literal["auto", "float32", "bfloat16"] = "auto"
) -> VllmConfig:
    """A vLLM configuration for tracing without an engine.

    model: a folder with a config.json. dtype: of the parameters; "auto" is what config.json says.
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
    finally:  # vLLM prepares this process for being an engine, LD_PRELOAD included
        os.environ.clear()
        os.environ.update(variables)


def trace_vllm_layout(
    vllm_config: VllmConfig, tensors: Sequence[Tensor], tensor_parallel: int, rank: int
) -> Layout:
    """Where vLLM's tensor-parallel rank `rank` of `tensor_parallel` keeps which part of `tensors`.

    Works with and without a running engine in the process.

    vllm_config: of the model; its own tensor-parallel size does not matter.
    tensors: the checkpoint's tensors by their Hugging Face names, of any dtype.
    Returns a layout with one buffer per parameter of vLLM's, in vLLM's names and dtypes. All bytes
    of all parameters are covered, by fragments or by padding. Tied parameters are one buffer.
    Tensors that vLLM's loader ignores do not appear.
    Raises TraceError, naming the parameter or tensor, when the loader does what the tracer cannot
    follow or leaves a part of a parameter unwritten; LayoutError for an impossible rank or size.
    """
    return trace_model(build_model(vllm_config, tensor_parallel, rank), tensors)


@dataclass(frozen=True)
class RankModel:
    """The model of one rank as its constructor leaves it, and its configuration."""

    config: VllmConfig
    module: torch.nn.Module
    tensor_parallel: int
    rank: int

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Runs vLLM's own loader on the checkpoint's full-size tensors."""
        with set_current_vllm_config(self.config), _as_rank(self.tensor_parallel, self.rank):
            # torch types it as a tensor or a module, as any attribute of a module may be
            cast(Any, self.module).load_weights(iter(weights.items()))


def build_model(
    vllm_config: VllmConfig, tensor_parallel: int, rank: int, device: str = "meta"
) -> RankModel:
    """The model of one rank, before any loading.

    Raises LayoutError when the model cannot be split so, with vLLM's own reason.
    """
    if not 0 <= rank < tensor_parallel:
        raise LayoutError(
            f"rank {rank} of {tensor_parallel} tensor-parallel ranks does not exist; ranks count "
            "from 0"
        )
    config = _private_copy(vllm_config, tensor_parallel, rank)
    dtype = cast(torch.dtype, config.model_config.dtype)
    try:
        with (
            _as_rank(tensor_parallel, rank),
            torch.device(device),
            set_default_torch_dtype(dtype),
        ):
            module = initialize_model(vllm_config=config)
    except (AssertionError, ValueError) as error:
        raise LayoutError(
            f"vLLM cannot build {config.model_config.architectures} for tensor-parallel size "
            f"{tensor_parallel}: {_reason(error)}; choose a size that divides heads, key-value "
            "heads and hidden sizes"
        ) from error
    return RankModel(config, module, tensor_parallel, rank)


def trace_model(model: RankModel, tensors: Sequence[Tensor]) -> Layout:
    """The layout of a model that was built on the meta device; see ``trace_vllm_layout``."""

    def parameters() -> dict[str, torch.Tensor]:
        return dict(model.module.named_parameters())

    try:
        layout = trace_layout(tensors, parameters(), model.load, model.rank, current=parameters)
    except KimisysError:
        raise
    except Exception as error:  # whatever a foreign loader raises
        raise TraceError(
            f"vLLM's loader failed on the tensors given to it, at rank {model.rank} of "
            f"{model.tensor_parallel}: {_reason(error)}; compare their names and shapes with the "
            "model's config.json"
        ) from error
    _check_covered(layout)
    return layout


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


def _private_copy(vllm_config: VllmConfig, tensor_parallel: int, rank: int) -> VllmConfig:
    """A copy for another rank; what constructors write into (layers by name) is the copy's own."""
    config = copy.copy(vllm_config)
    config.parallel_config = copy.copy(vllm_config.parallel_config)
    config.parallel_config.tensor_parallel_size = tensor_parallel
    config.parallel_config.rank = rank
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}
    return config


@contextmanager
def _as_rank(tensor_parallel: int, rank: int) -> Iterator[None]:
    """This process answers as that tensor-parallel rank, for model constructors and loaders."""
    names = ("_TP", *_SINGLE_GROUPS)
    saved: dict[str, Any] = {name: getattr(parallel_state, name) for name in names}
    ropes = dict(rotary_embedding._ROPE_DICT)
    try:
        # Any: the stand-in is not a GroupCoordinator, and must not be one, as those communicate.
        stand_in: Any = _Group(tensor_parallel, rank)
        parallel_state._TP = stand_in
        for name in _SINGLE_GROUPS:
            if saved[name] is None:
                setattr(parallel_state, name, _Group())
        yield
    finally:
        for name, group in saved.items():
            setattr(parallel_state, name, group)
        # vLLM shares rotary embeddings between models by their shape; one on meta must not stay.
        rotary_embedding._ROPE_DICT.clear()
        rotary_embedding._ROPE_DICT.update(ropes)


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
