"""A wheel, built from the tracked files alone, works in an environment that has numpy and nothing
else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent

# Run isolated (-I): neither this tree nor PYTHONPATH can stand in for what the wheel lacks.
SCRIPT = """
import importlib.util, sys
import kimisys, kimisys.broadcast, kimisys.reshard, kimisys.rollout

assert kimisys.__file__.startswith(sys.prefix), kimisys.__file__
present = {"numpy"}
for name in ["numpy", "torch", "safetensors", "ray", "vllm", "rich", "pip", "setuptools"]:
    assert (importlib.util.find_spec(name) is not None) == (name in present), name
"""


def run(command: list[str | Path], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy: neither is this tree disturbed, nor can what lies about in it get in."""
    source = tmp_path_factory.mktemp("source")
    for name in run(["git", "ls-files", "-z"], ROOT).split("\0"):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    output = tmp_path_factory.mktemp("wheel")
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    run([sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", output, source], source)
    [built] = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and this environment's numpy."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    [site] = home.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    numpy = Path(np.__file__).parent
    for folder in (numpy, numpy.with_name("numpy.libs")):  # the second: shared libraries of wheels
        if folder.exists():
            (site / folder.name).symlink_to(folder)
    return home / "bin" / "python"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = run(["git", "ls-files", "kimisys"], ROOT).split()
    assert {name for name in names if ".dist-info/" not in name} == {
        *(name for name in tracked if (ROOT / name).is_file()),
        f"kimisys/_core{sysconfig.get_config_var('EXT_SUFFIX')}",
    }
    assert {"kimisys/py.typed", "kimisys/_core/reshard.pyi"} <= names


def test_the_primitives_need_numpy_alone(python: Path, tmp_path: Path) -> None:
    run([python, "-I", "-c", SCRIPT], tmp_path)


def test_a_plan_runs_and_weights_are_published_and_pulled(python: Path, tmp_path: Path) -> None:
    example = shutil.copy(ROOT / "examples" / "embed.py", tmp_path)
    assert "version=1" in run([python, "-I", example], tmp_path)
