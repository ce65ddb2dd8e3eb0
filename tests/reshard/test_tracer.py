"""The tracer against running the same function on real numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from kimisys.errors import TraceError
from kimisys.reshard import Tensor, plan
from kimisys.reshard.tracer import trace_layout, trace_mapping

Tensors = Mapping[str, torch.Tensor]


def meta(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def run_both(run, sources: dict[str, tuple[int, ...]], destinations: dict[str, tuple[int, ...]]):
    """What `run` does to real tensors, and what the traced mapping does to the same numbers."""
    given = {
        n: torch.arange(float(np.prod(s))).reshape(s) + 1000 * i
        for i, (n, s) in enumerate(sources.items())
    }
    real = {n: torch.full(s, -1.0) for n, s in destinations.items()}
    run(given, real)
    traced = {n: torch.full(s, -1.0) for n, s in destinations.items()}
    for m in trace_mapping(meta(**sources), meta(**destinations), run):
        box = given[m.source]
        for axis, (o, e) in enumerate(zip(m.source_offset, m.source_extent, strict=True)):
            box = box.narrow(axis, o, e)
        order = [a for a in m.axes if a >= 0]
        box = box.permute(*order, *[a for a in range(box.dim()) if a not in order]).reshape(
            m.destination_extent
        )
        to = traced[m.destination]
        for axis, (o, e) in enumerate(zip(m.destination_offset, m.destination_extent, strict=True)):
            to = to.narrow(axis, o, e)
        to.copy_(box)
    return real, traced


def fused_qkv(sources: Tensors, destinations: Tensors) -> None:
    qkv = sources["qkv"].view(2, 4, 3, 5)
    destinations["q"].view(2, 2, 3, 5).copy_(qkv[:, :2])
    destinations["k"].view(2, 3, 5).copy_(qkv[:, 2])
    destinations["v"].view(2, 3, 5).copy_(qkv[:, 3])


def transposed(sources: Tensors, destinations: Tensors) -> None:
    destinations["t"].copy_(sources["s"].t())


def through_clone(sources: Tensors, destinations: Tensors) -> None:
    q = sources["qkv"].view(2, 4, 3, 5)[:, :2].reshape(12, 5)  # copies
    destinations["q"].copy_(q)


def through_cat(sources: Tensors, destinations: Tensors) -> None:
    joined = torch.cat([sources["up"], sources["gate"]])
    swapped = torch.stack([joined[4:], joined[:4]])
    destinations["both"].copy_(swapped.flatten(0, 1))


def through_empty(sources: Tensors, destinations: Tensors) -> None:
    staged = torch.empty(4, 6, device=sources["s"].device)
    staged[:, :3].copy_(sources["s"][:, 3:])
    staged[:, 3:].copy_(sources["s"][:, :3])
    destinations["t"].copy_(staged)


@pytest.mark.parametrize(
    ("run", "sources", "destinations"),
    [
        (fused_qkv, {"qkv": (24, 5)}, {"q": (12, 5), "k": (6, 5), "v": (6, 5)}),
        (transposed, {"s": (4, 6)}, {"t": (6, 4)}),
        (through_clone, {"qkv": (24, 5)}, {"q": (12, 5)}),
        (through_cat, {"up": (4, 3), "gate": (4, 3)}, {"both": (8, 3)}),
        (through_empty, {"s": (4, 6)}, {"t": (4, 6)}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_trace_moves_what_the_function_moves(run, sources, destinations) -> None:
    real, traced = run_both(run, sources, destinations)
    for name, tensor in real.items():
        assert torch.equal(tensor, traced[name])


def refused(run, match: str) -> None:
    with pytest.raises(TraceError, match=match):
        trace_mapping(meta(s=(4, 4)), meta(weight=(4, 4)), run)


def test_arithmetic_is_refused_by_name() -> None:
    refused(lambda s, d: d["weight"].copy_(s["s"] * 2), r"'weight'.*aten\.mul")
    refused(lambda s, d: d["weight"].add_(s["s"]), r"aten\.add_.*'weight'")
    refused(lambda s, d: d["weight"].copy_(s["s"].to(torch.bfloat16)), "'weight'.*cast")


def test_an_unknown_source_is_refused_by_name() -> None:
    stranger = torch.empty(4, 4, device="meta")
    refused(lambda s, d: d["weight"].copy_(stranger), "'weight'.*not copies of any source")
    refused(
        lambda s, d: d["weight"].copy_(torch.zeros(4, 4, device="meta")), "'weight'.*aten.zeros"
    )


def test_data_assignment_is_refused_by_name() -> None:
    def assign(sources: Tensors, destinations: Tensors) -> None:
        destinations["weight"].data = sources["s"]

    refused(assign, "'weight' was replaced")


def test_what_was_loaded_is_no_source() -> None:
    """A parameter's name may be a tensor's as well: its elements are not the tensor's."""

    def load(weights: dict[str, torch.Tensor]) -> None:
        parameters["w"].copy_(weights["w"].t())
        parameters["tied"].copy_(parameters["w"])

    def load_from_a_buffer(weights: dict[str, torch.Tensor]) -> None:
        parameters["w"].copy_(weights["w"])
        parameters["tied"].copy_(buffers["scale"].clone())

    parameters, buffers = meta(w=(4, 4), tied=(4, 4)), meta(scale=(4, 4))
    tensors = [Tensor("w", "float32", (4, 4))]
    with pytest.raises(TraceError, match=r"'tied' receives elements of 'w', .* a destination"):
        trace_layout(tensors, parameters, load, rank=0)
    with pytest.raises(TraceError, match=r"'tied' receives elements of 'scale', .* a guarded"):
        trace_layout(tensors, parameters, load_from_a_buffer, rank=0, guarded=buffers)


def test_a_source_is_not_written() -> None:
    refused(lambda s, d: s["s"].copy_(d["weight"]), "writes into source 's'")
    refused(lambda s, d: s["s"].zero_(), "overwrites source 's'")


def test_a_partly_filled_intermediate_is_refused() -> None:
    def half(sources: Tensors, destinations: Tensors) -> None:
        staged = torch.empty(4, 4, device="meta")
        staged[:2].copy_(sources["s"][:2])
        destinations["weight"].copy_(staged)

    refused(half, "'weight'.*not copies")


def test_an_intermediate_changed_after_the_copy_is_refused() -> None:
    def zeroed(sources: Tensors, destinations: Tensors) -> None:
        staged = sources["s"].clone()
        staged[2:].zero_()
        destinations["weight"].copy_(staged)

    def scaled(sources: Tensors, destinations: Tensors) -> None:
        staged = sources["s"].clone()
        torch._foreach_mul_([staged], 2.0)
        destinations["weight"].copy_(staged)

    def rounded(sources: Tensors, destinations: Tensors) -> None:
        staged = torch.empty(4, 4, device="meta", dtype=torch.bfloat16)
        staged.copy_(sources["s"])
        destinations["weight"].copy_(staged)

    def twice_in_one_half(sources: Tensors, destinations: Tensors) -> None:
        staged = torch.empty(4, 4, device="meta")
        for _ in range(2):
            staged[:2].copy_(sources["s"][:2])
        destinations["weight"].copy_(staged)

    refused(zeroed, "'weight'.*zeros")
    refused(scaled, "'weight'.*_foreach_mul_")
    refused(rounded, "'weight'.*cast from torch.float32 to torch.bfloat16")
    refused(twice_in_one_half, "'weight'.*not copies")


def test_foreach_on_a_destination_is_refused() -> None:
    def doubled(sources: Tensors, destinations: Tensors) -> None:
        destinations["weight"].copy_(sources["s"])
        torch._foreach_mul_([destinations["weight"]], 2.0)

    refused(doubled, "_foreach_mul_.*'weight'")


def test_a_staging_tensor_may_be_used_again() -> None:
    def staged(sources: Tensors, destinations: Tensors) -> None:
        staging = torch.empty(2, 4, device=sources["s"].device)
        for half in range(2):
            staging.copy_(sources["s"][2 * half : 2 * half + 2])
            destinations["t"][2 - 2 * half : 4 - 2 * half].copy_(staging)

    real, traced = run_both(staged, {"s": (4, 4)}, {"t": (4, 4)})
    assert torch.equal(real["t"], traced["t"])


def test_a_mapping_writes_every_element_once() -> None:
    def both(sources: Tensors, destinations: Tensors) -> None:
        destinations["weight"].copy_(sources["s"])
        destinations["weight"][1:].copy_(sources["s"][1:])

    refused(both, "'weight' is written twice")
    refused(lambda s, d: d["weight"][:3].copy_(s["s"][:3]), "only 12 of the 16 elements")


def test_layout_of_a_fused_padded_parameter() -> None:
    parameters = {
        "qkv": torch.empty(10, 4, device="meta"),
        "tied": torch.empty(8, 4, device="meta"),
    }

    def load(weights: dict[str, torch.Tensor]) -> None:
        parameters["qkv"][:4].copy_(weights["q"][4:])  # this rank's half
        parameters["qkv"][4:8].copy_(weights["k"])
        parameters["qkv"][8:].fill_(0)
        parameters["tied"].data[:6].copy_(weights["embed"])
        parameters["tied"].data[6:].zero_()

    tensors = [
        Tensor("q", "float32", (8, 4)),
        Tensor("k", "float32", (4, 4)),
        Tensor("embed", "float32", (6, 4)),
    ]
    layout = trace_layout(tensors, parameters, load, rank=3, current=lambda: parameters)
    whole = {
        name: torch.empty(shape, device="meta")
        for name, shape in (("q", (8, 4)), ("k", (4, 4)), ("embed", (6, 4)))
    }

    def identity(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            whole[name].copy_(tensor)

    source = trace_layout(tensors, whole, identity, rank=0)
    given = {n: torch.randn(tuple(t.shape)) for n, t in whole.items()}
    landed = {n: torch.full(tuple(t.shape), 7.0) for n, t in parameters.items()}
    plan(source, layout).execute(
        {(0, n): t.numpy() for n, t in given.items()},
        {(3, n): t.numpy() for n, t in landed.items()},
    )
    assert torch.equal(landed["qkv"], torch.cat([given["q"][4:], given["k"], torch.zeros(2, 4)]))
    assert torch.equal(landed["tied"], torch.cat([given["embed"], torch.zeros(2, 4)]))


def test_a_replaced_parameter_is_refused_by_name() -> None:
    weight = torch.nn.Parameter(torch.empty(4, 4, device="meta"), requires_grad=False)
    replaced = {"weight": torch.empty(4, 4, device="meta")}
    with pytest.raises(TraceError, match="'weight' was replaced"):
        trace_layout(
            [Tensor("s", "float32", (4, 4))], {"weight": weight},
            lambda weights: None, rank=0, current=lambda: replaced,
        )  # fmt: skip
