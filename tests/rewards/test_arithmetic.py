"""The strict checker against everything a policy might try."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimisys.rewards.arithmetic import check


@dataclass(frozen=True)
class Question:
    answer: str


RIGHT = "3+7=10,8+6=14+1=15,5+7=12+1=13#1350"


@pytest.mark.parametrize("completion", [RIGHT, "#1350", "nonsense#1350"])
def test_the_answer_behind_the_marker_counts(completion: str) -> None:
    assert check(Question("1350"), completion, finished=True) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        pytest.param("", id="nothing"),
        pytest.param("1350", id="no marker"),
        pytest.param("3+7=10,8+6=14+1=15,5+7=12+1=13=1350", id="another marker"),
        pytest.param("3+7=10,5+7=1350", id="answer in the scratchpad only"),
        pytest.param("1350#", id="answer before the marker"),
        pytest.param("1350#1240", id="right in the scratchpad, wrong as the answer"),
        pytest.param("#1240", id="wrong"),
        pytest.param("#1240#1350", id="two answers, the last right"),
        pytest.param("#1350#1240", id="two answers, the first right"),
        pytest.param("#1350#1350", id="twice the right answer"),
        pytest.param("#1350#", id="a marker behind"),
        pytest.param("##1350", id="two markers"),
        pytest.param("#01350", id="leading zero"),
        pytest.param("#13500", id="one digit more"),
        pytest.param("#135", id="one digit less"),
        pytest.param("#+1350", id="sign"),
        pytest.param("# 1350", id="space before"),
        pytest.param("#1350 ", id="space behind"),
        pytest.param("#1350\n", id="newline behind"),
        pytest.param("#1350,", id="comma behind"),
        pytest.param("#1350=1350", id="an equation"),
        pytest.param("#1350.0", id="decimal"),
        pytest.param("#1,350", id="thousands separator"),
        pytest.param("#1350<pad>", id="pad behind"),
        pytest.param("#13<pad>50", id="pad inside"),
        pytest.param("#1350<eos>", id="a second <eos>"),
        pytest.param("#\u0661\u0663\u0665\u0660", id="digits of another script"),
        pytest.param("\uff031350", id="a marker look-alike"),
    ],
)
def test_near_misses_are_worth_nothing(completion: str) -> None:
    assert check(Question("1350"), completion, finished=True) == 0.0


def test_what_was_cut_off_is_worth_nothing() -> None:
    assert check(Question("1350"), RIGHT, finished=False) == 0.0


@settings(deadline=None)
@given(st.text(alphabet="0123456789+=,#", max_size=12))
def test_only_one_suffix_is_accepted(completion: str) -> None:
    right = completion.endswith("#42") and completion.count("#") == 1
    assert check(Question("42"), completion, finished=True) == float(right)
    assert check(Question("42"), completion, finished=False) == 0.0
