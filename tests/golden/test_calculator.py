"""Expressions a model may send to the calculator, and nanochat's answers."""
import pytest

from nanochat.engine import use_calculator
from tests.golden.exceptions import EXCEPTIONS
from tests.golden.fixtures import load

CASES = load("calculator")["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["expr"]))
def test_answer_and_its_type(case):
    if ("calculator", case["expr"]) in EXCEPTIONS:
        assert use_calculator(case["expr"]) is None
        return
    answer = use_calculator(case["expr"])
    if case["result"] is None:
        assert answer is None
    else:
        assert (str(answer), type(answer).__name__) == (case["result"], case["type"])
