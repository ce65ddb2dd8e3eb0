"""How a model is laid out over ranks, in Megatron's terms, and what of it is possible.

Ranks are numbered as Megatron numbers them: tensor-parallel neighbours first, then context, then
data replicas, pipeline stages last. Experts are spread over the ranks of a stage by a numbering of
their own, expert tensor-parallel ranks first.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import lcm

from kimisys.errors import LayoutError

_NAMES = {
    "tp": "tensor",
    "pp": "pipeline",
    "vpp": "virtual",
    "ep": "expert",
    "etp": "expert_tensor",
    "cp": "context",
    "dp": "data",
    "first": "first",
    "last": "last",
    "layout": "pipeline_layout",
}


@dataclass(frozen=True)
class Parallel:
    """A layout of `world_size` ranks.

    virtual: chunks of layers per pipeline stage (interleaved schedule); None for one. expert: ranks
    over which experts are spread whole. expert_tensor: ranks over which each expert is split; None
    for as many as `tensor`. context, data: ranks that hold the same weights. first, last: layers of
    the first and of the last stage where they differ from the others'. pipeline_layout:
    megatron-core's `pipeline_model_parallel_layout`, as in "Ett|(tt|)*2tL", which says what each
    chunk holds.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    expert: int = 1
    expert_tensor: int | None = None
    context: int = 1
    data: int = 1
    first: int | None = None
    last: int | None = None
    pipeline_layout: str | None = None

    def __post_init__(self) -> None:
        """Raise LayoutError, naming what would be legal, when no model can be laid out so."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise LayoutError(f"{field.name} {value} is not possible: it must be at least 1")
        stage, experts = self.stage_size, self.expert * self.expert_tensor_size
        if stage % experts:
            step = lcm(self.tensor * self.context, experts) // (self.tensor * self.context)
            raise LayoutError(
                f"a pipeline stage has {stage} ranks (tensor {self.tensor} x context "
                f"{self.context} x data {self.data}), which expert {self.expert} x expert_tensor "
                f"{self.expert_tensor_size} does not divide: data may be a multiple of {step}"
            )
        if self.virtual == 1:
            raise LayoutError("virtual 1 is no interleaving: leave it out, or say at least 2")
        if self.virtual is not None and self.pipeline == 1:
            raise LayoutError(
                f"virtual {self.virtual} chunks need a pipeline of at least 2 stages: "
                "leave virtual out, or raise pipeline"
            )
        if self.pipeline == 1 and not self.first is self.last is self.pipeline_layout is None:
            raise LayoutError(
                "first, last and pipeline_layout say how stages differ, but pipeline is 1: "
                "leave them out, or raise pipeline"
            )
        if self.pipeline_layout is not None and not self.first is self.last is None:
            raise LayoutError(
                "pipeline_layout says what each stage holds: leave first and last out beside it"
            )

    @property
    def expert_tensor_size(self) -> int:
        """Ranks over which each expert is split."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tensor * self.context * self.data

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.stage_size * self.pipeline

    @classmethod
    def parse(cls, text: str) -> Parallel:
        """Read "tp=8,pp=8,ep=32,etp=1,first=7,last=6"; also vpp, cp, dp, world and layout.

        `world` is the number of ranks and stands for dp, which follows from it; without either, dp
        is the smallest that is legal. Raises LayoutError for what is no such text, and for an
        impossible layout.
        """
        given = _items(text)
        world = given.pop("world", None)
        dp_given = "data" in given
        layout = given.pop("pipeline_layout", None)
        sizes = {name: _size(name, value) for name, value in given.items()}
        parallel = _with_least_data(sizes, layout) if not dp_given else _made(sizes, layout)
        if world is None:
            return parallel
        ranks = _size("world", world)
        if dp_given and ranks != parallel.world_size:
            raise LayoutError(
                f"world {ranks} is not tp {parallel.tensor} x cp {parallel.context} x dp "
                f"{parallel.data} x pp {parallel.pipeline} = {parallel.world_size}: leave one of "
                "world and dp out"
            )
        if ranks % parallel.world_size:
            raise LayoutError(
                f"world {ranks} is not divisible by {parallel.world_size}, which is the least for "
                f"{text!r}: world may be a multiple of it"
            )
        return replace(parallel, data=parallel.data * (ranks // parallel.world_size))


def of_world(tensor: int, pipeline: int, world_size: int) -> Parallel:
    """Shards, stages, and as many replicas as `world_size` ranks make.

    Raises LayoutError, naming what would be legal, when they do not divide it.
    """
    if min(tensor, pipeline, world_size) < 1:
        raise LayoutError(
            f"tensor_parallel {tensor}, pipeline_parallel {pipeline} and "
            f"world_size {world_size} must all be at least 1"
        )
    if world_size % (tensor * pipeline):
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        legal = [(tp, pp) for tp in divisors for pp in divisors if world_size % (tp * pp) == 0]
        raise LayoutError(
            f"world_size {world_size} is not divisible by tensor_parallel {tensor} times "
            f"pipeline_parallel {pipeline}: with {world_size} ranks (tensor_parallel, "
            f"pipeline_parallel) may be one of {legal}"
        )
    return Parallel(tensor, pipeline, data=world_size // (tensor * pipeline))


def check_stages(parallel: Parallel, layers: int) -> None:
    """Raise LayoutError, naming what would be legal, when `layers` cannot be split into the
    stages and chunks of `parallel`."""
    if parallel.pipeline_layout is not None:
        _check_pipeline_layout(parallel, layers)
        return
    ends = [size for size in (parallel.first, parallel.last) if size is not None]
    chunks = parallel.virtual or 1
    for name, size in (("first", parallel.first), ("last", parallel.last)):
        if size is not None and size % chunks:
            raise LayoutError(f"{name} {size} is not divisible by virtual {chunks} chunks")
    rest, stages = layers - sum(ends), parallel.pipeline - len(ends)
    if stages == 0:
        if rest:
            raise LayoutError(
                f"first {parallel.first} and last {parallel.last} are not the {layers} layers of "
                f"the model together: first {parallel.first} goes with last "
                f"{layers - (parallel.first or 0)}"
            )
        return
    if rest >= stages * chunks and rest % (stages * chunks) == 0:
        return
    if not ends and chunks == 1:
        legal = [n for n in range(1, layers + 1) if layers % n == 0]
        raise LayoutError(
            f"pipeline_parallel {parallel.pipeline} does not divide num_hidden_layers "
            f"{layers}: each stage must hold as many layers; "
            f"pipeline_parallel may be one of {legal}, or say first and last"
            + (f": {pairs}" if (pairs := _legal_ends(parallel, layers)) else "")
        )
    raise LayoutError(
        f"{layers} layers{f' less {sum(ends)} at the ends' if ends else ''} cannot be split evenly "
        f"over {stages} stages{f' of {chunks} chunks' if chunks > 1 else ''}: "
        + (_legal_ends(parallel, layers) or f"num_hidden_layers {layers} needs another pipeline")
    )


def _legal_ends(parallel: Parallel, layers: int) -> str:
    """Pairs of first and last with which the stages between them are even."""
    chunks = parallel.virtual or 1
    between = (parallel.pipeline - 2) * chunks
    if between <= 0:
        return ""
    middle = layers // (parallel.pipeline * chunks)
    pairs = []
    for per_chunk in (middle + 1, middle):
        ends = layers - between * per_chunk
        if per_chunk > 0 and ends >= 2 * chunks and ends % chunks == 0:
            last = ends // (2 * chunks) * chunks
            pairs.append(f"first={ends - last},last={last}")
    return "legal are " + " or ".join(pairs) if pairs else ""


def _check_pipeline_layout(parallel: Parallel, layers: int) -> None:
    from kimisys.adapters.megatron.core import LayerType, PipelineParallelLayerLayout

    text, stages = parallel.pipeline_layout, parallel.pipeline
    example = "E" + "t" * layers + "|" * (stages - 1) + "L"
    try:
        layout = PipelineParallelLayerLayout(text, stages)
        chunks = layout.virtual_pipeline_model_parallel_size
        if parallel.virtual not in (None, chunks) or (chunks > 1 and parallel.virtual is None):
            raise LayoutError(
                f"pipeline_layout {text!r} has {chunks} chunks for each of {stages} stages, but "
                f"virtual is {parallel.virtual}: say virtual {chunks}"
            )
        layout.validate_layer_layout(layers, 0)
    except LayoutError:
        raise
    except (AssertionError, LookupError, NotImplementedError, ValueError) as error:
        raise LayoutError(
            f"pipeline_layout {text!r} does not fit {stages} stages of {layers} layers: {error}; "
            f"legal is for example {example!r}"
        ) from error
    if layout.flatten_layout.count(LayerType.mtp):
        raise LayoutError(
            f"pipeline_layout {text!r} has layers for multi-token prediction (m), "
            "which are not supported: leave them out"
        )


def _items(text: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        name = "world" if key == "world" else _NAMES.get(key)
        if name is None or not equals or name in given:
            raise LayoutError(
                f"{item!r} of {text!r} is not understood: write each of "
                f"{', '.join([*_NAMES, 'world'])} at most once, as in tp=8,pp=2"
            )
        given[name] = value
    return given


def _size(name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()) or int(value) < 1:
        raise LayoutError(f"{name} {value!r} is not possible: it must be a number, at least 1")
    return int(value)


def _made(sizes: dict[str, int], layout: str | None) -> Parallel:
    return Parallel(**sizes, pipeline_layout=layout)


def _with_least_data(sizes: dict[str, int], layout: str | None) -> Parallel:
    alike = sizes.get("tensor", 1) * sizes.get("context", 1)
    experts = sizes.get("expert", 1) * sizes.get("expert_tensor", sizes.get("tensor", 1))
    return _made({**sizes, "data": lcm(alike, experts) // alike}, layout)
