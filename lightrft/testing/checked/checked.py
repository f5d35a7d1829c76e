"""The transform that puts all checks around a strategy."""

from __future__ import annotations

from lightrft.strategy.compose import compose
from lightrft.strategy.record import Strategy
from lightrft.testing.checked.checkpointing import with_checked_checkpoints
from lightrft.testing.checked.collectives import with_checked_collectives
from lightrft.testing.checked.rollout import with_checked_rollout
from lightrft.testing.checked.training import with_checked_training

__all__ = ["checked"]


def checked(strategy: Strategy) -> Strategy:
    """Return the strategy with every call held to the laws that can be seen from outside while a real run goes on.

    Before and after each call it looks at fingerprints of parameters, at learning rates, statuses and results; a law
    that does not hold is a `LawError` that names the function and what was seen. What a run computes stays the same,
    bit for bit. It is for debugging: each call reads all parameters once or twice, and with several ranks adds small
    collectives, so that every rank must use it.

    Args:
        strategy: any strategy.

    Example:
        >>> from lightrft.strategy import get_strategy
        >>> strategy = checked(get_strategy({"strategy": "single"}))
        >>> strategy.all_reduce({"loss": 2.0})
        {'loss': 2.0}
    """
    return compose(with_checked_collectives, with_checked_training, with_checked_checkpoints, with_checked_rollout)(
        strategy
    )
