"""`make gpu-check`: all that needs a GPU, with the Python and the libraries of the GPU machine.

Builds the extension in build/gpu-check, offline, runs tests/gpu and the benchmarks beside them,
and writes one JSON file. Needs Python 3.11 or later, a C++20 compiler, CMake, numpy, pybind11 and
torch with Triton; pytest for the tests. Exit status: 0; 1 when something failed, or was left out
beside a GPU; 2 when something is missing for the build. Without a GPU it builds, and says what it
did not test.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORK = ROOT / "build" / "gpu-check"
SITE = WORK / "site"  # the package as it would be installed, with the extension just built

NOT_TESTED = "not tested: no GPU"
REPORTED = ["numpy", "torch", "triton", "cupy-cuda13x", "pybind11", "pytest"]


@dataclass(frozen=True)
class Outcome:
    """One thing that was checked. outcome: passed, failed, or "not tested: " and why."""

    name: str
    outcome: str
    seconds: float
    message: str = ""


def missing() -> list[str]:
    """What the build and the imports need and this machine lacks."""
    modules = [m for m in ("numpy", "pybind11", "torch") if importlib.util.find_spec(m) is None]
    programs = [] if shutil.which("cmake") else ["cmake"]
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers if name):
        programs.append("a C++ compiler")
    return modules + programs


def gpus() -> tuple[list[dict[str, str]], bool]:
    """The GPUs that the driver lists (name, driver, memory), and whether torch can use one."""
    import torch

    fields = ["name", "driver_version", "memory.total"]
    listed = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
        if answer.returncode == 0:
            lines = answer.stdout.strip().splitlines()
            listed = [
                dict(zip(fields, map(str.strip, line.split(",")), strict=True)) for line in lines
            ]
    return listed, torch.cuda.is_available()


def versions() -> dict[str, str | None]:
    import torch

    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in REPORTED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def step(name: str, commands: list[list[str | Path]], timeout: float, **options: Any) -> Outcome:
    """Runs the commands until one fails; its output is then the message."""
    started = time.perf_counter()
    for command in commands:
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, cwd=WORK, **options
            )
            error = "" if run.returncode == 0 else f"exit status {run.returncode}"
            said = run.stdout + run.stderr
        except subprocess.TimeoutExpired:
            error, said = f"not done after {timeout:.0f} s", ""
        if error:
            message = f"{' '.join(map(str, command))}: {error}\n{said[-4000:]}"
            return Outcome(name, "failed", time.perf_counter() - started, message)
    return Outcome(name, "passed", time.perf_counter() - started)


def build() -> Outcome:
    """The extension and the package's Python files, side by side in SITE."""
    package = SITE / "kimisys"
    shutil.rmtree(SITE, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "kimisys", package, ignore=ignored)
    native = WORK / "native"
    configure: list[str | Path] = [
        "cmake", "-S", ROOT, "-B", native, "-DKIMISYS_PYTHON=ON", f"-DKIMISYS_PACKAGE={package}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    jobs = str(len(os.sched_getaffinity(0)))
    compile_: list[str | Path] = ["cmake", "--build", native, "--parallel", jobs]
    return step("build", [configure, [*compile_, "--target", "_core"]], 1800)


def environment() -> dict[str, str]:
    """SITE before everything else, and no folder that Python would put before it."""
    given = os.environ.get("PYTHONPATH")
    paths = [str(SITE), str(ROOT), str(HERE), *([given] if given else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def smoke() -> Outcome:
    """The extension just built is the one imported; a plan runs, weights are published, pulled."""
    where = f"from kimisys import _core; assert _core.__file__.startswith({str(SITE)!r}), _core"
    commands: list[list[str | Path]] = [
        [sys.executable, "-c", where],
        [sys.executable, ROOT / "examples" / "embed.py"],
    ]
    return step("smoke", commands, 300, env=environment())


def run_tests() -> list[Outcome]:
    """tests/gpu, by pytest where there is one."""
    if importlib.util.find_spec("pytest") is None:
        return [Outcome("tests/gpu", "not tested: no pytest", 0.0)]
    results = WORK / "pytest.xml"
    results.unlink(missing_ok=True)
    # Settings of this tree that would put its own kimisys first, or need more libraries, are off.
    command: list[str | Path] = [
        sys.executable, "-m", "pytest", HERE, f"--rootdir={ROOT}", f"--confcutdir={HERE}",
        "-o", "pythonpath=", "-p", "no:cacheprovider", f"--junitxml={results}",
    ]  # fmt: skip
    whole = step("tests/gpu", [command], 1800, env=environment())
    if not results.exists():  # pytest did not come to its end, whatever its exit status says
        return [Outcome(whole.name, "failed", whole.seconds, whole.message or "no results")]
    outcomes = read_outcomes(results.read_text())
    # A failure that no test accounts for.
    if whole.outcome == "failed" and all(each.outcome != "failed" for each in outcomes):
        outcomes.append(whole)
    return outcomes


def read_outcomes(junit: str) -> list[Outcome]:
    """The tests of pytest's JUnit file."""
    outcomes = []
    for case in ElementTree.fromstring(junit).iter("testcase"):
        name, seconds = f"{case.get('classname')}.{case.get('name')}", float(case.get("time", 0))
        skipped = case.find("skipped")
        failures = [*case.findall("failure"), *case.findall("error")]
        if failures:
            message = "\n".join(failure.text or "" for failure in failures)
            outcomes.append(Outcome(name, "failed", seconds, message[-4000:]))
        elif skipped is not None:
            reason = skipped.get("message", "")
            reason = reason if reason == NOT_TESTED else f"not tested: {reason}"
            outcomes.append(Outcome(name, reason, seconds))
        else:
            outcomes.append(Outcome(name, "passed", seconds))
    return outcomes


def run_benches() -> tuple[Outcome, list[dict[str, Any]]]:
    records_file = WORK / "records.json"
    records_file.unlink(missing_ok=True)
    command = [sys.executable, HERE / "measure.py", records_file]
    whole = step("benches", [command], 1200, env=environment())
    if whole.outcome == "failed":
        return whole, []
    records = json.loads(records_file.read_text())
    wrong = [record["case"] for record in records if not record["correct"]]
    if wrong:
        whole = Outcome("benches", "failed", whole.seconds, f"wrong answer: {', '.join(wrong)}")
    return whole, records


def succeeded(outcomes: list[Outcome], gpu: bool) -> bool:
    """Nothing failed; beside a GPU, moreover, nothing was left out."""
    return not any(
        each.outcome == "failed" or (gpu and each.outcome != "passed") for each in outcomes
    )


def check() -> dict[str, Any]:
    """Everything, as the report that is written."""
    listed, usable = gpus()
    present = bool(listed) or usable
    outcomes = [build()]
    records: list[dict[str, Any]] = []
    if outcomes[0].outcome == "passed":
        outcomes.append(smoke())
        outcomes += run_tests()
        if present:
            bench, records = run_benches()
            outcomes.append(bench)
        else:
            outcomes.append(Outcome("benches", NOT_TESTED, 0.0))
    if present and not usable:
        outcomes.append(Outcome("torch", "failed", 0.0, "torch cannot use the GPU that is here"))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpus": listed,
        "gpu_present": present,
        "versions": versions(),
        "succeeded": succeeded(outcomes, present),
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "benches": records,
    }


def show(report: dict[str, Any]) -> None:
    for outcome in report["outcomes"]:
        print(f"  {outcome['outcome']:<20} {outcome['seconds']:6.1f} s  {outcome['name']}")
        if outcome["outcome"] == "failed":
            print(outcome["message"])
    for r in report["benches"]:
        if r["correct"]:
            print(f"  {r['case']}: {r['value']:.2f} {r['unit']}")
            for peer in r["peers"]:
                print(f"    {peer['name']} {peer['value']:.2f}, ratio {peer['ratio']:.2f}")
    if not report["gpu_present"]:
        print(NOT_TESTED)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "gpu-check.json")
    file = parser.parse_args().json
    if lacking := missing():
        print(
            f"{sys.executable} cannot build and import the extension: {', '.join(lacking)} missing"
        )
        print("name another with make gpu-check GPU_PYTHON=/path/to/python3")
        return 2
    WORK.mkdir(parents=True, exist_ok=True)
    if not file.absolute().parent.is_dir():
        print(f"--json: there is no folder {file.absolute().parent}")
        return 2
    report = check()
    file.write_text(json.dumps(report, indent=2) + "\n")
    show(report)
    print(f"written: {file}")
    return 0 if report["succeeded"] else 1


if __name__ == "__main__":
    sys.exit(main())
