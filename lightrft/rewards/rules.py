"""Rewards that follow a rule."""

from __future__ import annotations

__all__ = ["exact_match"]


def exact_match(prompt: str, completion: str, answer: str) -> float:
    r"""Return 1.0 if the completion is the answer, apart from white space around both, and else 0.0.

    Args:
        prompt: plays no part.
        completion: what the model wrote.
        answer: the reference answer.

    Example:
        >>> exact_match("1+1=", " 2\n", "2")
        1.0
    """
    del prompt
    return float(completion.strip() == answer.strip())
