"""Refuses requests that a model cannot fulfil, before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from lightrft.errors import ConfigError, DataError, UnsupportedError
from lightrft.models.context import context_size, known_vocabulary_size
from lightrft.models.images import placeholders_of
from lightrft.strategy.protocols.capabilities import Capabilities
from lightrft.strategy.protocols.images import Processor
from lightrft.strategy.protocols.rollout import EngineSource, Prompt, SamplingParams

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "RequestLimits",
    "check_processor",
    "check_request",
    "check_taken",
    "check_within",
    "limits_of",
    "placeholders",
]


@attrs.frozen(kw_only=True)
class RequestLimits:
    """What a model can take.

    Attributes:
        vocabulary_size: number of token ids; None for a model that does not tell.
        context_size: tokens of prompt and completion together; None for a model that states no limit.
    """

    vocabulary_size: int | None
    context_size: int | None


def limits_of(model: nn.Module) -> RequestLimits:
    """Return what a model can take.

    Args:
        model: a causal language model.
    """
    return RequestLimits(vocabulary_size=known_vocabulary_size(model), context_size=context_size(model))


def check_processor(source: EngineSource) -> None:
    """Refuse a processor of another model than the one that an engine is started from.

    Args:
        source: what an engine is started from.

    Raises:
        UnsupportedError: the model takes no images.
    """
    if source.processor is not None and "pixel_values" not in inspect.signature(source.model.forward).parameters:
        raise UnsupportedError(
            f"processor={type(source.processor).__name__} reads images and model={type(source.model).__name__} takes "
            "none; leave processor= out."
        )


def placeholders(processor: Processor | None) -> tuple[int, ...]:
    """Return the token ids that stand for images or videos, which no completion may have.

    Args:
        processor: of the model, if it takes them.
    """
    return tuple(placeholders_of(processor))


def check_taken(prompts: Sequence[Prompt], *, engine: str, takes: Capabilities) -> None:
    """Raise unless an engine takes what prompts have.

    Args:
        prompts: any number of prompts.
        engine: its name.
        takes: what it claims.

    Raises:
        UnsupportedError: a prompt has images or videos, and the engine takes none.
    """
    for index, prompt in enumerate(prompts):
        for kind, seen in (("images", prompt.images), ("videos", prompt.videos)):
            if seen and kind not in takes:
                raise UnsupportedError(
                    f"prompts[{index}] has {kind} and the engine {engine!r} takes none; leave them out."
                )


def check_request(
    model: nn.Module, prompts: Sequence[Sequence[int]], params: SamplingParams, prompt_indices: Sequence[int]
) -> None:
    """Raise unless the model can make these completions.

    Args:
        model: a causal language model; one that does not tell its vocabulary or context is not held to them.
        prompts: token ids of each prompt.
        params: how tokens are drawn.
        prompt_indices: the number of each prompt.

    Raises:
        DataError: about a prompt, whose position is named, or about the numbers.
        ConfigError: about the parameters.
    """
    if len(prompt_indices) != len(prompts):
        raise DataError(
            f"prompt_indices has {len(prompt_indices)} numbers for {len(prompts)} prompts; give one for each."
        )
    check_within(limits_of(model), prompts, params)


def check_within(limits: RequestLimits, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
    """Raise unless a model can make these completions, for an engine that keeps its limits and not the model.

    Args:
        limits: what the model can take.
        prompts: token ids of each prompt.
        params: how tokens are drawn.

    Raises:
        DataError: about a prompt, whose position is named.
        ConfigError: about the parameters.
    """
    _check_present(prompts, params)
    if limits.vocabulary_size is not None:
        _check_tokens(prompts, params, limits.vocabulary_size)
    if limits.context_size is not None:
        _check_context(prompts, params, limits.context_size)


def _check_present(prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompts[{index}]={list(prompt)!r} is empty; give it at least one token.")
    if params.min_new_tokens > params.max_new_tokens:
        raise ConfigError(
            f"min_new_tokens={params.min_new_tokens!r} is more than max_new_tokens({params.max_new_tokens}); lower it."
        )


def _check_tokens(prompts: Sequence[Sequence[int]], params: SamplingParams, vocabulary_size: int) -> None:
    for index, prompt in enumerate(prompts):
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocabulary_size:
                raise DataError(
                    f"prompts[{index}] has token {token}, which is not in the model's vocabulary of {vocabulary_size}; "
                    "use the tokenizer of this model."
                )
    unknown = [token for token in params.stop_token_ids if not 0 <= token < vocabulary_size]
    if unknown:
        raise ConfigError(
            f"stop_token_ids={params.stop_token_ids!r} has {unknown}, not in the model's vocabulary of "
            f"{vocabulary_size}; use the tokenizer of this model."
        )


def _check_context(prompts: Sequence[Sequence[int]], params: SamplingParams, limit: int) -> None:
    for index, prompt in enumerate(prompts):
        room = limit - len(prompt)
        if room < 1:
            raise DataError(
                f"prompts[{index}] has {len(prompt)} tokens, which leaves no room in "
                f"max_position_embeddings({limit}); shorten it to {limit - 1} or less."
            )
        if room < params.max_new_tokens:
            raise ConfigError(
                f"max_new_tokens={params.max_new_tokens!r} does not fit after prompts[{index}] of {len(prompt)} tokens "
                f"in max_position_embeddings({limit}); use at most {room}."
            )
