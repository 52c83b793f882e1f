"""Expressions a model may send to the calculator, and nanochat's answers."""
import pytest

from nanochat.engine import use_calculator
from tests.golden.exceptions import EXCEPTIONS, INERT
from tests.golden.fixtures import load

CASES = load("calculator")["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["expr"]))
def test_answer_and_its_type(case):
    if reason := EXCEPTIONS.get(("calculator", case["expr"])):
        word, _, letter = case["expr"].split("'")[1:4] if reason is INERT else ("", "", "")
        assert use_calculator(case["expr"]) == (word.count(letter) if reason is INERT else None)
        return
    answer = use_calculator(case["expr"])
    if case["result"] is None:
        assert answer is None
    else:
        assert (str(answer), type(answer).__name__) == (case["result"], case["type"])
