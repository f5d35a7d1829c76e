"""What the algorithms demand of their inputs before they compute: shapes, and names that somebody wrote in a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from lightrft.errors import ConfigError, nearest

__all__ = ["require_ndim", "require_same_shape", "select"]

Chosen = TypeVar("Chosen")


def require_same_shape(**tensors: Tensor) -> None:
    """Refuse tensors whose shapes differ, so that no formula broadcasts by accident.

    Args:
        tensors: what must agree, by the names that the message shall use.

    Raises:
        ConfigError: if a tensor's shape differs from that of the first.
    """
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ConfigError(
                f"{name}.shape={tuple(tensor.shape)} differs from {first_name}.shape={tuple(first.shape)}; "
                "pass tensors of one shape."
            )


def require_ndim(ndim: int, **tensors: Tensor) -> None:
    """Refuse tensors that do not have `ndim` dimensions.

    Args:
        ndim: the number of dimensions that the formula is about.
        tensors: what is checked, by the names that the message shall use.

    Raises:
        ConfigError: if a tensor has another number of dimensions.
    """
    for name, tensor in tensors.items():
        if tensor.ndim != ndim:
            raise ConfigError(
                f"{name}.shape={tuple(tensor.shape)} has not {ndim} dimension(s); reshape it to {ndim}-D."
            )


def select(known: Mapping[str, Chosen], name: str, *, setting: str) -> Chosen:
    """Return what `name` stands for in one of the mappings of this package.

    Args:
        known: the mapping, such as `ADVANTAGES`.
        name: what the config says.
        setting: the name of the setting that says it, for the message.

    Raises:
        ConfigError: if nothing has that name; the message lists what has one and the nearest.

    Example:
        >>> from lightrft.algorithms import KL_ESTIMATORS, select
        >>> select(KL_ESTIMATORS, "k3", setting="kl_estimator").__name__
        'k3'
    """
    if name not in known:
        raise ConfigError(f"{setting}={name!r} is not known; {nearest(name, known)}.")
    return known[name]
