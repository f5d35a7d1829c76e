"""Learning-rate schedules: a linear warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightrft.errors import ConfigError, nearest
from lightrft.strategy.config import SCHEDULERS

__all__ = ["build_schedule", "rate_factor"]


def rate_factor(step: int, kind: str, *, num_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Return the share of the peak rate that a step uses.

    Warm-up step i (from 0) uses (i + 1) / (warmup_steps + 1), so that the first step moves and the first one after the
    warm-up uses the peak. From there the rate decays until the last step, `num_steps - 1`, uses `min_ratio`:

        linear: min + (1 - min) * (1 - t), cosine: min + (1 - min) * (1 + cos(pi * t)) / 2,
        t = (step - warmup_steps) / (num_steps - 1 - warmup_steps)

    Args:
        step: number of the optimizer step, from 0; after the last one the rate stays.
        kind: one of `SCHEDULERS`.
        num_steps: optimizer steps of the whole run.
        warmup_steps: those of the warm-up.
        min_ratio: share of the peak at the end.

    Reference: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5.

    Example:
        >>> [rate_factor(step, "linear", num_steps=5, warmup_steps=1, min_ratio=0.1) for step in (0, 1, 4)]
        [0.5, 1.0, 0.1]
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    t = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
    left = 1.0 - t if kind == "linear" else (1.0 + math.cos(math.pi * t)) / 2.0
    return min_ratio + (1.0 - min_ratio) * left


def build_schedule(
    optimizer: Optimizer, kind: str, *, num_steps: int, warmup_ratio: float = 0.0, min_ratio: float = 0.0
) -> LambdaLR:
    """Return the schedule; every optimizer step steps it once.

    Args:
        optimizer: its present rates are the peaks.
        kind: one of `SCHEDULERS`.
        num_steps: optimizer steps of the whole run.
        warmup_ratio: share of them over which the rate rises, rounded down to whole steps.
        min_ratio: share of the peak at the end of a decay.

    Raises:
        ConfigError: the kind is unknown, or there are no steps.
    """
    if kind not in SCHEDULERS:
        raise ConfigError(f"lr_scheduler={kind!r} is not known; {nearest(kind, SCHEDULERS)}.")
    if num_steps < 1:
        raise ConfigError(f"max_steps={num_steps!r} is too small; use 1 or more.")
    warmup_steps = int(warmup_ratio * num_steps)

    def factor(step: int) -> float:
        return rate_factor(step, kind, num_steps=num_steps, warmup_steps=warmup_steps, min_ratio=min_ratio)

    return LambdaLR(optimizer, factor)
