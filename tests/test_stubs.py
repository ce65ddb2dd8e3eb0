"""kimisys/_core/*.pyi say what the built extension has.

mypy's stubtest compares names and kinds. It cannot look into the signatures of pybind11, whose
functions carry them in their docstrings alone; the second test reads them there.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kimisys import _core

ROOT = Path(__file__).parent.parent
MODULES = [_core, _core.reshard, _core.broadcast, _core.rollout]

# What a stub cannot say of pybind11's classes: their metaclass, and that some cannot be made. And
# buffers show their method from Python 3.12 on only.
INEXPRESSIBLE = (
    "is inconsistent, metaclass differs",
    '.__init__ is inconsistent, stub does not have *args parameter "args"',
    "Snapshot.__buffer__ is not present at runtime",
    ".__pybind11_native_enum__ is not present in stub",
)

# Parameters as (name, default's source or None), without self.
Signature = list[tuple[str, str | None]]


def stub_of(module: ModuleType) -> str:
    inner = module.__name__.removeprefix("kimisys._core").removeprefix(".") or "__init__"
    return (ROOT / "kimisys" / "_core" / f"{inner}.pyi").read_text()


def signature(function: ast.FunctionDef) -> Signature:
    given = function.args
    assert given.vararg is None, f"{function.name} takes anything"
    positional = [*given.posonlyargs, *given.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
    pairs = [
        *zip(positional, [*missing, *given.defaults], strict=True),
        *zip(given.kwonlyargs, given.kw_defaults, strict=True),
    ]
    named = [(a.arg, d and ast.unparse(d)) for a, d in pairs if a.arg != "self"]
    return named + ([(f"**{given.kwarg.arg}", None)] if given.kwarg else [])


def is_property(function: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in function.decorator_list)


def stubbed(source: str) -> dict[str, Signature]:
    """Functions and methods of a stub, but for operators other than the constructor."""
    found: dict[str, Signature] = {}
    for node in ast.parse(source).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for function in inner:
            if not isinstance(function, ast.FunctionDef) or is_property(function):
                continue
            if not function.name.startswith("__") or function.name == "__init__":
                found[prefix + function.name] = signature(function)
    return found


def built(module: ModuleType) -> dict[str, Signature]:
    """The same of the extension, from the docstrings that pybind11 writes."""
    return {name: signature(parsed(function.__doc__ or "")) for name, function in functions(module)}


def functions(module: ModuleType) -> Iterator[tuple[str, object]]:
    for name, value in vars(module).items():
        if inspect.isroutine(value):
            yield name, value
        elif isinstance(value, type) and not issubclass(value, BaseException):
            for inner in vars(value):
                member = getattr(value, inner)
                constructor = inner == "__init__" and member.__doc__ != object.__init__.__doc__
                if inspect.isroutine(member) and (constructor or not inner.startswith("_")):
                    yield f"{name}.{inner}", member


def parsed(docstring: str) -> ast.FunctionDef:
    first = docstring.partition("\n")[0]
    [function] = ast.parse(f"def {first}: ...").body
    assert isinstance(function, ast.FunctionDef)
    return function


def test_stubtest_finds_nothing_but_what_stubs_cannot_say() -> None:
    command = [sys.executable, "-m", "mypy.stubtest", "--concise", "kimisys._core"]
    run = subprocess.run(
        [*command, "--mypy-config-file", "pyproject.toml"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    lines = run.stdout.splitlines()
    # That it looked at the classes at all shows in the complaints that are expected.
    assert any(line.startswith("kimisys._core.reshard.Plan ") for line in lines), run.stderr
    assert [line for line in lines if not line.endswith(INEXPRESSIBLE)] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_signatures_are_those_of_the_docstrings(module: ModuleType) -> None:
    assert stubbed(stub_of(module)) == built(module)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("nic: int = 0", "nic: int = 1"),  # a default
        ("nic: int = 0", "nic: int = 0, rail: int = 0"),  # one too many
        ("rank: int, buffer: str", "buffer: str, rank: int"),  # the order
        ("(source: Layout", "(origin: Layout"),  # a name
        ("def prove(", "def proof("),  # a function that is missing, one that is not there
        ("    def cover(self) -> Layout: ...\n", ""),
    ],
)
def test_a_wrong_stub_is_seen(right: str, wrong: str) -> None:
    stub = stub_of(_core.reshard)
    assert right in stub
    assert stubbed(stub.replace(right, wrong)) != built(_core.reshard)
