"""What a running vLLM model holds beside its parameters: what was derived after loading, and what
is constant.

A model is compared with one fresh from its constructor, attribute by attribute, into the plain
objects that modules own (quantization methods, attention kernels, routers). What was not there
before, or was None, is derived. A tensor that was there from the start is constant if it still has
the constructor's bits: only the loader, which is traced, and the hooks, which are run again, could
have made it from weights.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

_TORCHS_OWN = frozenset({"_parameters", "_buffers", "_modules"})
"""Attributes in which torch keeps what is looked at one by one."""

_CACHES = frozenset({"kv_cache"})
"""What attention layers get from the engine while it runs, and an update finds empty."""

_NEVER_WEIGHTS = ("vllm.config", "vllm.transformers_utils", "vllm.v1.kv_cache_interface")
"""Packages of vLLM whose objects hold settings."""


@dataclass(frozen=True)
class Derived:
    """An attribute that exists because weights were processed."""

    owner: Any
    attribute: str
    name: str
    new: bool

    def reset(self) -> None:
        """As the constructor left it: absent, or None."""
        if self.new:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, None)

    @property
    def present(self) -> bool:
        return getattr(self.owner, self.attribute, None) is not None


@dataclass
class Inventory:
    """What one module holds: what is derived, and the names of what cannot be explained.

    parameters: storages of all parameters of the running model, by address.
    """

    parameters: frozenset[int]
    derived: list[Derived] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    def compare(self, before: torch.nn.Module, now: torch.nn.Module, prefix: str) -> None:
        """Takes stock of a module, its children excepted."""
        old, new = (vars(m) | m._buffers for m in (before, now))
        caches = _CACHES if isinstance(now, AttentionLayerBase) else frozenset()
        for name in sorted(now._parameters.keys() - before._parameters.keys()):
            self.derived.append(Derived(now, name, f"{prefix}.{name}", True))
        self._attributes(now, old, new, prefix, _TORCHS_OWN | caches)

    def _attributes(
        self,
        owner: Any,
        old: Mapping[str, Any],
        new: Mapping[str, Any],
        prefix: str,
        ignored: frozenset[str] = frozenset(),
    ) -> None:
        for name in sorted(new.keys() - ignored):
            path, value = f"{prefix}.{name}", new[name]
            if name not in old:
                if _plain(value):
                    continue
                self.derived.append(Derived(owner, name, path, True))
            elif old[name] is None and _made(owner, value):
                self.derived.append(Derived(owner, name, path, False))
            else:
                self._value(old[name], value, path)

    def _value(self, before: Any, now: Any, path: str) -> None:
        """Explains a value that was there from the start."""
        if isinstance(now, torch.Tensor):
            if now.untyped_storage().data_ptr() in self.parameters and now.numel():
                return
            if not (isinstance(before, torch.Tensor) and _same_bits(before, now)):
                self.unexplained.append(path)
        elif isinstance(now, Mapping):
            pairs = [(before.get(k) if isinstance(before, Mapping) else None, k) for k in now]
            for old, key in pairs:
                self._value(old, now[key], f"{path}[{key!r}]")
        elif isinstance(now, list | tuple | set | frozenset):
            same = isinstance(before, list | tuple) and len(before) == len(now)
            olds = before if same else [None] * len(now)
            for index, (old, value) in enumerate(zip(olds, now, strict=True)):
                self._value(old, value, f"{path}[{index}]")
        elif isinstance(now, partial):
            old_parts = (before.args, before.keywords) if isinstance(before, partial) else None
            self._value(old_parts, (now.args, now.keywords), path)
        elif _owned(now) and id(now) not in self._seen:
            self._seen.add(id(now))
            same = type(before) is type(now)
            self._attributes(now, dict(_fields(before)) if same else {}, dict(_fields(now)), path)


def _made(owner: Any, value: Any) -> bool:
    """Whether what was None is now a kernel, or such, made from weights. A layer's hook may set any
    attribute of a method; that a layer's own holds a tensor where it had none is not known of any.
    """
    if value is None or (isinstance(owner, torch.nn.Module) and isinstance(value, torch.Tensor)):
        return False
    return not _plain(value)


def _plain(value: Any) -> bool:
    """Whether a value cannot hold a weight."""
    if isinstance(value, Mapping | list | tuple | set | frozenset) and not value:
        return True
    kinds = (type(None), bool, int, float, str, bytes, enum.Enum, torch.dtype, torch.device, type)
    return isinstance(value, kinds)


def _owned(value: Any) -> bool:
    """Whether a value is one of vLLM's objects whose attributes are looked into."""
    module = type(value).__module__
    if isinstance(value, torch.nn.Module | enum.Enum | type) or not module.startswith("vllm."):
        return False
    return not module.startswith(_NEVER_WEIGHTS)


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield name, getattr(value, name)


def _same_bits(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit; one on the meta device shows no bits."""
    if before.shape != now.shape or before.dtype != now.dtype:
        return False
    if not now.numel():
        return True
    if before.is_meta:
        return False
    ours, theirs = (t.detach().cpu().contiguous().reshape(-1) for t in (before, now))
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
