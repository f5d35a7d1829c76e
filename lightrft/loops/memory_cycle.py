"""Learning and generating take turns in the memory of a device."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from lightrft.strategy.protocols.rollout import EngineHandle, MaybeSleepInferenceEngine, WakeupInferenceEngine
from lightrft.strategy.protocols.training import Offload, Reload

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["TakesTurns", "generating"]


class TakesTurns(Protocol):
    """What moves between device and main memory; every strategy has it."""

    @property
    def offload(self) -> Offload: ...  # noqa: D102 (the callback protocol is the documentation)
    @property
    def reload(self) -> Reload: ...  # noqa: D102
    @property
    def maybe_sleep_inference_engine(self) -> MaybeSleepInferenceEngine: ...  # noqa: D102
    @property
    def wakeup_inference_engine(self) -> WakeupInferenceEngine: ...  # noqa: D102


@contextmanager
def generating(strategy: TakesTurns, engine: EngineHandle, *learners: nn.Module | Optimizer) -> Generator[None]:
    """Give the device's memory to the engine inside of the block, and to what learns outside of it.

    The learners are offloaded before the engine wakes, and reloaded after it has gone to sleep, so that no two of them
    are whole at the same time. The engine sleeps if `enable_engine_sleep` is set. After an exception the learners are
    back, too.

    Law: what a run computes does not depend on it, by a bit.

    Args:
        strategy: moves the learners, and has the engine sleep and wake.
        engine: an engine that is awake or asleep.
        learners: models and optimizers that the engine does not need; none leaves all of them where they are.

    Raises:
        EngineStateError: the engine is torn, closed or in an update.
    """
    if learners:
        strategy.offload(*learners)
    try:
        strategy.wakeup_inference_engine(engine)
        yield
        strategy.maybe_sleep_inference_engine(engine)
    finally:
        if learners:
            strategy.reload(*learners)
