"""The checker of problem files: what is behind the last marker counts."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimisys.rewards.final_answer import check


@dataclass(frozen=True)
class Question:
    answer: str


@pytest.mark.parametrize(
    "completion",
    [
        pytest.param("46", id="the answer alone"),
        pytest.param(" 46\n", id="white space around it"),
        pytest.param("2+4=6,1+3=4#46", id="one marker"),
        pytest.param("2+4=6, 1+3=4\n#### 46", id="four markers"),
        pytest.param("#45#46", id="the last of two"),
        pytest.param("#46 ", id="space behind"),
    ],
)
def test_right_answers(completion: str) -> None:
    assert check(Question("46"), completion, True) == 1.0
    assert check(Question(" 46 "), completion, True) == 1.0
    assert check(Question("46"), completion, False) == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        pytest.param("", id="nothing"),
        pytest.param("the answer is 46", id="prose without a marker"),
        pytest.param("46#", id="before the marker"),
        pytest.param("#46#47", id="the first of two"),
        pytest.param("#046", id="leading zero"),
        pytest.param("#4 6", id="space inside"),
        pytest.param("#46.", id="full stop"),
    ],
)
def test_wrong_answers(completion: str) -> None:
    assert check(Question("46"), completion, True) == 0.0


@settings(deadline=None)
@given(st.text(alphabet="46#, \n", max_size=10))
def test_agrees_with_the_definition(completion: str) -> None:
    last = completion.split("#")[-1]
    assert check(Question("46"), completion, True) == float(last.strip() == "46")
