"""Generating on all ranks at once: each makes the completions of its own prompts as one process would make them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import attrs
import torch

from lightrft import errors
from lightrft.backends.rollout.apart.mending import mend, stream_along
from lightrft.errors import EngineCrashError, LightRFTError
from lightrft.strategy.protocols.collectives import Collectives
from lightrft.strategy.protocols.rollout import (
    Completion,
    EngineGenerateLocal,
    EngineHandle,
    GatherAndGenerate,
    Prompt,
    SamplingParams,
)

__all__ = ["build_gather_and_generate"]


def build_gather_and_generate(
    collectives: Collectives, engine_generate_local: EngineGenerateLocal
) -> GatherAndGenerate:
    """Return `gather_and_generate` of ranks that have an engine each.

    A draw is by the place of a prompt among the prompts of all ranks, so no prompt has to travel, nor any image: a
    number does. What one rank refuses is refused on all of them, with the rank's number, and nobody waits for
    completions that never come. Where one has lost its engine, all ranks stream the weights that it is started again
    with.

    Args:
        collectives: what the ranks do together.
        engine_generate_local: generates on one rank.
    """

    def tried(
        engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams, *, lost: EngineCrashError | None
    ) -> tuple[list[Completion], LightRFTError | None]:
        try:
            if lost is not None:
                mend(engine, lost)
            return engine_generate_local(engine, prompts, sampling), None
        except LightRFTError as error:
            return [], error

    def gather_and_generate(
        engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Completion]:
        before = _prompts_before(collectives, prompts)
        numbered = attrs.evolve(sampling, first_prompt=sampling.first_prompt + before)
        completions, failure = tried(engine, prompts, numbered, lost=None)
        words = _gather_words(collectives, failure)
        if _are_crashes(words):
            if isinstance(failure, EngineCrashError):
                completions, failure = tried(engine, prompts, numbered, lost=failure)
            else:
                stream_along(engine)
            words = _gather_words(collectives, failure)
        _raise_first(words, failure)
        return completions

    return gather_and_generate


def _prompts_before(collectives: Collectives, prompts: Sequence[Prompt]) -> int:
    """Return how many prompts the ranks before this one have."""
    every = collectives.all_gather(torch.tensor(len(prompts)))
    return int(every[: collectives.get_rank()].sum())


def _gather_words(collectives: Collectives, failure: LightRFTError | None) -> list[tuple[str, str]]:
    """Return type and message of what each rank raised, in rank order; of one that raised nothing both are empty."""
    words = "" if failure is None else f"{type(failure).__name__} {failure}"
    line = torch.tensor(list(words.encode()), dtype=torch.uint8)
    every = collectives.all_gather({"length": torch.tensor(len(line)), "line": line})
    text, lengths = bytes(every["line"].tolist()), every["length"].tolist()
    lines = [text[end - length : end] for end, length in zip(accumulate(lengths), lengths, strict=True)]
    parts = [line.decode().partition(" ") for line in lines]
    return [(name, message) for name, _, message in parts]


def _are_crashes(words: Sequence[tuple[str, str]]) -> bool:
    """Return whether engines were lost, and nothing else is wrong."""
    return {name for name, _ in words if name} == {EngineCrashError.__name__}


def _raise_first(words: Sequence[tuple[str, str]], failure: LightRFTError | None) -> None:
    failed = [rank for rank, (name, _) in enumerate(words) if name]
    if not failed:
        return
    rank = failed[0]
    name, message = words[rank]
    kind: type[LightRFTError] = getattr(errors, name, LightRFTError)  # an engine may have an error type of its own
    raise kind(f"rank {rank}: {message}") from failure
