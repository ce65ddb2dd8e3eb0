"""Imports like torchvision, which has no build for the CPU-only torch of these tests.

vLLM and transformers import it beside Qwen2.5-VL, for preparing images. Only models are built and
loaded here, so that no function of it is ever called; one that is raises.
"""

from typing import Any, NoReturn

__version__ = "0.28.0"


class Absent:
    """Whatever is imported from torchvision: it has any attribute, and cannot be called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self._name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise ModuleNotFoundError(f"{self._name} needs torchvision, which is not installed")


def absent(module: str) -> Any:
    """A module-level `__getattr__` for `module`."""

    def get(name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{module}.{name}")

    return get


__getattr__ = absent("torchvision")
