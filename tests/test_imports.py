"""Arrows run downward only (docs/architecture.md): the test reads every import and fails on an
upward one."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "kimisys"

# room → what it may import besides itself and the standard library
ALLOWED = {
    "kimisys": set(),
    "kimisys.errors": {"kimisys._core"},
    "kimisys.reshard": {"numpy", "scipy", "torch", "kimisys._core", "kimisys.errors"},
    "kimisys.broadcast": {"numpy", "kimisys._core", "kimisys.errors", "kimisys.reshard"},
    "kimisys.rollout": {"numpy", "kimisys._core", "kimisys.errors"},
    "kimisys.kernels": {
        "numpy", "torch", "triton", "kimisys._core", "kimisys.errors", "kimisys.reshard",
    },
    "kimisys.rl": {"torch", "kimisys.errors"},
    "kimisys.rewards": {"kimisys.errors"},
    "kimisys.adapters.megatron": {
        "numpy", "torch", "megatron", "kimisys.errors", "kimisys.reshard",
        "kimisys.adapters.trace_cache",
    },
    "kimisys.adapters.vllm": {
        "numpy", "torch", "vllm", "kimisys.errors", "kimisys.reshard", "kimisys.broadcast",
        "kimisys.rollout", "kimisys.adapters.trace_cache",
    },
    "kimisys.adapters.dtensor": {
        "numpy", "torch", "transformers", "kimisys.errors", "kimisys.reshard",
    },
    "kimisys.adapters.ray": {"ray", "kimisys.errors"},
    "kimisys.adapters.mooncake": {"numpy", "mooncake", "kimisys.errors", "kimisys.broadcast"},
    "kimisys.adapters": set(),
    "kimisys.trainer": {
        "numpy", "torch", "rich", "tyro", "matplotlib", "tokenizers", "transformers", "jinja2",
        "msgspec", "kimisys.errors", "kimisys.reshard", "kimisys.broadcast", "kimisys.rollout",
        "kimisys.rl", "kimisys.rewards", "kimisys.adapters",
    },
}  # fmt: skip


def room_of(module: str) -> str:
    """The longest key of ALLOWED that holds `module`."""
    return max((r for r in ALLOWED if within(module, r)), key=len)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the direction"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (
                    inner
                    if (ROOT.parent / inner.replace(".", "/")).with_suffix(".py").exists()
                    else node.module
                )


def upward(module: str, source: str) -> list[str]:
    """The imports in `source` that `module` may not make."""
    room = room_of(module)
    legal = ALLOWED[room] | {room} if room != "kimisys" else ALLOWED[room]
    return [
        name
        for name in imports(ast.parse(source), module)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not any(within(name, package) for package in legal)
    ]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_downward(path: Path) -> None:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    module = ".".join(part for part in parts if part != "__init__")
    assert upward(module, path.read_text()) == []


def test_an_upward_arrow_is_seen() -> None:
    assert upward("kimisys.reshard.tracer", "import kimisys.broadcast") == ["kimisys.broadcast"]
    assert upward("kimisys.rl.loss", "from kimisys.trainer import master") == [
        "kimisys.trainer.master"
    ]
    assert upward("kimisys.broadcast.publisher", "def f():\n  import torch") == ["torch"]


@pytest.mark.parametrize("primitive", ["reshard", "broadcast", "rollout"])
def test_a_primitive_costs_numpy_alone(primitive: str) -> None:
    code = (
        f"import sys, kimisys.{primitive}; "
        "foreign = {m.partition('.')[0] for m in sys.modules} - sys.stdlib_module_names; "
        "print(sorted(m for m in foreign - {'numpy', 'kimisys'} if not m.startswith('_')))"
    )
    run = subprocess.run([sys.executable, "-S", "-c", f"import site, sys; {_paths()}; {code}"],
                         capture_output=True, text=True, timeout=120, check=True)  # fmt: skip
    assert run.stdout.strip() == "[]"


def _paths() -> str:
    """-S leaves out what .pth files import; the search path is given instead."""
    return f"sys.path[:] = {[str(ROOT.parent), *sys.path]!r}"
