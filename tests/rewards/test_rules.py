from __future__ import annotations

import pytest

from lightrft.rewards.rules import exact_match


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [("42", "42", 1.0), (" 42\n", "42", 1.0), ("42", " 42", 1.0), ("4 2", "42", 0.0), ("a", "A", 0.0), ("", "42", 0.0)],
)
def test_exact_match_compares_but_for_white_space_around(completion: str, answer: str, expected: float) -> None:
    """White space around either plays no part; white space inside and case do; the prompt does not."""
    assert exact_match(answer, completion, answer) == expected
