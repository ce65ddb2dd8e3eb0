"""From verified weights into what the engine computes with.

vLLM derives state from its parameters once, after loading: on the CPU build every linear layer
keeps a packed copy for oneDNN (its parameter is left empty), and so does the output head, tied or
not (its parameter stays, and the copy goes stale when it is written to). ``Packer`` finds what was
derived by comparing the running model with one fresh from its constructor, and refuses, by name,
what it does not know how to derive again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from kimisys.errors import LayoutError

_DERIVED: Mapping[type[QuantizeMethodBase], frozenset[str]] = {
    UnquantizedLinearMethod: frozenset({"cpu_linear"}),
    UnquantizedEmbeddingMethod: frozenset({"cpu_linear"}),
}
"""Methods whose process_weights_after_loading derives everything anew, and the attributes it sets.

``cpu_linear`` is a closure that owns the packed weight; setting it anew frees the old one.
"""


@dataclass(frozen=True)
class _Refill:
    """A parameter that vLLM emptied after packing: to pack again, it gets its full weight again."""

    module: torch.nn.Module
    attribute: str
    name: str


class Packer:
    """Brings a running model's derived state in line with new weights.

    running: the model as the engine uses it.
    fresh: the same model as its constructor leaves it, on the meta device (``layout.build_model``).
    Raises LayoutError naming what was derived from weights in a way that is not known here.

    Attributes:
        shapes: of every parameter before packing, tied ones once: name to an empty meta tensor.
    """

    def __init__(self, running: torch.nn.Module, fresh: torch.nn.Module) -> None:
        self.shapes = {n: p.detach() for n, p in fresh.named_parameters()}
        first_names = {id(p): n for n, p in fresh.named_parameters()}
        modules = dict(running.named_modules())
        refused: list[str] = []
        self._in_place: dict[str, torch.Tensor] = {}
        self._refills: list[_Refill] = []
        self._derive: list[Callable[[], None]] = []
        for prefix, before in fresh.named_modules():
            now = modules.pop(prefix, None)
            if now is None or type(now) is not type(before):
                refused.append(f"module {prefix!r} (was {type(before).__name__})")
                continue
            method = getattr(now, "quant_method", None)
            known = isinstance(method, QuantizeMethodBase) and type(method) in _DERIVED
            if isinstance(method, QuantizeMethodBase):
                if known:
                    self._derive.append(_derivation(method, now))
                else:
                    refused.append(f"{prefix!r} (derived by {type(method).__name__})")
            refused += [f"{prefix}.{name}" for name in _new_state(before, now)]
            for attribute, parameter in before.named_parameters(recurse=False):
                name = first_names[id(parameter)]
                current = now._parameters.get(attribute)
                if current is not None and _same_place(parameter, current):
                    self._in_place[name] = current.detach()
                elif current is not None and current.numel() == 0 and known:
                    self._refills.append(_Refill(now, attribute, name))
                else:
                    refused.append(f"parameter '{prefix}.{attribute}'")
        refused += [f"module {prefix!r}" for prefix in modules]
        if refused:
            raise LayoutError(
                f"vLLM derived state from weights that kimisys cannot derive again: {refused[:8]}; "
                "an update would leave it stale. Use an unquantized model of a supported family, "
                "or extend kimisys/adapters/vllm/pack.py"
            )

    @torch.no_grad()
    def pack(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Makes the running model compute with `weights`.

        weights: by name, each of the shape and dtype in ``shapes``; read, not kept.
        Whatever this raises, the model is then a mixture: it must not be served from again.
        """
        for name, parameter in self._in_place.items():
            parameter.copy_(weights[name])
        for refill in self._refills:
            full = torch.nn.Parameter(weights[refill.name], requires_grad=False)
            setattr(refill.module, refill.attribute, full)
        for derive in self._derive:
            derive()
        for refill in self._refills:
            if getattr(refill.module, refill.attribute).numel():
                # An unpacked fallback would go on reading the shadow while the next pull fills it.
                raise LayoutError(
                    f"{refill.name!r} was packed when the engine started and is not any more; vLLM "
                    "fell back to an unpacked kernel. Restart the engine"
                )


def _derivation(method: QuantizeMethodBase, module: torch.nn.Module) -> Callable[[], None]:
    return lambda: method.process_weights_after_loading(module)


def _same_place(before: torch.Tensor, now: torch.Tensor) -> bool:
    return now.shape == before.shape and now.dtype == before.dtype and now.is_contiguous()


def _new_state(before: torch.nn.Module, now: torch.nn.Module) -> list[str]:
    """Attributes, parameters and buffers of one module that were not there before loading, or are
    tensors of another shape or dtype, less those that are known."""
    method = getattr(now, "quant_method", None)
    known = _DERIVED.get(type(method), frozenset()) if method is not None else frozenset()
    found = [name for name in vars(now).keys() - vars(before).keys() if name not in known]
    found += list(now._parameters.keys() - before._parameters.keys())
    tensors = {n: v for n, v in vars(before).items() if isinstance(v, torch.Tensor)}
    for name, value in [*before._buffers.items(), *tensors.items()]:
        current = now._buffers.get(name, vars(now).get(name))
        if value is not None and (current is None or not _same_place(value, current)):
            found.append(name)
    found += list(now._buffers.keys() - before._buffers.keys())
    return found
