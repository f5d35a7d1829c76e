"""What is refused before anything is held to a law: numbers that make no sense, and a package that is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from lightrft.errors import ConfigError, MissingPackageError

__all__ = ["check_settings", "require_hypothesis"]


def check_settings(
    *,
    world_sizes: Sequence[int] = (1,),
    max_examples: int = 1,
    seed: int = 0,
    ranks: str | None = None,
    option: str = "",
) -> None:
    """Return if the settings make sense.

    Args:
        world_sizes: numbers of ranks.
        max_examples: bound on the examples of each law.
        seed: of the examples.
        ranks: where ranks run; None if nothing is said.
        option: how the options of these settings begin, such as "--"; empty for arguments of a function.

    Raises:
        ConfigError: they do not; the setting is named as the user wrote it.

    Example:
        >>> check_settings(world_sizes=[0], option="--")
        Traceback (most recent call last):
        lightrft.errors.ConfigError: --world-size=0 is no number of ranks; use 1 or more.
    """

    def name(setting: str) -> str:
        return f"{option}{setting.replace('_', '-')}" if option else setting

    if not world_sizes:
        raise ConfigError(f"{name('world_sizes')}={list(world_sizes)!r} holds nothing; give at least one number.")
    for world_size in world_sizes:
        if world_size < 1:
            raise ConfigError(f"{name('world_size')}={world_size!r} is no number of ranks; use 1 or more.")
        if ranks == "here" and world_size > 1:
            raise ConfigError(
                f"{name('ranks')}='here' is one rank and {name('world_size')}={world_size!r}; use 'processes'."
            )
    if max_examples < 1:
        raise ConfigError(f"{name('max_examples')}={max_examples!r} looks at nothing; use 1 or more.")
    if seed < 0:
        raise ConfigError(f"{name('seed')}={seed!r} is below 0; use 0 or more.")


def require_hypothesis() -> None:
    """Return if the package that draws examples is installed.

    Raises:
        MissingPackageError: it is not.
    """
    if importlib.util.find_spec("hypothesis") is None:
        raise MissingPackageError(
            "hypothesis is not installed and draws the examples; pip install 'lightrft[testing]'."
        )
