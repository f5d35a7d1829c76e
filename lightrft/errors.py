"""Every error that lightrft raises on purpose.

Each type is also the builtin error that it refines, so that `except ValueError` works, and each can be pickled.
A message has the form `<setting>=<value> <what is wrong>; <what to do>.`
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "DataError",
    "EngineCrashError",
    "EngineStateError",
    "InterruptedRunError",
    "LawError",
    "LightRFTError",
    "MissingPackageError",
    "RewardError",
    "StepError",
    "UnsupportedError",
    "WeightSyncError",
    "nearest",
]


class LightRFTError(Exception):
    """The common ancestor: `except LightRFTError` catches all that lightrft raises on purpose."""


class ConfigError(LightRFTError, ValueError):
    """A setting that is unknown, of the wrong type, out of range or at odds with another one.

    Raised while the configuration is built, before any process group or model exists.
    """


class UnsupportedError(LightRFTError, NotImplementedError):
    """Something that the chosen backend cannot do; the message names the nearest thing that can."""


class MissingPackageError(LightRFTError, ImportError):
    """An optional package that the chosen backend needs; the message holds the command that installs it."""


class DataError(LightRFTError, ValueError):
    """A prompt file, task or sample that cannot be used; the message names the file and the line."""


class RewardError(LightRFTError, ValueError):
    """A reward function that raised, or returned something that is not a finite number."""


class CollectiveError(LightRFTError, RuntimeError):
    """Ranks that do not agree on a collective; the message names the rank and the difference."""


class StepError(LightRFTError, RuntimeError):
    """A training call in an order that has no meaning, such as a step without a backward."""


class EngineCrashError(LightRFTError, RuntimeError):
    """An engine whose process ended or hung; the message holds the last lines that it printed."""


class EngineStateError(LightRFTError, RuntimeError):
    """An engine call that the engine's present status does not allow; the message names both."""


class WeightSyncError(LightRFTError, RuntimeError):
    """Weights that did not provably arrive in the engine, which refuses to generate until a sync succeeds."""


class CheckpointError(LightRFTError, RuntimeError):
    """A checkpoint that cannot be written, or one that is damaged or incomplete and is refused; the file is named."""


class InterruptedRunError(LightRFTError, RuntimeError):
    """A run that was asked to stop and did, at a step boundary and with a checkpoint."""


class LawError(LightRFTError, AssertionError):
    """A law that does not hold for a strategy or an engine; the message says what was seen and what must be."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that lists the known names, with the one nearest to `name` first.

    Args:
        name: what was written.
        known: what could have been written.

    Example:
        >>> nearest("sngle", ["fake", "single"])
        "did you mean 'single'? Known: fake, single"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = "Known: " + ", ".join(names)
    return f"did you mean {close[0]!r}? {listed}" if close else listed
