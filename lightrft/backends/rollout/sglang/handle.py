"""A running SGLang as a handle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from torch import nn

from lightrft.backends.rollout.sglang.package import Request, Scheduler, Sglang
from lightrft.strategy.protocols.images import Processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Inside"]


@attrs.define(kw_only=True, eq=False)
class Inside:
    """A running SGLang; a handle.

    Attributes:
        package: its modules.
        scheduler: its scheduler, which owns everything else.
        model: SGLang's own model.
        requests: those of the call under way.
        owns_group: whether the default process group was made for this engine.
        processor: the model's, if it reads images.
        architecture: the trainer's model without weights, where there is a processor.
        reached: elements that the load under way has brought to each parameter.
        wanted: the same for a load of everything; empty before the first one.
        cache_bytes: size of each tensor of a cache that was freed.
    """

    package: Sglang
    scheduler: Scheduler
    model: nn.Module
    requests: list[Request]
    owns_group: bool
    processor: Processor | None
    architecture: PreTrainedModel | None
    reached: dict[str, int] = attrs.field(factory=dict[str, int])
    wanted: dict[str, int] = attrs.field(factory=dict[str, int])
    cache_bytes: tuple[int, ...] = ()
