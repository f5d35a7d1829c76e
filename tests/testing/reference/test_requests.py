"""What is found wrong with completions."""

from __future__ import annotations

import math

import attrs
import pytest

from lightrft.strategy import Completion, Prompt, SamplingParams
from lightrft.testing.reference.requests import completions_problem

PROMPTS = [Prompt(token_ids=(1, 2)), Prompt(token_ids=(3,))]
SAMPLING = SamplingParams(n=2, max_new_tokens=2, stop_token_ids=(0,))


def completion(prompt: Prompt, sample_index: int) -> Completion:
    return Completion(
        prompt_ids=prompt.token_ids,
        token_ids=(5, 0),
        logprobs=(-1.0, 0.0),
        finish_reason="stop",
        weight_version=3,
        sample_index=sample_index,
    )


RIGHT = [completion(prompt, sample) for prompt in PROMPTS for sample in range(2)]


def problem_of(completions: list[Completion], sampling: SamplingParams = SAMPLING) -> str | None:
    return completions_problem(completions, PROMPTS, sampling, weight_version=3)


def test_right_completions_have_no_problem() -> None:
    """What matches the request is right, and no completions are right for no prompts."""
    assert problem_of(RIGHT) is None
    assert completions_problem([], [], SAMPLING, weight_version=0) is None


def test_a_completion_may_end_at_the_limit() -> None:
    """Without a stop token a completion has exactly max_new_tokens tokens."""
    long = attrs.evolve(RIGHT[0], token_ids=(5, 6), finish_reason="length")
    assert problem_of([long, *RIGHT[1:]]) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_ids": (3,)}, "is of the prompt"),
        ({"sample_index": 1}, "sample_index=1"),
        ({"weight_version": 2}, "weight_version=2"),
        ({"token_ids": (5, 6, 0), "logprobs": (-1.0,) * 3}, "has 3 tokens"),
        ({"token_ids": (), "logprobs": ()}, "has 0 tokens"),
        ({"logprobs": (-1.0,)}, "has 1 logprobs and 2 tokens"),
        ({"logprobs": (-1.0, math.nan)}, "no logarithms of probabilities"),
        ({"logprobs": (-1.0, 0.1)}, "no logarithms of probabilities"),
        ({"token_ids": (0, 5), "finish_reason": "length"}, "goes on after the stop token at 0"),
        ({"finish_reason": "length"}, "must have 'stop'"),
        ({"token_ids": (5, 6)}, "must have 'length'"),
        ({"token_ids": (5,), "logprobs": (-1.0,), "finish_reason": "length"}, "after 1 of 2 tokens"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, object], words: str) -> None:
    """Each thing that can be wrong with a completion is named with its index."""
    assert words in str(problem_of([attrs.evolve(RIGHT[0], **change), *RIGHT[1:]]))
    assert str(problem_of([RIGHT[0], attrs.evolve(RIGHT[1], **change | {"sample_index": 9}), *RIGHT[2:]])).startswith(
        "completions[1]"
    )


@pytest.mark.parametrize("completions", [RIGHT[::-1], RIGHT[2:] + RIGHT[:2], [RIGHT[0], RIGHT[0], *RIGHT[2:]]])
def test_order_counts(completions: list[Completion]) -> None:
    """Completions of the right number in the wrong order are wrong."""
    assert problem_of(completions) is not None


def test_the_number_counts() -> None:
    """Each of n completions of each prompt must be there."""
    assert "1 completions came for 2 prompts x n=2, which is 4" in str(problem_of(RIGHT[:1]))


def test_a_completion_has_at_least_min_new_tokens() -> None:
    """A stop token does not end a completion before min_new_tokens."""
    short = [attrs.evolve(right, token_ids=(0,), logprobs=(0.0,)) for right in RIGHT]
    assert problem_of(short) is None
    assert "must have 2 to 2" in str(problem_of(short, attrs.evolve(SAMPLING, min_new_tokens=2)))
