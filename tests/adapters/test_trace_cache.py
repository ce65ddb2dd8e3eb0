"""A cache that never gives a stale or torn answer, and can be turned off."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimisys.adapters import trace_cache
from kimisys.adapters.trace_cache import asked, cached


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(trace_cache.SWITCH, raising=False)
    return tmp_path / "kimisys"


class Framework:
    """Counts how often it was asked."""

    def __init__(self, answer: str = "answer") -> None:
        self.asked = 0
        self.answer = answer

    def ask(self) -> str:
        self.asked += 1
        return self.answer

    def get(self, **key: object) -> str:
        return cached("test", key, self.ask, str.encode, bytes.decode)


def test_one_key_is_asked_once_and_another_again(home: Path) -> None:
    framework = Framework()
    assert [framework.get(a=1, b=[2]) for _ in range(3)] == ["answer"] * 3
    assert framework.asked == 1
    assert framework.get(b=[2], a=1) == "answer" and framework.asked == 1
    framework.get(a=1, b=[3])
    assert framework.asked == 2 and len(list(home.iterdir())) == 2
    assert (home.stat().st_mode & 0o777) == 0o700


def test_off_is_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trace_cache.SWITCH, "off")
    framework = Framework()
    framework.get(a=1), framework.get(a=1)
    assert framework.asked == 2 and not home.exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_made_anew(home: Path, data: st.DataObject) -> None:
    framework = Framework()
    framework.get(a=1)
    (file,) = home.iterdir()
    whole = file.read_bytes()
    if data.draw(st.booleans()):
        broken = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
        broken = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    file.write_bytes(broken)
    changed = Framework("new")
    assert changed.get(a=1) == "new" and changed.asked == 1
    assert changed.get(a=1) == "new" and changed.asked == 1
    file.unlink()


def test_a_file_under_another_s_name_is_not_taken(home: Path) -> None:
    Framework("first").get(a=1)
    (first,) = home.iterdir()
    Framework("second").get(a=2)
    (second,) = set(home.iterdir()) - {first}
    os.replace(first, second)
    assert Framework("anew").get(a=2) == "anew"


def test_what_the_reader_refuses_is_made_anew(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: bytes) -> str:
        raise ValueError("not mine")

    Framework().get(a=1)
    with caplog.at_level(logging.WARNING):
        assert cached("test", {"a": 1}, lambda: "new", str.encode, refuse) == "new"
    assert "not mine" in caplog.text
    assert Framework().get(a=1) == "new"


def test_the_least_recently_used_go_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Framework("x" * 100).get(n=0)
    (first,) = home.iterdir()
    monkeypatch.setattr(trace_cache, "LIMIT", 3 * first.stat().st_size)
    for n in (1, 2):
        Framework("x" * 100).get(n=n)
    for age, file in enumerate(sorted(home.iterdir())):
        os.utime(file, (age, age))
    used = Framework()
    assert used.get(n=0) == "x" * 100
    Framework("x" * 100).get(n=3)
    assert first.exists() and len(list(home.iterdir())) == 3
    Framework("x" * 1000).get(n=4)
    assert len(list(home.iterdir())) == 3, "what is larger than all together is not kept"


def test_a_folder_that_cannot_be_written_costs_time_only(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home.write_text("in the way")
    framework = Framework()
    assert [framework.get(a=1) for _ in range(2)] == ["answer"] * 2
    assert framework.asked == 2 and "not kept" in caplog.text


def test_writers_at_once_leave_one_whole_answer(home: Path) -> None:
    frameworks = [Framework(str(n) * 100_000) for n in range(8)]
    threads = [threading.Thread(target=f.get, kwargs={"a": 1}) for f in frameworks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = Framework()
    assert last.get(a=1) in {f.answer for f in frameworks} and last.asked == 0
    assert len(list(home.iterdir())) == 1


def test_another_version_and_other_code_are_other_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = asked(["numpy"], ["adapters/vllm"])
    assert before == asked(["numpy"], ["adapters/vllm"])
    assert before != asked(["numpy"], ["adapters/megatron"])
    monkeypatch.setattr(trace_cache, "version", lambda name: "0.0")
    assert before != asked(["numpy"], ["adapters/vllm"])
    monkeypatch.undo()
    for room in ("reshard", "adapters/vllm"):
        (tmp_path / room).mkdir(parents=True)
        (tmp_path / room / "x.py").write_text("1")
    (tmp_path / "adapters/trace_cache.py").write_text("1")
    monkeypatch.setattr(trace_cache, "_PACKAGE", tmp_path)
    first = asked(["numpy"], ["adapters/vllm"])
    (tmp_path / "adapters/vllm/x.py").write_text("2")
    second = asked(["numpy"], ["adapters/vllm"])
    assert second["code"] != first["code"]
    (tmp_path / "_core.abi3.so").write_bytes(b"1")
    assert asked(["numpy"], ["adapters/vllm"])["code"] != second["code"]


def test_a_user_without_a_home_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    framework = Framework()
    assert [framework.get(a=1) for _ in range(2)] == ["answer"] * 2
    assert framework.asked == 2 and "set XDG_CACHE_HOME" in caplog.text


def test_a_configuration_may_hold_infinity() -> None:
    """As some state-space models' do (`time_step_limit`)."""
    framework = Framework()
    assert framework.get(limit=[0.0, float("inf")]) == framework.get(limit=[0.0, float("inf")])
    assert framework.asked == 1
