"""Generating on all ranks at once: each makes the completions of its own prompts as one process would make them."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from lightrft import errors
from lightrft.errors import LightRFTError
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
    completions that never come.

    Args:
        collectives: what the ranks do together.
        engine_generate_local: generates on one rank.
    """

    def gather_and_generate(
        engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Completion]:
        before = _prompts_before(collectives, prompts)
        numbered = attrs.evolve(sampling, first_prompt=sampling.first_prompt + before)
        completions: list[Completion] = []
        failure: LightRFTError | None = None
        try:
            completions = engine_generate_local(engine, prompts, numbered)
        except LightRFTError as error:
            failure = error
        _raise_together(collectives, failure)
        return completions

    return gather_and_generate


def _prompts_before(collectives: Collectives, prompts: Sequence[Prompt]) -> int:
    """Return how many prompts the ranks before this one have."""
    every = collectives.all_gather(torch.tensor(len(prompts)))
    return int(every[: collectives.get_rank()].sum())


def _raise_together(collectives: Collectives, failure: LightRFTError | None) -> None:
    words = "" if failure is None else f"{type(failure).__name__} {failure}"
    line = torch.tensor(list(words.encode()), dtype=torch.uint8)
    every = collectives.all_gather({"length": torch.tensor(len(line)), "line": line})
    if not every["line"].numel():
        return
    rank = int(every["length"].nonzero()[0])
    first = every["line"][: int(every["length"][rank])]
    name, _, message = bytes(first.tolist()).decode().partition(" ")
    kind: type[LightRFTError] = getattr(errors, name, LightRFTError)  # an engine may have an error type of its own
    raise kind(f"rank {rank}: {message}") from failure
