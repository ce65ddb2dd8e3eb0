"""Problem files: the format, the split, and errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kimisys.trainer.problem import Demonstration, Problem, TaskError
from kimisys.trainer.problem_file import ProblemFile, read_problems

EXAMPLE = Path(__file__).parents[2] / "examples/problems.jsonl"
KNOWN_HELD_OUT = ["7+7=", "9+9=", "11+11="]


def read(tmp_path: Path, *lines: object) -> ProblemFile:
    """Read a file of `lines`: texts as they are, anything else as JSON."""
    path = tmp_path / "problems.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return read_problems(path)


def question(prompt: str, **more: object) -> dict[str, object]:
    return {"prompt": prompt, "answer": "1", **more}


def test_the_example_reads_as_it_is_written() -> None:
    file = read_problems(EXAMPLE)
    assert (len(file.problems), len(file.held_out), len(file.demonstrations)) == (15, 5, 9)
    assert file.problems[7] == Problem("18+45=", "63", difficulty=1.0)
    assert file.demonstrations[7] == Demonstration("18+45=", "8+5=13,1+4=5+1=6#63")
    assert file.held_out[0] == Problem("3+4=", "7")
    for problem in (*file.problems, *file.held_out):
        first, second = problem.prompt.rstrip("=").split("+")
        assert int(problem.answer) == int(first) + int(second)


def test_lines_that_say_nothing_are_trained_on_if_another_is_held_out(tmp_path: Path) -> None:
    lines = [question(f"{i}=") for i in range(100)]
    file = read(tmp_path, *lines, question("x", split="held_out", completion="not shown"))
    assert [problem.prompt for problem in file.problems] == [f"{i}=" for i in range(100)]
    assert [problem.prompt for problem in file.held_out] == ["x"]
    assert file.demonstrations == ()


def test_else_a_hash_of_the_prompt_holds_out_one_in_ten(tmp_path: Path) -> None:
    lines = [question(f"{i}+{i}=", completion="c") for i in range(3000)]
    file = read(tmp_path, *lines)
    held_out = {problem.prompt for problem in file.held_out}
    assert len(held_out) / 3000 == pytest.approx(0.1, abs=0.02)
    assert not held_out & {problem.prompt for problem in file.problems}
    assert not held_out & {shown.prompt for shown in file.demonstrations}
    assert [problem.prompt for problem in file.held_out[:3]] == KNOWN_HELD_OUT
    # neither the order nor the other lines nor the answer move a prompt
    fewer = read(tmp_path, *[{**line, "answer": "2"} for line in reversed(lines[:500])])
    assert {problem.prompt for problem in fewer.held_out} == held_out & {
        str(line["prompt"]) for line in lines[:500]
    }
    # what is marked as training data stays it
    marked = read(tmp_path, *[{**line, "split": "train"} for line in lines[:500]], *lines[500:])
    assert {problem.prompt for problem in marked.held_out} == held_out - {
        str(line["prompt"]) for line in lines[:500]
    }


def test_unusual_texts_are_kept_as_they_are(tmp_path: Path) -> None:
    prompt = "Grüße\u2028\u0085und\nmehr\r\x1e "
    held_out = question("x", split="held_out")
    line = json.dumps(question(prompt), ensure_ascii=False)
    file = read(tmp_path, "", "\ufeff" + line, "  ", held_out)
    assert file.problems == (Problem(prompt, "1"),)
    windows = tmp_path / "windows.jsonl"
    windows.write_bytes((line + "\r\n" + json.dumps(held_out) + "\r\n").encode())
    assert read_problems(windows).problems == (Problem(prompt, "1"),)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "not a line of JSON"),
        ("[1]", "not an object"),
        pytest.param("[" * 100_000, "not a line of JSON", id="deep"),
        ({"answer": "1"}, "prompt is missing"),
        ({"prompt": "1="}, "answer is missing"),
        ({"prompt": "1=", "answer": 1}, "answer is 1; it must be a text"),
        (question(" "), "prompt is ' '"),
        ({"prompt": "1=", "answer": ""}, "answer is ''"),
        (question("1=", completion=None), "completion is None"),
        (question("1=", dificulty=1), "unknown field 'dificulty'; a problem has prompt, answer"),
        (question("1=", difficulty="hard"), "difficulty is 'hard'; it must be a finite number"),
        (question("1=", difficulty=True), "difficulty is True"),
        (question("1=", difficulty=None), "difficulty is None"),
        (question("1=", difficulty=float("nan")), "difficulty is nan"),
        pytest.param(question("1=", difficulty=10**400), "difficulty is 1000", id="huge"),
        (question("1=", split="test"), 'split is \'test\'; it is "train" or "held_out"'),
        (question("a"), r"the prompt 'a' is that of .*problems\.jsonl:1; keep one"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, bad: object, message: str) -> None:
    lines = [question("a"), question("b", split="held_out")]
    with pytest.raises(TaskError, match=rf"problems\.jsonl:4: {message}"):
        read(tmp_path, *lines, "", bad)
    assert len(read(tmp_path, *lines).problems) == 1


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"missing\.jsonl cannot be read: No such file"):
        read_problems(tmp_path / "missing.jsonl")
    with pytest.raises(TaskError, match="cannot be read: Is a directory"):
        read_problems(tmp_path)
    with pytest.raises(TaskError, match="has 0 problems, but none in its train split"):
        read(tmp_path, "")
    with pytest.raises(TaskError, match=r'none in its held_out split; .*"split": "held_out"'):
        read(tmp_path, question("a", split="train"))
    with pytest.raises(TaskError, match="has 1 problems, but none in its train split"):
        read(tmp_path, question("a", split="held_out"))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "a", "answer": "1"}\n{"prompt": "\xe4", "answer": "1"}\n')
    with pytest.raises(TaskError, match=r"latin\.jsonl:2: not a line of JSON in UTF-8"):
        read_problems(latin)
