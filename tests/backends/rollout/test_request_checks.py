"""Tests of requests that are refused before anything is computed."""

from __future__ import annotations

from typing import Protocol

import pytest
from transformers import PreTrainedModel

from lightrft.backends.rollout.request_checks import check_request
from lightrft.errors import ConfigError, DataError
from lightrft.strategy.protocols import SamplingParams


class BuildTinyModel(Protocol):
    def __call__(self, model_type: str, **overrides: object) -> PreTrainedModel: ...


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "words"),
    [
        ([[1], []], {}, DataError, r"prompts\[1\]=\[\] is empty"),
        ([[1], [2], [61]], {}, DataError, r"prompts\[2\] has token 61.*vocabulary of 61"),
        ([[1, -1]], {}, DataError, r"prompts\[0\] has token -1"),
        ([[1], [1] * 64], {}, DataError, r"prompts\[1\] has 64 tokens.*max_position_embeddings\(64\)"),
        ([[1], [1] * 60], {"max_new_tokens": 5}, ConfigError, r"max_new_tokens=5 .*60 tokens.*64\); use at most 4"),
        ([[1]], {"stop_token_ids": (3, 99)}, ConfigError, r"stop_token_ids=\(3, 99\) has \[99\]"),
        ([[1]], {"min_new_tokens": 5}, ConfigError, r"min_new_tokens=5 is more than max_new_tokens\(4\)"),
    ],
)
def test_impossible_requests_are_refused(
    tiny_model: BuildTinyModel,
    prompts: list[list[int]],
    settings: dict[str, object],
    error: type[Exception],
    words: str,
) -> None:
    """Each impossible request is refused with the number that is wrong and the one that it is at odds with."""
    params = SamplingParams(**{"max_new_tokens": 4, **settings})
    with pytest.raises(error, match=words):
        check_request(tiny_model("llama"), prompts, params, range(len(prompts)))


def test_numbers_must_match_the_prompts(tiny_model: BuildTinyModel) -> None:
    """Two numbers for one prompt are refused."""
    with pytest.raises(DataError, match="2 numbers for 1 prompts"):
        check_request(tiny_model("llama"), [[1]], SamplingParams(max_new_tokens=4), [0, 1])


def test_what_fits_exactly_is_accepted(tiny_model: BuildTinyModel) -> None:
    """A prompt and its new tokens may fill the context to the last position."""
    check_request(tiny_model("llama"), [[1] * 60], SamplingParams(max_new_tokens=4, min_new_tokens=4), [0])


def test_models_without_positions_have_no_limit(tiny_model: BuildTinyModel) -> None:
    """A model that states no context size takes any length."""
    model = tiny_model("bloom", n_head=4, n_layer=1)
    del model.config.max_position_embeddings  # the fixture gives it to every model; Bloom's own config has none
    check_request(model, [[1] * 600], SamplingParams(max_new_tokens=400), [0])
