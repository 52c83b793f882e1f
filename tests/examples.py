"""How many examples a property test is tried with."""
import os


def examples(most: int) -> int:
    """All, or in the fast suite a third of them: the same ones in every run (conftest.py), so that what they find is found by --slow."""
    return max(2, most // 3) if os.environ.get("NANOCHAT_TESTS_FAST") else most
