"""From verified weights into what the engine computes with.

vLLM derives state from its parameters once, after loading: on the CPU build every linear layer
keeps a packed copy for oneDNN (its parameter is left empty), and so does the output head, tied or
not (its parameter stays, and the copy goes stale when it is written to). ``Packer`` finds what was
derived by comparing the running model with one fresh from its constructor, and refuses, by name,
what it does not know how to derive again. A tensor that is no parameter is refused unless it is
known not to come from weights: whether it does cannot be seen, as its place may have been there
from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.v1.attention.backend import AttentionImplBase

from kimisys.errors import LayoutError

_DERIVED: Mapping[type[QuantizeMethodBase], frozenset[str]] = {
    UnquantizedLinearMethod: frozenset({"cpu_linear"}),
    UnquantizedEmbeddingMethod: frozenset({"cpu_linear"}),
}
"""Methods whose process_weights_after_loading derives everything anew, and the attributes it sets.

``cpu_linear`` is a closure that owns the packed weight; setting it anew frees the old one.
"""

_CONSTANTS: Mapping[type[torch.nn.Module], frozenset[str]] = {
    # Angles by position, from config.json.
    RotaryEmbeddingBase: frozenset({"cos_sin_cache"}),
    # The cache, which an update finds empty, and scales that are one without quantization.
    Attention: frozenset(
        {"kv_cache", "_q_scale", "_k_scale", "_v_scale", "_prob_scale"}
        | {"_k_scale_cpu", "_v_scale_cpu"}
    ),
}
"""Tensors beside the parameters that do not come from weights, by the module that has them."""


_TORCHS_OWN = frozenset({"_parameters", "_buffers", "_modules"})
"""Attributes in which torch keeps what is looked at one by one."""


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
        self._names = {id(p): n for n, p in fresh.named_parameters()}
        self._in_place: dict[str, torch.Tensor] = {}
        self._refills: list[_Refill] = []
        self._derive: list[torch.nn.Module] = []
        modules = dict(running.named_modules())
        refused: list[str] = []
        for prefix, before in fresh.named_modules():
            now = modules.pop(prefix, None)
            if now is None or type(now) is not type(before):
                refused.append(f"module {prefix!r} (was {type(before).__name__})")
                continue
            refused += self._hooks(prefix, now)
            refused += [f"{prefix}.{name}" for name in _new_state(before, now)]
            refused += self._parameters(prefix, before, now)
        refused += [f"module {prefix!r}" for prefix in modules]
        refused += _shared(self._in_place)
        self._same = _same_derivations(self._derive)
        if refused:
            raise LayoutError(
                f"vLLM derived state from weights that kimisys cannot derive again: {refused[:8]}; "
                "an update would leave it stale. Use an unquantized model of a supported family, "
                "or extend kimisys/adapters/vllm/pack.py"
            )

    def _hooks(self, prefix: str, module: torch.nn.Module) -> list[str]:
        """Notes what vLLM does to a module after loading; returns what is not known."""
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            if type(method) not in _DERIVED:
                return [f"{prefix!r} (derived by {type(method).__name__})"]
            self._derive.append(module)
        hook = getattr(module, "process_weights_after_loading", None)
        if hook is None or _derives_nothing(module, hook):
            return []
        return [f"{prefix!r} (derived by {type(module).__name__})"]

    def _parameters(self, prefix: str, before: torch.nn.Module, now: torch.nn.Module) -> list[str]:
        """Notes how to write a module's own parameters; returns those that it cannot write."""
        refused = []
        for attribute, parameter in before.named_parameters(recurse=False):
            name = self._names[id(parameter)]
            current = now._parameters.get(attribute)
            packed = current is not None and current.numel() == 0 and parameter.numel() > 0
            known = type(getattr(now, "quant_method", None)) in _DERIVED
            widened = known and attribute == "bias" and _widened(parameter, current)
            if current is not None and (widened or _same_place(parameter, current)):
                other = self._in_place.setdefault(name, current.detach())
                if other.data_ptr() != current.data_ptr():
                    refused.append(f"parameter '{prefix}.{attribute}' (was tied to {name!r})")
            elif packed and known:
                self._refills.append(_Refill(now, attribute, name))
            else:
                refused.append(f"parameter '{prefix}.{attribute}'")
        return refused

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
        for module in self._derive:
            method: Any = module.quant_method
            twin = self._same.get(module)
            if twin is None:
                method.process_weights_after_loading(module)
                continue
            for name in _DERIVED[type(method)]:
                setattr(module, name, getattr(twin, name))
        for refill in self._refills:
            if getattr(refill.module, refill.attribute).numel():
                # An unpacked fallback would go on reading the shadow while the next pull fills it.
                raise LayoutError(
                    f"{refill.name!r} was packed when the engine started and is not any more; vLLM "
                    "fell back to an unpacked kernel. Restart the engine"
                )


def _same_place(before: torch.Tensor, now: torch.Tensor) -> bool:
    return now.shape == before.shape and now.dtype == before.dtype and now.is_contiguous()


def _widened(before: torch.Tensor, now: torch.Tensor | None) -> bool:
    """Whether the same numbers are now in float32, as its AMX kernels want biases: copying into
    such a place gives what deriving it anew would, to the bit."""
    narrow = before.dtype in (torch.bfloat16, torch.float16)
    return narrow and now is not None and _same_place(before.float(), now)


def _shared(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Parameters that came to share memory with another: of two writes, one would be lost."""
    owners: dict[int, str] = {}
    return [
        f"parameter {name!r} (now tied to {owner!r})"
        for name, tensor in tensors.items()
        if (owner := owners.setdefault(tensor.data_ptr(), name)) != name
    ]


def _same_derivations(
    modules: Sequence[torch.nn.Module],
) -> dict[torch.nn.Module, torch.nn.Module]:
    """Modules that would derive what an earlier one derives, by the same method from the very same
    parameters, and the earlier one. vLLM packs a tied embedding, which never multiplies, beside the
    output head: a quarter of the time that packing a Qwen3-0.6B took, a fifth of the memory."""
    first: dict[tuple[Any, ...], torch.nn.Module] = {}
    same = {}
    for module in modules:
        own = dict(module.named_parameters(recurse=False))
        if not own or any(not parameter.numel() for parameter in own.values()):
            continue  # which weights it was packed from cannot be seen any more
        key = (type(module.quant_method), *((name, id(p)) for name, p in own.items()))
        if first.setdefault(key, module) is not module:
            same[module] = first[key]
    return same


def _derives_nothing(module: torch.nn.Module, hook: Callable[..., None]) -> bool:
    """Whether what vLLM does to a module after loading leaves its weights alone.

    Plain attention sets its scales to one (a quantized one has a quant_method, which was refused)
    and leaves the rest to its kernel; the CPU's, as most, inherits a hook that does nothing.
    """
    kernel = getattr(type(getattr(module, "impl", None)), "process_weights_after_loading", None)
    plain = getattr(hook, "__func__", hook) is Attention.process_weights_after_loading
    return plain and kernel is AttentionImplBase.process_weights_after_loading


def _new_state(before: torch.nn.Module, now: torch.nn.Module) -> list[str]:
    """What one module holds beside its parameters and may have from weights: attributes and
    buffers that were not there before loading, or hold tensors; less those that are known."""
    method = getattr(now, "quant_method", None)
    known = _DERIVED.get(type(method), frozenset()) if method is not None else frozenset()
    constant = frozenset(n for kind, ns in _CONSTANTS.items() if isinstance(now, kind) for n in ns)
    old, new = vars(before) | before._buffers, vars(now) | now._buffers
    found = [name for name in new.keys() - old.keys() if name not in known]
    found += [name for name in now._parameters.keys() - before._parameters.keys()]
    for name in old.keys() & new.keys() - _TORCHS_OWN:
        if name in constant:
            stays = isinstance(old[name], torch.Tensor) and isinstance(new[name], torch.Tensor)
            refused = not stays or (name != "kv_cache" and not _same_place(old[name], new[name]))
        else:
            refused = _holds_tensor(new[name])
        found += [name] if refused else []
    return sorted(found)


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds_tensor(each) for each in value)
    return isinstance(value, torch.Tensor)
