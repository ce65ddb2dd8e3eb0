"""What makes a task, and what loading one says when it goes wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kimisys.rewards import final_answer
from kimisys.trainer.task import (
    FILE_COMPLETION_TOKENS,
    Demonstration,
    Problem,
    Task,
    TaskError,
    load_task,
)
from kimisys.trainer.tokenizer import Tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
GOOD = """
from __future__ import annotations
from dataclasses import dataclass
from kimisys.trainer.task import Problem, Task

@dataclass(frozen=True)
class Question(Problem):
    hint: str = ""

def check(problem: Problem, completion: str, finished: bool) -> float:
    return float(finished and completion == problem.answer)

def task() -> Task:
    return Task([Question("1+1=", "2", hint="one hand")], [Problem("2+2=", "4")], check, 8)
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules into a folder on the module path; forgets them afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    yield write
    for name in set(sys.modules) - before:
        if name.startswith(("kimisys_test_", "kimisys_task_file_")):
            del sys.modules[name]


def message(spec: str | Path) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(str(spec))
    return str(caught.value)


# --- a task ---------------------------------------------------------------------------------


def a_task(**changed: Any) -> Task:
    parts = {
        "problems": [Problem("1=", "1"), Problem("2=", "2")],
        "held_out": [Problem("3=", "3")],
        "check": final_answer.check,
        "max_completion_tokens": 4,
        "demonstrations": [Demonstration("2=", "#2")],
    }
    return Task(**{**parts, **changed})


def test_a_task_without_demonstrations_or_difficulties_is_one() -> None:
    task = a_task(demonstrations=())
    assert task.problems[1].difficulty == 0.0
    assert task.check(task.problems[0], "#1", True) == 1.0


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"problems": []}, "problems is empty"),
        ({"held_out": ()}, "held_out is empty"),
        ({"problems": iter([Problem("1=", "1")])}, "problems is of type list_iterator; give a"),
        ({"problems": "1="}, "problems is of type str"),
        ({"held_out": [("3=", "3")]}, r"held_out\[0\] is of type tuple; it must be a Problem"),
        ({"demonstrations": [Problem("2=", "2")]}, r"demonstrations\[0\] is of type Problem"),
        ({"problems": [Problem("1=", "1"), Problem("", "2")]}, r"problems\[1\]\.prompt is empty"),
        ({"problems": [Problem("1=", 1)]}, r"problems\[0\]\.answer is of type int"),
        ({"held_out": [Problem("3=", "3", float("nan"))]}, r"held_out\[0\]\.difficulty is nan"),
        ({"held_out": [Problem("3=", "3", "hard")]}, r"held_out\[0\]\.difficulty is 'hard'"),
        ({"demonstrations": [Demonstration("2=", "")]}, r"demonstrations\[0\]\.completion is empt"),
        ({"check": None}, "check is None; give a function"),
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0; it must be an integer above"),
        ({"max_completion_tokens": 8.0}, r"max_completion_tokens is 8\.0"),
        ({"max_completion_tokens": True}, "max_completion_tokens is True"),
        ({"held_out": [Problem("2=", "9")]}, r"problems\[1\] has the prompt '2=', which is held o"),
        (
            {"demonstrations": [Demonstration("3=", "#3")]},
            r"demonstrations\[0\] has the prompt '3=', which is held out",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused(changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(TaskError, match=expected):
        a_task(**changed)


# --- loading --------------------------------------------------------------------------------


def test_a_module_a_package_and_a_file_give_the_same_task(write: Write) -> None:
    file = write("kimisys_test_good.py", GOOD)
    write("kimisys_test_package/__init__.py", "")
    write("kimisys_test_package/good.py", GOOD)
    for spec in ("kimisys_test_good:task", "kimisys_test_package.good:task", f"{file}:task"):
        task = load_task(spec)
        assert task.held_out == [Problem("2+2=", "4")]
        assert task.problems[0].hint == "one hand"  # a user's own kind of problem
        assert task.check(task.problems[0], "2", True) == 1.0


def test_a_file_is_found_from_where_one_stands_and_shadows_nothing(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write("json.py", GOOD)
    monkeypatch.chdir(tmp_path)
    json = sys.modules["json"]
    assert load_task("./json.py:task") and load_task("json.py:task")
    assert sys.modules["json"] is json


def test_the_example_is_a_task_that_the_bundled_tokenizer_can_write() -> None:
    task = load_task(f"{EXAMPLES / 'my_task.py'}:task")
    assert (len(task.problems), len(task.held_out)) == (200, 40)
    encode = Tokenizer.arithmetic().encode
    right = []
    for problem in (*task.problems, *task.held_out):
        assert problem.answer == problem.prompt.rstrip("=")[::-1]
        assert len(encode("#" + problem.answer)) < task.max_completion_tokens
        assert encode(problem.prompt)
        assert problem.difficulty == len(problem.answer)
        assert task.check(problem, "#" + problem.answer, True) == 1.0
        assert task.check(problem, "#" + problem.answer, False) == 0.0
        assert task.check(problem, problem.answer, True) == 0.0
    for shown in task.demonstrations:
        problem = Problem(shown.prompt, shown.prompt.rstrip("=")[::-1])
        right.append(task.check(problem, shown.completion, True))
    assert 0.45 < sum(right) / len(right) < 0.65  # half, and the palindromes


def test_the_example_file_is_a_task() -> None:
    task = load_task(str(EXAMPLES / "problems.jsonl"))
    assert task.max_completion_tokens == FILE_COMPLETION_TOKENS == 256
    for shown in task.demonstrations:
        problem = next(p for p in task.problems if p.prompt == shown.prompt)
        assert task.check(problem, shown.completion, True) == 1.0
        assert Tokenizer.arithmetic().encode(shown.prompt + shown.completion)


def test_an_answer_that_could_never_be_right_is_refused(write: Write) -> None:
    path = write(
        "sharp.jsonl",
        '{"prompt": "a", "answer": "C#"}\n{"prompt": "b", "answer": "C", "split": "held_out"}',
    )
    assert "the answer 'C#' to 'a' holds '#'" in message(path)


@pytest.mark.parametrize(
    "spec", ["", "task", "my_task.py", ":task", "module:", "module:a b", "./module:task", ".m:task",
             "a..b:task", "my-task:task"]
)  # fmt: skip
def test_what_names_nothing_is_refused(spec: str) -> None:
    assert f"task {spec!r} names neither a function nor a file; write" in message(spec)


def test_a_missing_module_is_told_from_a_missing_import_inside_it(write: Write) -> None:
    write("kimisys_test_outer/__init__.py", "")
    missing = "there is no module 'kimisys_test_absent'; install it"
    assert missing in message("kimisys_test_absent:task")
    assert missing in message("kimisys_test_absent.inner:task")
    assert "no module 'kimisys_test_outer.inner'" in message("kimisys_test_outer.inner:task")

    path = write("kimisys_test_needs.py", "\n\nimport kimisys_test_absent.part\n")
    for spec in ("kimisys_test_needs:task", f"{path}:task"):
        told = message(spec)
        assert told.startswith("importing ") and "there is no module" not in told
        assert f'File "{path}", line 3' in told
        assert "ModuleNotFoundError: No module named 'kimisys_test_absent'" in told

    write("kimisys_test_wants.py", "from kimisys.trainer.task import Tusk")
    assert "ImportError: cannot import name 'Tusk'" in message("kimisys_test_wants:task")


def test_a_file_here_is_offered_when_the_module_is_missing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("kimisys_test_here.py", GOOD)
    monkeypatch.chdir(tmp_path)
    off_the_path = [entry for entry in sys.path if entry not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", off_the_path)
    assert "write ./kimisys_test_here.py:function" in message("kimisys_test_here:task")
    assert load_task("./kimisys_test_here.py:task")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'absent.py'} is not a file" in message(f"{tmp_path / 'absent.py'}:task")
    assert "absent.jsonl cannot be read" in message(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def task(:", "SyntaxError: "),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise ModuleNotFoundError('no name')", "ModuleNotFoundError: no name"),
    ],
)
def test_errors_while_importing_are_shown_with_their_place(
    write: Write, text: str, error: str
) -> None:
    path = write("kimisys_test_broken.py", f"\n{text}\n")
    for spec in ("kimisys_test_broken:task", f"{path}:task"):
        with pytest.raises(TaskError) as caught:
            load_task(spec)
        told = str(caught.value)
        assert told.startswith("importing ")
        assert f'File "{path}", line 2' in told and error in told
        assert type(caught.value.__cause__).__name__ == error.partition(":")[0]
    assert not [name for name in sys.modules if name.endswith("kimisys_test_broken")]


def test_errors_of_the_function_are_shown_with_their_place(write: Write) -> None:
    path = write("broken.py", GOOD + "\ndef other():\n    return {}['size']\n")
    told = message(f"{path}:other")
    assert told.startswith(f"calling other in {path} failed:\n")
    assert "return {}['size']" in told and "KeyError: 'size'" in told
    # a refused task speaks for itself
    path = write("refused.py", GOOD.replace("check, 8", "check, 0"))
    assert message(f"{path}:task").startswith("max_completion_tokens is 0")


def test_functions_that_do_not_fit_are_named(write: Write) -> None:
    path = write("fits.py", GOOD + "\nvalue = 3\ndef other():\n    return [1]\n")
    assert f"{path} has no function 'tusk'; its functions are check, task, other" in message(
        f"{path}:tusk"
    )
    assert "has no function 'value'" in message(f"{path}:value")
    assert "check in" in message(f"{path}:check")
    assert "must be callable without arguments: missing a required" in message(f"{path}:check")
    assert "other() in" in message(f"{path}:other")
    assert "returned list; it must return a kimisys.trainer.task.Task" in message(f"{path}:other")
    assert "it defines no function" in message(f"{write('empty.py', '')}:task")
