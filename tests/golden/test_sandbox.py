"""Programs and what nanochat's sandbox makes of them. The wording of an error is that of Python 3.11."""
import sys

import pytest

from nanochat.execution import execute_code
from tests.golden.fixtures import load

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")


@pytest.mark.parametrize("case", load("sandbox")["cases"], ids=lambda case: case["name"])
def test_outcome(case):
    result = execute_code(case["code"], **case["arguments"])
    assert (result.success, result.stdout, result.timeout, result.memory_exceeded) == (
        case["success"], case["stdout"], case["timeout"], case["memory_exceeded"])
    assert (result.stderr == "") == case["stderr_empty"]
    assert ("Traceback (most recent call last)" in result.stderr) == case["stderr_has_traceback"]
    if case["error"] == "(any text)":
        assert result.error
    elif sys.version_info[:2] == (3, 11) or case["error"] is None:
        assert result.error == case["error"]
    else:
        assert result.error.split(":")[0] == case["error"].split(":")[0]
