"""Generating on all ranks at once: each makes the completions of its own prompts as one process would make them."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from lightrft.backends.rollout.apart.mending import mend, stream_along
from lightrft.errors import EngineCrashError
from lightrft.failures import raise_together
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
    number does. What one rank cannot do is raised on all of them, with the rank's number, and nobody waits for
    completions that never come. Where one has lost its engine, all ranks stream the weights that it is started again
    with.

    Args:
        collectives: what the ranks do together.
        engine_generate_local: generates on one rank.
    """

    def tried(
        engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams, *, lost: EngineCrashError | None
    ) -> tuple[list[Completion], Exception | None]:
        try:
            if lost is not None:
                mend(engine, lost)
            return engine_generate_local(engine, prompts, sampling), None
        except Exception as error:  # noqa: BLE001 (it is raised on all ranks)
            return [], error

    def gather_and_generate(
        engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Completion]:
        before = _prompts_before(collectives, prompts)
        numbered = attrs.evolve(sampling, first_prompt=sampling.first_prompt + before)
        completions, failure = tried(engine, prompts, numbered, lost=None)
        try:
            raise_together(collectives, failure)
        except EngineCrashError:
            if isinstance(failure, EngineCrashError):
                completions, failure = tried(engine, prompts, numbered, lost=failure)
            else:
                stream_along(engine)
            raise_together(collectives, failure)
        return completions

    return gather_and_generate


def _prompts_before(collectives: Collectives, prompts: Sequence[Prompt]) -> int:
    """Return how many prompts the ranks before this one have."""
    every = collectives.all_gather(torch.tensor(len(prompts)))
    return int(every[: collectives.get_rank()].sum())
