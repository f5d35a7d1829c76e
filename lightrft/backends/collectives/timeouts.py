"""How long a collective waits for a missing rank, the same for every backend."""

from __future__ import annotations

from datetime import timedelta

from lightrft.config.strategy import LONGEST_TIMEOUT
from lightrft.errors import ConfigError

__all__ = ["timeout_of"]


def timeout_of(timeout: timedelta | float | None, *, default: float) -> timedelta:
    """Return what `setup_distributed` was told, or the settings' own.

    Args:
        timeout: a duration, or seconds; None takes the default.
        default: seconds of the settings.

    Raises:
        ConfigError: it is not positive.

    Example:
        >>> timeout_of(None, default=1.5).total_seconds()
        1.5
    """
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else default if timeout is None else timeout
    if not 0 < seconds <= LONGEST_TIMEOUT:
        raise ConfigError(f"timeout={timeout!r} is not a positive number of seconds up to a year; use one, or None.")
    return timedelta(seconds=seconds)
