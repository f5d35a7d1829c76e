"""What installed packages add to the registries, read when somebody looks and imported when somebody chooses."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.metadata import EntryPoint, entry_points

from lightrft.errors import ConfigError, MissingPackageError

__all__ = ["ENGINE_GROUP", "STRATEGY_GROUP", "load_builder", "read_entry_points"]

STRATEGY_GROUP = "lightrft.strategies"
"""Entry-point group of builders of strategies."""

ENGINE_GROUP = "lightrft.engines"
"""Entry-point group of builders of engines."""


def read_entry_points(group: str, own: Collection[str]) -> dict[str, EntryPoint]:
    """Return the entry points of all installed packages, by name; none of them is imported.

    Args:
        group: `STRATEGY_GROUP` or `ENGINE_GROUP`.
        own: names that are lightrft's.

    Raises:
        ConfigError: a package takes a name of ours, or two packages the same one.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        if point.name in own:
            raise ConfigError(f"{_named(point)} is a name of lightrft's own; rename it or uninstall the package.")
        other = found.setdefault(point.name, point)
        # a package that lies on the path twice, as an editable install may, says the same thing twice
        if other.value != point.value:
            raise ConfigError(f"{_named(point)} is also registered by {_package(other)}; uninstall one of them.")
    return found


def load_builder(point: EntryPoint) -> Callable[..., object]:
    """Return the builder behind an entry point, imported.

    Args:
        point: one of `read_entry_points`.

    Raises:
        MissingPackageError: it cannot be imported.
        ConfigError: what it names cannot be called.
    """
    try:
        builder: object = point.load()
    except (ImportError, AttributeError) as error:
        raise MissingPackageError(
            f"{_named(point)} cannot be imported ({error}); install {_package(point)} again."
        ) from error
    if not callable(builder):
        raise ConfigError(f"{_named(point)} is no function that builds; name one as module:function.")
    return builder


def _named(point: EntryPoint) -> str:
    return f"entry point {point.group}={point.name!r} ({point.value}, package {_package(point)})"


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "unknown"
