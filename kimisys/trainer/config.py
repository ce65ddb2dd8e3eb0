"""The configuration of a run: frozen, complete, checked before anything starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from kimisys.errors import KimisysError

Dtype = Literal["float32", "bfloat16"]

DEFAULT_TASK = "kimisys.trainer.arithmetic:task"

MANY = 1 << 20
MANY_TOKENS = 1 << 40
Range = tuple[str, float, float, float]

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # vLLM 0.32, CPU attention

# per generated token: what rounding alone may make of trainer against engine
LOGPROB_GAP_BOUNDS: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.03}


class ConfigError(KimisysError):
    """A configuration that cannot run. The message names the option and what would be legal."""


@dataclass(frozen=True)
class ShapeConfig:
    """The shape of the Qwen3 model that is made when no --model is given."""

    hidden_size: int = 128
    layers: int = 4
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
class RunConfig:
    """What every training run has: a model, a task, a layout, supervised steps, checkpoints."""

    out: Path | None = None
    """Folder for all that the run writes; if not given, runs/DATE-TIME-seedN."""
    resume: Path | None = None
    """Folder of a run that ended early: go on from its last checkpoint, with its configuration.
    Other options given beside it change that (a layout, a number of steps)."""
    model: Path | None = None
    """A Hugging Face folder (config.json, tokenizer, *.safetensors) to start from; if not given, a
    small random Qwen3 of --shape, whose tokenizer knows the characters 0123456789+=,# alone."""
    task: str = DEFAULT_TASK
    """What to learn: MODULE:FUNCTION or FILE.py:FUNCTION (a function that returns a
    kimisys.trainer.task.Task), or a file of problems, FILE.jsonl. docs/tasks.md shows all three."""
    seed: int = 1
    """Seeds the random weights, the order of the data and the sampling."""

    tensor_parallel: int = 2
    """Megatron ranks that share each layer."""
    pipeline_parallel: int = 1
    """Megatron stages that share the layers; there are tensor x pipeline ranks."""
    wire_dtype: Dtype = "float32"
    """The dtype in which weights are published, and in which the engines compute."""
    clip_gradient: float = 1.0
    """Largest norm of a gradient."""
    micro_batch_tokens: int = 4096
    """Tokens that go through the model together, padding included: bounds a rank's memory."""
    checkpoint_every: int = 5
    """RL steps between two checkpoints; SFT writes one every 50 steps. The last two are kept."""
    tensorboard: bool = False
    """Also write TensorBoard events to OUT/tensorboard (needs the package tensorboard)."""
    ready_timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 240.0
    """How long a start, a step or a sync may take before the run gives up and says who was late."""

    shape: ShapeConfig = field(default_factory=ShapeConfig)
    sft: SftConfig = field(default_factory=SftConfig)

    @property
    def ranks(self) -> int:
        """Megatron ranks in all."""
        return self.tensor_parallel * self.pipeline_parallel

    def check(self) -> None:
        """Raise ConfigError for what cannot run whatever the model and the task, before anything
        starts."""
        check_ranges(self.ranges())
        shape = self.shape
        if shape.heads % shape.kv_heads:
            raise ConfigError(
                f"--shape.heads {shape.heads} is not a multiple of --shape.kv-heads "
                f"{shape.kv_heads}"
            )
        check_new_folder(self.out)

    def ranges(self) -> list[Range]:
        """(option, value, the least and the largest that make sense)"""
        shape, sft = self.shape, self.sft
        return [
            ("--seed", self.seed, 0, 2**31 - 1),
            ("--tensor-parallel", self.tensor_parallel, 1, 64),
            ("--pipeline-parallel", self.pipeline_parallel, 1, 64),
            ("--clip-gradient", self.clip_gradient, 1e-9, 1e9),
            ("--micro-batch-tokens", self.micro_batch_tokens, 1, MANY),
            ("--checkpoint-every", self.checkpoint_every, 1, MANY),
            ("--ready-timeout", self.ready_timeout, 1.0, 86_400.0),
            ("--shape.hidden-size", shape.hidden_size, 1, MANY),
            ("--shape.layers", shape.layers, 1, 1024),
            ("--shape.heads", shape.heads, 1, 1024),
            ("--shape.kv-heads", shape.kv_heads, 1, 1024),
            ("--shape.head-dim", shape.head_dim, 1, 1024),
            ("--shape.ffn-size", shape.ffn_size, 1, MANY),
            ("--shape.rope-theta", shape.rope_theta, 1.0, 1e12),
            ("--sft.steps", sft.steps, 0, MANY),
            ("--sft.batch-size", sft.batch_size, 1, MANY),
            ("--sft.learning-rate", sft.learning_rate, 0.0, 1.0),
            ("--sft.warmup-steps", sft.warmup_steps, 0, MANY),
        ]


@dataclass(frozen=True)
class RolloutConfig(RunConfig):
    """How completions are sampled: what the rollout scheduler (kimisys.rollout) is told."""

    rollouts: Literal["budget", "whole"] = "budget"
    """When an iteration has sampled enough. budget: when so many tokens were written; what is not
    finished then goes on in the next iteration, under newer weights (k1.5's partial rollouts).
    whole: when all completions of --prompts problems are finished, so the longest is waited for."""
    deployment: Literal["hybrid", "disaggregated"] = "hybrid"
    """hybrid: sampling and training take turns. disaggregated: engines go on sampling while the
    ranks train."""
    token_budget: int = 0
    """Tokens that an iteration samples, over all engines; 0: as many as --prompts x --samples
    completions took on the held-out problems before RL."""
    live_limit: int = 0
    """With a budget: most completions that are begun and not finished, over all engines; 0:
    --prompts x --samples. Fewer finish sooner, so less of them is stale; more keep engines
    busier."""
    max_staleness: int = 4
    """Versions that the oldest token of a group may be behind the weights that are trained."""
    staleness: Literal["wait", "drop", "admission"] = "wait"
    """What is done about a group that would get staler. wait: the iteration does not end without
    it. drop: it is not trained. admission: as wait, and no more is begun than can be trained in
    time, at most --prompts groups in a step."""
    placement: Literal["kv_aware", "least_loaded", "sticky", "group_round_robin"] = "kv_aware"
    """With a budget: which engine a completion goes to: by what the engines' KV caches will hold,
    by their number of sequences, where it began, or all of a group to one engine in turn (always
    so for whole)."""
    order: Literal["probe_first", "longest_first", "fifo"] = "probe_first"
    """With a budget: which completion goes first: one of each group, from whose length the others
    are predicted; the longest predicted; as drawn (always so for whole)."""
    loss_mask: Literal["all", "current", "recent", "weighted"] = "all"
    """Which tokens of a continued completion are learned from. all: each. current: those of its
    newest version. recent: those at most --mask-versions behind. weighted: each, by how likely it
    is under the weights that are trained against those that sampled it, at most --mask-cap."""
    mask_versions: int = 1
    """S of --loss-mask recent."""
    mask_cap: float = 2.0
    """C of --loss-mask weighted."""
    early_stop: bool = True
    """With a budget: end a completion once it repeats itself; it counts as not finished."""
    repetition_penalty: float = 0.0
    """Taken from the reward of a completion that was ended for repeating itself (k1.5)."""
    pin_engines: bool = False
    """Give each engine processors of its own, an equal share of them."""

    @property
    def partial(self) -> bool:
        """Whether completions may go on in a later iteration."""
        return self.rollouts == "budget"

    def check(self) -> None:
        super().check()
        if self.repetition_penalty and not (self.partial and self.early_stop):
            raise ConfigError(
                "--repetition-penalty needs --rollouts budget and --early-stop: nothing else says "
                "which completion repeats itself"
            )
        for option, value in (
            ("--token-budget", self.token_budget),
            ("--live-limit", self.live_limit),
        ):
            if value and not self.partial:
                raise ConfigError(
                    f"{option} {value} needs --rollouts budget: whole iterations end with their "
                    "last completion"
                )
        if self.deployment == "disaggregated" and not self.max_staleness:
            raise ConfigError(
                "--max-staleness 0 needs --deployment hybrid: what is sampled while the ranks "
                "train is a version behind when it is trained"
            )
        if self.deployment == "disaggregated" and not self.partial:
            raise ConfigError(
                "--deployment disaggregated needs --rollouts budget: whole iterations leave "
                "nothing to sample while the ranks train"
            )

    def ranges(self) -> list[Range]:
        return [
            *super().ranges(),
            ("--token-budget", self.token_budget, 0, MANY_TOKENS),
            ("--live-limit", self.live_limit, 0, MANY),
            ("--max-staleness", self.max_staleness, 0, MANY),
            ("--mask-versions", self.mask_versions, 0, MANY),
            ("--mask-cap", self.mask_cap, 1.0, 1e6),
            ("--repetition-penalty", self.repetition_penalty, 0.0, 1e3),
        ]


@dataclass(frozen=True)
class TrainConfig(RolloutConfig):
    """SFT on the task's demonstrations, if it has any, then Kimi k1.5's policy optimisation.

    Without options: the reference recipe, a small Qwen3 that learns to add. Megatron ranks train,
    vLLM engines sample; after every step the new weights go from shard to engine through a kimisys
    plan, verified by digest.
    """

    steps: int = 30
    """RL steps."""
    learning_rate: float = 6e-5
    """Of the RL steps. 0 is the control that must not learn."""
    freeze_engine: bool = False
    """The control without syncs: the engines keep the weights they had after SFT."""
    engines: int = 1
    """vLLM engines; the prompts of a step are dealt out to them."""
    engine_tensor_parallel: int = 1
    """Ranks of each engine."""
    control_engine: bool = False
    """A check of deltas: one engine more, which samples nothing and takes every version whole. The
    others must compute the same bits and complete greedily with the same tokens, at every step."""

    prompts: int = 64
    """Problems in one RL step; with a token budget, in the mean."""
    samples: int = 8
    """Samples of each problem: k of Kimi k1.5."""
    minibatches: int = 4
    """Optimizer steps for --prompts problems; each takes whole groups."""
    tau: float = 0.1
    """Weight of the squared log-ratio: τ of Kimi k1.5 (arXiv 2501.12599), in reward per nat."""
    length_reward: float = 0.2
    """Weight of k1.5's length reward, which prefers the shorter of a problem's right answers; 0
    turns it off."""
    length_reward_from: int = 11
    """The first step with a length reward: k1.5 trains without one first."""
    curriculum: float = 0.3
    """From easy to hard: the fraction of the run after which every problem is admitted; 0 admits
    all at once."""
    sampling: Literal["prioritised", "uniform"] = "prioritised"
    """Which admitted problems a step draws: prioritised draws those that fail more often, with
    probability 1 - success rate (k1.5)."""
    held_out: int = 512
    """Held-out problems on which the pass rates are measured."""

    def check(self) -> None:
        super().check()
        if self.prompts % self.minibatches:
            raise ConfigError(
                f"--prompts {self.prompts} does not divide into --minibatches {self.minibatches} "
                "of whole groups"
            )
        if self.control_engine and self.freeze_engine:
            raise ConfigError(
                "--freeze-engine leaves --control-engine nothing to compare: give one of the two"
            )
        if self.pin_engines and self.engines > len(os.sched_getaffinity(0)):
            raise ConfigError(
                f"--pin-engines: {self.engines} engines cannot have processors of their own among "
                f"{len(os.sched_getaffinity(0))}"
            )
        if self.deployment == "disaggregated" and (self.control_engine or self.freeze_engine):
            raise ConfigError(
                "--control-engine and --freeze-engine need --deployment hybrid: engines are "
                "compared, or left behind, while nothing runs"
            )

    def ranges(self) -> list[Range]:
        return [
            *super().ranges(),
            ("--steps", self.steps, 1, MANY),
            ("--prompts", self.prompts, 1, MANY),
            ("--samples", self.samples, 2, 1024),  # the baseline is the mean of a group
            ("--minibatches", self.minibatches, 1, MANY),
            ("--held-out", self.held_out, 1, MANY),
            ("--engines", self.engines, 1, 64),
            ("--engine-tensor-parallel", self.engine_tensor_parallel, 1, 64),
            ("--learning-rate", self.learning_rate, 0.0, 1.0),
            ("--tau", self.tau, 0.0, 1e6),
            ("--length-reward", self.length_reward, 0.0, 1e3),
            ("--length-reward-from", self.length_reward_from, 1, MANY),
            ("--curriculum", self.curriculum, 0.0, 1.0),
        ]


def check_ranges(ranges: Sequence[Range]) -> None:
    """Raise ConfigError for the first value outside its range."""
    for option, value, low, high in ranges:
        if not low <= value <= high:  # NaN too
            raise ConfigError(f"{option} is {value}; it must lie in {low} to {high}")


def check_new_folder(out: Path | None) -> None:
    """Raise ConfigError for an --out that holds something already."""
    if out is not None and out.exists():
        if not out.is_dir():
            raise ConfigError(f"--out {out} is a file; name a folder")
        if any(out.iterdir()):
            raise ConfigError(f"--out {out} is not empty; choose another or empty it")
