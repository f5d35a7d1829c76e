"""A rollout that is made ahead: in a thread of its own, while the policy learns from the one before.

The thread generates and does nothing else. What ranks do together, what users bring (rewards), and every draw of a
stream of the process stays on the caller's thread, before and after; so what comes out is by the schedule alone, and
never by which of the two was faster.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Protocol

import attrs
from torch import nn

from lightrft.errors import UnsupportedError
from lightrft.failures import together
from lightrft.loops.collect import Request
from lightrft.loops.ranks import RolloutOnRanks
from lightrft.strategy.protocols.rollout import Completion, EngineHandle

__all__ = ["Await", "check_draws", "made_ahead"]


class Await(Protocol):
    """Waits for a rollout."""

    def __call__(self) -> list[Completion]:
        """Return this rank's completions, batch by batch, when all ranks have theirs; all ranks call it.

        Raises:
            Exception: on all ranks, what one of them raised that could not make its part.
        """
        ...


@contextmanager
def made_ahead(rollout: RolloutOnRanks, engine: EngineHandle, request: Request) -> Generator[Await]:
    """Make a rollout while the block goes on, and yield what waits for it.

    The block must leave the engine alone until it has waited. It ends when the thread has ended: after an exception
    that is after the batch under way.

    Args:
        rollout: how completions are made on one rank.
        engine: awake, with weights of its own, which nobody changes meanwhile.
        request: what is made.
    """
    rank = rollout.get_rank()
    is_given_up = Event()

    def make() -> list[Completion]:
        completions: list[Completion] = []
        for batch in request.order:
            if is_given_up.is_set():
                break
            part = batch[rank]
            # as `gather_and_generate` numbers it, without a word to other ranks
            numbered = attrs.evolve(request.sampling, first_prompt=request.sampling.first_prompt + part.start)
            completions += rollout.engine_generate_local(engine, [request.prompts[index] for index in part], numbered)
        return completions

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout") as thread:
        future = thread.submit(make)

        def wait() -> list[Completion]:
            return together(rollout, future.result)

        try:
            yield wait
        finally:
            is_given_up.set()


def check_draws(model: nn.Module) -> None:
    """Refuse a model that draws while it learns: an engine of this process may draw from the same stream meanwhile.

    Args:
        model: the plain model.

    Raises:
        UnsupportedError: a module drops out values at random.
    """
    for name, module in model.named_modules():
        # attention drops out by a function, whose share transformers keeps beside it
        share = getattr(module, "p" if "Dropout" in type(module).__name__ else "attention_dropout", 0.0)
        if module.training and share:
            raise UnsupportedError(
                f"algorithm.max_staleness: {name!r} of the model drops out a share of {share} at random while it "
                "learns, and the engine draws at the same time; set the dropout to 0, or max_staleness=0."
            )
