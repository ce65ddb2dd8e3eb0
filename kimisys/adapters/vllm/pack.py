"""From verified weights into what the engine computes with.

vLLM derives state from its parameters once, after loading. On the CPU build linear layers and the
output head keep packed copies for oneDNN, experts are packed in place, and MLA keeps `W_UK_T` and
`W_UV` computed from `kv_b_proj`. ``Packer`` finds what was derived by comparing the running model
with one fresh from its constructor. An update puts that back as the constructor left it, restores
the parameters, and has vLLM's own hooks derive it again, in vLLM's order. Modules whose parameters
did not change are left alone. What cannot be explained so is refused, by name, before anything is
changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import vllm.model_executor.layers.utils as kernels
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from kimisys.adapters.vllm.derived import Derived, Inventory
from kimisys.adapters.vllm.scratch import Scratch
from kimisys.errors import LayoutError

_REPEATABLE: tuple[type[QuantizeMethodBase], ...] = (
    UnquantizedLinearMethod,
    UnquantizedEmbeddingMethod,
    UnquantizedFusedMoEMethod,
)
"""Methods that derive the same again from restored parameters; the exact types."""

_LEAVE_PARAMETERS: tuple[type[QuantizeMethodBase], ...] = (
    UnquantizedLinearMethod,
    UnquantizedEmbeddingMethod,
)
"""Those that only read the matrices and biases that they leave in place; experts are packed in
place."""

_PACKAGE = "vllm."
"""Attention kernels of vLLM's own derive again what they derived: its layerwise reload, too, calls
their hook anew (`vllm/model_executor/model_loader/reload`). Others' are not known."""


@dataclass(frozen=True)
class _Parameter:
    """A parameter as the engine has it now; `shape` is what processing left of it."""

    module: torch.nn.Module
    attribute: str
    name: str
    shape: tuple[int, ...]

    @property
    def current(self) -> torch.Tensor:
        found: torch.Tensor = getattr(self.module, self.attribute)
        return found.detach()


Replay = Callable[[Mapping[str, torch.Tensor]], bool]
"""Writes an update's changes into parameters that hold what was there before it, by name. False if
it cannot: then nothing was written."""


class Packer:
    """Brings a running model's derived state in line with new weights.

    running: the model as the engine uses it, its weights loaded and not all zero.
    fresh: the same model as its constructor leaves it, on the CPU, so that its constants have their
    values; its parameters are never touched, and it is not kept.
    config: of the running model.
    Raises LayoutError naming what was derived from weights in a way that is not known here.

    Attributes:
        shapes: of every parameter before packing, tied ones once: name to an empty meta tensor.
        derived: names of everything that an update derives again.
    """

    def __init__(
        self, running: torch.nn.Module, fresh: torch.nn.Module, config: VllmConfig
    ) -> None:
        self._config = config
        self._root_hook = getattr(running, "process_weights_after_loading", None)
        self.shapes = {n: p.detach().to("meta") for n, p in fresh.named_parameters()}
        self._names = {id(p): n for n, p in fresh.named_parameters()}
        self._in_place: dict[str, _Parameter] = {}
        self._refills: list[_Parameter] = []
        self._replayable: set[str] = set()
        self._resets: dict[torch.nn.Module, list[Derived]] = {}
        self._sources: dict[torch.nn.Module, frozenset[str]] = {}
        modules = dict(running.named_modules())
        self._methods, self._attention = _methods(running), _attention(running)
        self._derivers = _derivers([*self._methods, *self._attention])
        refused = _unknown_derivers(running, self._attention)
        parameters = frozenset(p.untyped_storage().data_ptr() for p in running.parameters())
        for prefix, before in fresh.named_modules():
            now = modules.pop(prefix, None)
            if now is None or type(now) is not type(before):
                refused.append(f"module {prefix!r} (was {type(before).__name__})")
                continue
            refused += self._take_stock(prefix, before, now, parameters)
            refused += self._parameters(prefix, before, now)
            self._sources[now] = frozenset(self._names[id(p)] for p in before.parameters())
        refused += [f"module {prefix!r}" for prefix in modules]
        refused += _shared(self._in_place)
        self._turned = {
            place.module
            for place in self._refills
            if place.attribute == "weight" and _packed_by_onednn(self.shapes[place.name])
        }
        self._same = _same_derivations(self._methods)
        self._twins: dict[torch.nn.Module, list[torch.nn.Module]] = {}
        for module, twin in self._same.items():
            self._twins.setdefault(twin, []).append(module)
        self.derived = sorted(each.name for resets in self._resets.values() for each in resets)
        if refused:
            raise LayoutError(
                f"vLLM derived state from weights that kimisys cannot derive again: {refused[:8]}; "
                "an update would leave it stale. Use an unquantized model of a supported family, "
                "or extend kimisys/adapters/vllm/pack.py"
            )

    def _take_stock(
        self, prefix: str, before: torch.nn.Module, now: torch.nn.Module, parameters: frozenset[int]
    ) -> list[str]:
        """Notes what a module derived; returns what cannot be explained."""
        inventory = Inventory(parameters)
        inventory.compare(before, now, prefix)
        deriver = self._derivers.get(now)
        if deriver is None:
            return inventory.unexplained + [each.name for each in inventory.derived]
        self._resets.setdefault(deriver, []).extend(inventory.derived)
        return inventory.unexplained

    def _parameters(self, prefix: str, before: torch.nn.Module, now: torch.nn.Module) -> list[str]:
        """Notes how to write a module's own parameters; returns those that it cannot write."""
        refused = []
        for attribute, parameter in before.named_parameters(recurse=False):
            name = self._names[id(parameter)]
            current = now._parameters.get(attribute)
            if current is None:
                refused.append(f"parameter '{prefix}.{attribute}'")
                continue
            place = _Parameter(now, attribute, name, tuple(current.shape))
            known = now in self._derivers
            widened = known and attribute == "bias" and _widened(parameter, current)
            if widened or _same_place(parameter, current):
                other = self._in_place.setdefault(name, place)
                if not widened and _left_alone(now, current):
                    self._replayable.add(name)
                if other.current.data_ptr() != current.data_ptr():
                    refused.append(f"parameter '{prefix}.{attribute}' (was tied to {name!r})")
            elif known:
                self._refills.append(place)
            else:
                refused.append(f"parameter '{prefix}.{attribute}'")
        return refused

    @torch.no_grad()
    def pack(
        self,
        weights: Mapping[str, torch.Tensor],
        touched: Collection[str] | None = None,
        replay: Replay | None = None,
    ) -> None:
        """Makes the running model compute with `weights`.

        weights: by name, each of the shape and dtype in ``shapes``; read, not kept.
        touched: the names whose weights differ from those of the last call, or None for all; what
        depends on no other is left as it is.
        replay: writes what changed into parameters that need no packing; without it they are
        copied.
        Whatever this raises, the model is then a mixture: it must not be served from again.
        """
        if touched is None or self._root_hook is not None:  # that may derive from anything
            names, replay = frozenset(self.shapes), None
        elif touched:
            names = self._with_siblings(touched)
        else:
            return
        self._write(weights, names, replay)
        scratch = Scratch()
        for place in self._refills:
            if place.name in names:
                setattr(place.module, place.attribute, _parameter(weights[place.name]))
        with set_current_vllm_config(self._config):
            for module in self._methods:
                if self._stale(module, names):
                    self._derive(module, scratch)
            for module in self._attention:
                if self._stale(module, names):
                    self._reset(module)
                    module.process_weights_after_loading(self._config.model_config.dtype)
            if self._root_hook is not None:
                self._root_hook()
        self._check_derived(weights)

    def _with_siblings(self, touched: Collection[str]) -> frozenset[str]:
        """With every name whose weights a module that is derived again may want, as packing took
        them from it."""
        names, before = frozenset(touched), frozenset[str]()
        while names != before:
            before = names
            sources = [self._sources[module] for module in (*self._methods, *self._attention)]
            names = before.union(*(each for each in sources if each & before))
        return names

    def _stale(self, module: torch.nn.Module, names: Collection[str]) -> bool:
        """Whether what a module derived may depend on these; one without parameters may on all."""
        sources = self._sources[module]
        return not sources or not sources.isdisjoint(names)

    def _write(
        self, weights: Mapping[str, torch.Tensor], names: Collection[str], replay: Replay | None
    ) -> None:
        """Fills the parameters that are not packed."""
        left = {n: place.current for n, place in self._in_place.items() if n in names}
        replayed = {n: left[n] for n in left.keys() & self._replayable}
        if replay is not None and replayed and replay(replayed):
            left = {n: left[n] for n in left.keys() - replayed.keys()}
        for name, current in left.items():
            current.copy_(weights[name])

    def _derive(self, module: torch.nn.Module, scratch: Scratch) -> None:
        twin = self._same.get(module)
        if twin is None:
            # All of the old copies go before the new one comes, into their memory.
            for each in (module, *self._twins.get(module, ())):
                self._reset(each)
            if module in self._turned:
                module.weight = _parameter(scratch.turned(module.weight))  # type: ignore[arg-type]
            cast(Any, module).quant_method.process_weights_after_loading(module)
            return
        for each in self._resets.get(module, []):
            setattr(module, each.attribute, getattr(twin, each.attribute))

    def _reset(self, module: torch.nn.Module) -> None:
        for each in self._resets.get(module, []):
            if each.present:
                each.reset()

    def _check_derived(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Raises LayoutError unless the model has the state again that it had before."""
        missing = [e.name for each in self._resets.values() for e in each if not e.present]
        if missing:
            raise LayoutError(
                f"vLLM did not derive {missing[:8]} again, which it did when the engine started; "
                "restart the engine"
            )
        shadow = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
        for place in self._refills:
            current = place.current
            # An unpacked fallback would go on reading the shadow while the next pull fills it.
            kept = current.numel() > 0 and current.untyped_storage().data_ptr() in shadow
            if kept or tuple(current.shape) != place.shape:
                raise LayoutError(
                    f"{place.name!r} was packed when the engine started and is not any more; vLLM "
                    "fell back to an unpacked kernel. Restart the engine"
                )


def _packed_by_onednn(weight: torch.Tensor) -> bool:
    """As vLLM chooses (`dispatch_cpu_unquantized_gemm`); Scratch turns elements of two bytes."""
    if weight.dim() != 2 or weight.element_size() != 2 or current_platform.is_zen_cpu():
        return False
    onednn: bool = kernels.ops._supports_onednn
    rows, columns = weight.shape
    return onednn and not kernels.check_cpu_sgl_kernel(rows, columns, weight.dtype)


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _methods(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that a method of their own processes after loading, in vLLM's order."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "quant_method", None), QuantizeMethodBase)
    ]


def _attention(model: torch.nn.Module) -> list[Any]:
    """Attention layers with a hook of their own, which vLLM calls after all methods."""
    return [module for module in model.modules() if is_deferred_attention_layer(module)]


def _derivers(modules: list[Any]) -> dict[torch.nn.Module, torch.nn.Module]:
    """Modules that may hold what was derived, and those whose hook derives it: mostly themselves.

    A method that is a module holds its state for the layer that it belongs to.
    """
    found: dict[torch.nn.Module, torch.nn.Module] = {}
    for module in modules:
        found[module] = module
        method: Any = getattr(module, "quant_method", None)
        if isinstance(method, torch.nn.Module):
            found[method] = module
    return found


def _unknown_derivers(model: torch.nn.Module, attention: list[Any]) -> list[str]:
    """Modules, by name, whose hooks are not known to derive the same again."""
    refused = []
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase) and type(method) not in _REPEATABLE:
            refused.append(f"{prefix!r} (derived by {type(method).__name__})")
        kernel = type(getattr(module, "impl", None))
        if module in attention and not _known_kernel(kernel):
            refused.append(f"{prefix!r} (derived by {kernel.__name__})")
    hook = getattr(model, "process_weights_after_loading", None)
    if hook is not None and not type(model).__module__.startswith(_PACKAGE):
        refused.append(f"'' (derived by {type(model).__name__})")
    return refused


def _known_kernel(kernel: type) -> bool:
    own = hasattr(kernel, "process_weights_after_loading")
    return not own or kernel.__module__.startswith(_PACKAGE)


def _same_place(before: torch.Tensor, now: torch.Tensor) -> bool:
    return now.shape == before.shape and now.dtype == before.dtype and now.is_contiguous()


def _widened(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether the same numbers are now in float32, as its AMX kernels want biases: copying into
    such a place gives what deriving it anew would, to the bit."""
    narrow = before.dtype in (torch.bfloat16, torch.float16)
    return narrow and _same_place(before.float(), now)


def _left_alone(module: torch.nn.Module, parameter: torch.Tensor) -> bool:
    """Whether a parameter in place has the bits that were loaded, as its module does not process
    it. Weights of more dimensions than a matrix's (convolutions) may be packed in place."""
    method = getattr(module, "quant_method", None)
    if not isinstance(method, QuantizeMethodBase):
        return True
    return type(method) in _LEAVE_PARAMETERS and parameter.dim() <= 2


def _shared(places: Mapping[str, _Parameter]) -> list[str]:
    """Parameters that came to share memory with another: of two writes, one would be lost."""
    owners: dict[int, str] = {}
    return [
        f"parameter {name!r} (now tied to {owner!r})"
        for name, place in places.items()
        if (owner := owners.setdefault(place.current.data_ptr(), name)) != name
    ]


def _same_derivations(methods: list[torch.nn.Module]) -> dict[torch.nn.Module, torch.nn.Module]:
    """Modules that would derive what an earlier one derives, by the same method from the very same
    parameters, and the earlier one. vLLM packs a tied embedding, which never multiplies, beside the
    output head: a quarter of the time that packing a Qwen3-0.6B took, a fifth of the memory."""
    first: dict[tuple[Any, ...], torch.nn.Module] = {}
    same = {}
    for module in methods:
        own = dict(module.named_parameters(recurse=False))
        if not own or any(not parameter.numel() for parameter in own.values()):
            continue  # which weights it was packed from cannot be seen any more
        key = (type(module.quant_method), *((name, id(p)) for name, p in own.items()))
        if first.setdefault(key, module) is not module:
            same[module] = first[key]
    return same
