"""What a planted bug needs of the engine "hf": handles with the broken functions, and the model inside."""

from __future__ import annotations

from typing import Protocol, cast

import attrs

from lightrft.backends.rollout.hf.decoder import RefreshWeights
from lightrft.backends.rollout.weights import ModelCopy
from lightrft.strategy.protocols import EngineHandle, EngineSource
from lightrft.strategy.protocols.rollout import Engine

__all__ = ["refresh_inside", "serve", "weights_inside"]


class _Generator(Protocol):
    @property
    def refresh(self) -> RefreshWeights: ...


class _State(Protocol):
    @property
    def weights(self) -> ModelCopy: ...

    @property
    def generator(self) -> _Generator: ...


def weights_inside(handle: EngineHandle) -> ModelCopy:
    """Return the engine's own copy of the model.

    Args:
        handle: an engine "hf" that is not closed.
    """
    return cast("_State", handle.state).weights


def refresh_inside(handle: EngineHandle) -> None:
    """Make the engine read its copy again.

    Args:
        handle: as above.
    """
    cast("_State", handle.state).generator.refresh()


def serve(broken: Engine) -> Engine:
    """Return the engine with a `start` whose handles have the broken functions, not those of the right engine.

    Args:
        broken: a right engine's record with some functions replaced.
    """

    def start(source: EngineSource) -> EngineHandle:
        handle = broken.start(source)
        handle.engine = served
        return handle

    served = attrs.evolve(broken, start=start)
    return served
