"""The configuration of a run: frozen, complete, checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from kimisys.errors import KimisysError

Dtype = Literal["float32", "bfloat16"]

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # vLLM 0.32, CPU attention

# per generated token: what rounding alone may make of trainer against engine
LOGPROB_GAP_BOUNDS: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.03}


class ConfigError(KimisysError):
    """A configuration that cannot run. The message names the option and what would be legal."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the Qwen3 model that the recipe makes and trains."""

    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    """Key-value heads; the query heads share them in equal groups."""
    head_dim: int = 32
    ffn_size: int = 256
    tie_embeddings: bool = False
    """Whether the output layer is the transposed input embedding."""
    rope_theta: float = 10000.0

    def hugging_face(self, vocab_size: int, context: int, eos: int, pad: int) -> dict[str, Any]:
        """The config.json of this model."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.05,
            "intermediate_size": self.ffn_size,
            "max_position_embeddings": context,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": pad,
            "rms_norm_eps": 1e-6,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "tie_word_embeddings": self.tie_embeddings,
            "torch_dtype": "float32",
            "use_cache": True,
            "vocab_size": vocab_size,
        }


@dataclass(frozen=True)
class SftConfig:
    """Supervised warm-up on written-out demonstrations."""

    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 20

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then linear decay to a twentieth."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (1 - 0.95 * done)


@dataclass(frozen=True)
class TrainConfig:
    """The reference recipe: a short SFT, then Kimi k1.5's policy optimisation, of a small Qwen3 on
    arithmetic.

    Two tensor-parallel Megatron ranks train, one vLLM engine samples; after every step the new
    weights go from shard to engine through a kimisys plan, verified by digest.
    """

    out: Path | None = None
    """Folder for metrics, summary, curve and weights; if not given, runs/DATE-TIME-seedN."""
    seed: int = 1
    """Seeds the weights, the problems and the sampling."""
    steps: int = 30
    """RL steps."""
    learning_rate: float = 6e-5
    """Of the RL steps. 0 is the control that must not learn."""
    freeze_engine: bool = False
    """The control without syncs: the engine keeps the weights it had after SFT."""

    prompts: int = 64
    """Problems in one RL step."""
    samples: int = 8
    """Samples of each problem: k of Kimi k1.5."""
    minibatches: int = 4
    """Optimizer steps in one RL step; each takes whole groups."""
    tau: float = 0.1
    """Weight of the squared log-ratio: τ of Kimi k1.5 (arXiv 2501.12599), in reward per nat."""
    clip_gradient: float = 1.0
    """Largest norm of a gradient."""
    held_out: int = 512
    """Held-out problems on which the pass rates are measured."""

    wire_dtype: Dtype = "float32"
    """The dtype in which weights are published, and in which the engine computes."""
    tensor_parallel: int = 2
    """Megatron ranks."""
    ready_timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 240.0
    """How long a start, a step or a sync may take before the run gives up and says who was late."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sft: SftConfig = field(default_factory=SftConfig)

    def check(self) -> None:
        """Raise ConfigError for what cannot run, before anything starts."""
        self._check_ranges()
        self._check_layout()
        if self.prompts % self.minibatches:
            raise ConfigError(
                f"--prompts {self.prompts} does not divide into --minibatches {self.minibatches} "
                "of whole groups"
            )
        if self.out is not None and self.out.exists():
            if not self.out.is_dir():
                raise ConfigError(f"--out {self.out} is a file; name a folder")
            if any(self.out.iterdir()):
                raise ConfigError(f"--out {self.out} is not empty; choose another or empty it")

    def _check_ranges(self) -> None:
        """(option, value, the least and the largest that make sense)"""
        model, sft, many = self.model, self.sft, 1 << 20
        for option, value, low, high in (
            ("--seed", self.seed, 0, 2**31 - 1),
            ("--steps", self.steps, 1, many),
            ("--prompts", self.prompts, 1, many),
            ("--samples", self.samples, 2, 1024),  # the baseline is the mean of a group
            ("--minibatches", self.minibatches, 1, many),
            ("--held-out", self.held_out, 1, 10_000),
            ("--tensor-parallel", self.tensor_parallel, 1, 64),
            ("--learning-rate", self.learning_rate, 0.0, 1.0),
            ("--tau", self.tau, 0.0, 1e6),
            ("--clip-gradient", self.clip_gradient, 1e-9, 1e9),
            ("--ready-timeout", self.ready_timeout, 1.0, 86_400.0),
            ("--model.hidden-size", model.hidden_size, 1, many),
            ("--model.layers", model.layers, 1, 1024),
            ("--model.heads", model.heads, 1, 1024),
            ("--model.kv-heads", model.kv_heads, 1, 1024),
            ("--model.ffn-size", model.ffn_size, 1, many),
            ("--model.rope-theta", model.rope_theta, 1.0, 1e12),
            ("--sft.steps", sft.steps, 0, many),
            ("--sft.batch-size", sft.batch_size, 1, many),
            ("--sft.learning-rate", sft.learning_rate, 0.0, 1.0),
            ("--sft.warmup-steps", sft.warmup_steps, 0, many),
        ):
            if not low <= value <= high:  # NaN too
                raise ConfigError(f"{option} is {value}; it must lie in {low} to {high}")

    def _check_layout(self) -> None:
        model = self.model
        if model.heads % model.kv_heads:
            raise ConfigError(
                f"--model.heads {model.heads} is not a multiple of --model.kv-heads "
                f"{model.kv_heads}"
            )
        if model.head_dim not in HEAD_DIMS:
            raise ConfigError(
                f"--model.head-dim is {model.head_dim}; vLLM's attention on the CPU has {HEAD_DIMS}"
            )
        for option, value in (
            ("--model.heads", model.heads),
            ("--model.kv-heads", model.kv_heads),
            ("--model.ffn-size", model.ffn_size),
        ):
            if value % self.tensor_parallel:
                raise ConfigError(
                    f"--tensor-parallel {self.tensor_parallel} does not divide {option} {value}; "
                    "Megatron gives each rank whole heads"
                )
