"""What the trainer trains on: a `Task`, which anyone can write, and how it is found by name.

A task of your own is a function without arguments that returns a `Task`, in any module
(`--task package.module:function`) or file (`--task ./my_task.py:function`); examples/my_task.py is
one in 30 lines. Problems with one right answer each need no code at all: write them into a JSONL
file (`--task problems.jsonl`; the format is in kimisys/trainer/problem_file.py). A function may
also read such a file, by `read_problems`, and bring its own checker.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kimisys.rewards import final_answer
from kimisys.rewards.arithmetic import ANSWER_MARKER
from kimisys.trainer.problem import Demonstration, Problem, TaskError
from kimisys.trainer.problem_file import ProblemFile, read_problems

__all__ = [
    "FILE_COMPLETION_TOKENS",
    "Demonstration",
    "Problem",
    "ProblemFile",
    "Task",
    "TaskError",
    "load_task",
    "read_problems",
]

FILE_COMPLETION_TOKENS = 256
"""max_completion_tokens of the task that a JSONL file is; a function can set another."""


@dataclass(frozen=True)
class Task:
    """Problems, a checker and a limit. Raises TaskError for what cannot be trained on."""

    problems: Sequence[Problem]
    """What RL samples from."""
    held_out: Sequence[Problem]
    """What pass rates are measured on; no prompt of it is a problem or a demonstration."""
    check: Callable[[Problem, str, bool], float]
    """(problem, completion without its end-of-sequence token, finished) → reward, within 0 to 1;
    1 is right. `finished` is false where the token limit cut the completion off."""
    max_completion_tokens: int
    """The end-of-sequence token included."""
    demonstrations: Sequence[Demonstration] = ()
    """What SFT imitates; () means no SFT."""

    @property
    def fingerprint(self) -> str:
        """Tells tasks with other problems apart: a hash of their prompts and answers, in order."""
        text = "\0".join(f"{problem.prompt}\0{problem.answer}" for problem in self.problems)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def __post_init__(self) -> None:
        _check_members("problems", self.problems, Problem)
        _check_members("held_out", self.held_out, Problem)
        _check_members("demonstrations", self.demonstrations, Demonstration)
        for name, problems in (("problems", self.problems), ("held_out", self.held_out)):
            if not problems:
                raise TaskError(f"{name} is empty; a task needs at least one problem in it")
            for i, problem in enumerate(problems):
                _check_problem(f"{name}[{i}]", problem)
        for i, shown in enumerate(self.demonstrations):
            _check_text(f"demonstrations[{i}].prompt", shown.prompt, may_be_empty=False)
            _check_text(f"demonstrations[{i}].completion", shown.completion, may_be_empty=False)
        if not callable(self.check):
            raise TaskError(
                f"check is {self.check!r}; give a function (problem, completion, finished) → reward"
            )
        limit = self.max_completion_tokens
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise TaskError(f"max_completion_tokens is {limit!r}; it must be an integer above 0")
        held_out = {problem.prompt for problem in self.held_out}
        _check_disjoint("problems", [problem.prompt for problem in self.problems], held_out)
        _check_disjoint("demonstrations", [d.prompt for d in self.demonstrations], held_out)


def load_task(spec: str) -> Task:
    """The task that `spec` names: `package.module:function`, `file.py:function`, `file.jsonl`.

    The function takes no arguments and returns a Task. A file of Python needs no package and no
    place on the module path; what it imports does. A JSONL file is checked by
    kimisys.rewards.final_answer, with FILE_COMPLETION_TOKENS for each completion. Raises TaskError;
    for an error in the user's own code the message ends in its traceback, and it is the cause.
    """
    if spec.endswith(".jsonl"):
        return _task_of_file(spec)
    source, colon, name = spec.rpartition(":")
    parts = [name] if source.endswith(".py") else [*source.split("."), name]
    if not colon or not all(part.isidentifier() for part in parts):
        raise TaskError(
            f"task {spec!r} names neither a function nor a file; write package.module:function, "
            "./file.py:function or file.jsonl"
        )
    module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    task = _call(module, source, name)
    if not isinstance(task, Task):
        raise TaskError(
            f"{name}() in {source} returned {type(task).__name__}; it must return a "
            "kimisys.trainer.task.Task"
        )
    return task


def _task_of_file(path: str) -> Task:
    read = read_problems(path)
    for problem in (*read.problems, *read.held_out):
        if ANSWER_MARKER in problem.answer:
            raise TaskError(
                f"{path}: the answer {problem.answer!r} to {problem.prompt!r} holds "
                f"{ANSWER_MARKER!r}, which marks final answers, so it could never be right; write "
                "a task function that calls read_problems and brings its own checker"
            )
    return Task(
        problems=read.problems,
        held_out=read.held_out,
        check=final_answer.check,
        max_completion_tokens=FILE_COMPLETION_TOKENS,
        demonstrations=read.demonstrations,
    )


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # the module itself, or a package that holds it: else one of its own imports is missing
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _broken(f"importing {name}", error) from error
        file = Path(*name.split(".")).with_suffix(".py")
        remedy = (
            f"it is a file here: write ./{file}:function"
            if file.is_file()
            else "install it, add its folder to PYTHONPATH, or write ./file.py:function"
        )
        raise TaskError(f"there is no module {error.name!r}; {remedy}") from None
    except (Exception, SystemExit) as error:
        raise _broken(f"importing {name}", error) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TaskError(f"{path} is not a file; seen from {Path.cwd()}")
    name = f"kimisys_task_file_{path.stem}"  # so that no real module is shadowed
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _broken(f"importing {path}", error) from error
    return module


def _call(module: ModuleType, source: str, name: str) -> Any:
    function = getattr(module, name, None)
    if not callable(function):
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        found = f"its functions are {', '.join(own)}" if own else "it defines no function"
        raise TaskError(f"{source} has no function {name!r}; {found}")
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError) as error:
        raise TaskError(f"{name} in {source} must be callable without arguments: {error}") from None
    try:
        return function()
    except TaskError:
        raise  # says all by itself
    except (Exception, SystemExit) as error:
        raise _broken(f"calling {name} in {source}", error) from error


def _broken(doing: str, error: BaseException) -> TaskError:
    """The user's own error, with the frames of the user's code."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen importlib")
    ]
    shown = [*traceback.format_list(frames), *traceback.format_exception_only(error)]
    return TaskError(f"{doing} failed:\n{''.join(shown).rstrip()}")


def _check_members(name: str, members: object, kind: type) -> None:
    if not isinstance(members, Sequence) or isinstance(members, str):
        raise TaskError(f"{name} is of type {type(members).__name__}; give a list or a tuple")
    for i, member in enumerate(members):
        if not isinstance(member, kind):
            raise TaskError(
                f"{name}[{i}] is of type {type(member).__name__}; it must be a {kind.__name__}"
            )


def _check_problem(where: str, problem: Problem) -> None:
    _check_text(f"{where}.prompt", problem.prompt, may_be_empty=False)
    _check_text(f"{where}.answer", problem.answer, may_be_empty=True)
    difficulty = problem.difficulty
    if not isinstance(difficulty, int | float) or not math.isfinite(difficulty):
        raise TaskError(f"{where}.difficulty is {difficulty!r}; it must be a finite number")


def _check_disjoint(name: str, prompts: Sequence[str], held_out: Set[str]) -> None:
    for i, prompt in enumerate(prompts):
        if prompt in held_out:
            raise TaskError(
                f"{name}[{i}] has the prompt {prompt!r}, which is held out; nothing that is "
                "trained on may be measured"
            )


def _check_text(where: str, text: object, *, may_be_empty: bool) -> None:
    if not isinstance(text, str):
        raise TaskError(f"{where} is of type {type(text).__name__}; it must be a text")
    if not text and not may_be_empty:
        raise TaskError(f"{where} is empty; a text of at least one character is needed")
