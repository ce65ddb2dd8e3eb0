"""How a vLLM engine is made: what may be chosen, and what is chosen for good."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kimisys.adapters.vllm import environment
from kimisys.errors import CheckpointError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

_BLOCK_TOKENS = 32  # of a cache block: the smallest that the CPU's attention likes


@dataclass(frozen=True)
class EngineConfig:
    """How to start an engine."""

    model: Path
    """Folder with a Hugging Face config.json; weights in it are not read."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; publishers must publish in it."""
    tensor_parallel: int = 1
    """Ranks of the engine. One runs in this process, more are worker processes."""
    max_length: int = 256
    """Largest number of tokens in a prompt and its completion together."""
    max_sequences: int = 512
    """Sequences in one step."""
    max_batched_tokens: int = 8192
    """Tokens in one step: bounds the prompts that begin together. At least those of the longest
    sequence, and one of each other."""
    kv_cache_bytes: int = 512 << 20
    """Memory of the key-value cache of a rank, allocated at start."""
    prefix_caching: bool = False
    """Keys and values of whole blocks of a prompt are found again by later prompts. Of no use for
    prompts that are about as short as a block."""
    threads: int = 2
    """OpenMP threads of an engine in this process; at most one for each of `cpus`."""
    cpus: tuple[int, ...] = ()
    """The CPUs that the process' threads, those that exist already included, and those of worker
    processes may run on. Empty: leave it as it is."""
    seed: int = 0
    """Of sampling, for calls that give none."""
    timeout_seconds: float = 600.0
    """Longest wait of a call for the engine, its turn included, and of the engine for its ranks."""

    @property
    def step_tokens(self) -> int:
        """Most tokens in one step: as prefills are whole, the longest must fit beside a token of
        every other sequence, or it would wait for these to end."""
        return max(self.max_batched_tokens, self.max_length + self.max_sequences)

    @property
    def own_threads(self) -> int:
        """OpenMP threads of a rank in this process, given its CPUs."""
        return min(self.threads, len(self.cpus) or self.threads)


def build(config: EngineConfig) -> LLMEngine:
    """The vLLM engine; called in the thread that will step it."""
    environment.pin(config.cpus)  # first: what is counted and bound afterwards goes by it
    environment.apply(config.tensor_parallel)
    import torch

    torch._dynamo.config.disable = True  # TORCHDYNAMO_DISABLE, for a process that has torch already
    torch.set_num_threads(config.own_threads)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from kimisys.adapters.vllm import plugin

    plugin.register()
    _register_models(config.model)
    arguments = EngineArgs(
        model=str(config.model),
        dtype=config.dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        tensor_parallel_size=config.tensor_parallel,
        max_model_len=config.max_length,
        max_num_seqs=config.max_sequences,
        max_num_batched_tokens=config.step_tokens,
        kv_cache_memory_bytes=config.kv_cache_bytes,
        block_size=_BLOCK_TOKENS,
        # a seeded sequence cannot take a prefill in parts: vLLM would set back its generator's
        # offset, which those of the CPU do not have
        enable_chunked_prefill=False,
        enable_prefix_caching=config.prefix_caching,
        logprobs_mode="processed_logprobs",
        max_logprobs=-1,
        seed=config.seed,
        disable_log_stats=True,
        weight_transfer_config={"backend": plugin.BACKEND},  # type: ignore[arg-type]
        worker_extension_cls="kimisys.adapters.vllm.weight_transfer.WorkerReport",
    )
    return LLMEngine.from_engine_args(arguments)


def _register_models(folder: Path) -> None:
    """Imports the model's class here; vLLM would inspect it in a child process (10 s, once)."""
    from vllm.model_executor.models import ModelRegistry

    for name in json.loads((folder / "config.json").read_text())["architectures"]:
        known = ModelRegistry.models.get(name)
        load = getattr(known, "load_model_cls", None)
        if load is not None:
            ModelRegistry.register_model(name, load())


def check(config: EngineConfig) -> None:
    """Raises CheckpointError, or ValueError for CPUs that this process may not use."""
    missing = sorted(set(config.cpus) - os.sched_getaffinity(0))
    if missing:
        raise ValueError(
            f"the engine of {config.model} is to run on CPUs {missing}, and this process may use "
            f"{sorted(os.sched_getaffinity(0))}; name some of these in EngineConfig.cpus"
        )
    path = config.model / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; give a folder with a Hugging Face config.json"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("architectures"), list):
        raise CheckpointError(
            f"{path} does not name its architectures, so vLLM does not know what to build; add "
            '"architectures", for example ["Qwen3ForCausalLM"]'
        )


def sampling(**options: Any) -> SamplingParams:
    """vLLM's parameters for one request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # ignore_eos: only the caller's stop tokens end a sample, not what config.json calls eos.
    return SamplingParams(
        ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **options
    )
