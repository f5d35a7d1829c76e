"""The process groups of SGLang beside those of the trainer."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch.distributed as dist

from lightrft.backends.rollout.sglang.package import Sglang

__all__ = ["alone", "leave"]


@contextmanager
def alone(package: Sglang) -> Generator[None]:
    """Make SGLang's groups of this rank alone: it takes all ranks that there are for its own.

    All ranks start their engines together, as each group of one is made among all.

    Args:
        package: SGLang.
    """
    kind, initialize = package.parallel_state.GroupCoordinator, package.bootstrap.initialize_model_parallel

    def init_coordinator(coordinator: object, **settings: object) -> None:
        kind.__init__(coordinator, **{**settings, "group_ranks": [[dist.get_rank()]], "recovered_rank": False})

    def initialize_alone(**settings: object) -> None:
        initialize(**{**settings, "recovered_rank": True})  # or else it counts the ranks

    def keep(data: list[object], *args: object, **kwargs: object) -> list[object]:
        del args, kwargs
        return data

    replaced: list[tuple[object, str, object]] = [
        (package.parallel_state, "GroupCoordinator", type("GroupOfOne", (kind,), {"__init__": init_coordinator})),
        (package.bootstrap, "initialize_model_parallel", initialize_alone),
        (package.tp_worker, "broadcast_pyobj", keep),  # of a seed, from a rank that another one may have
    ]
    before = [getattr(module, name) for module, name, _ in replaced]
    try:
        for module, name, own in replaced:
            setattr(module, name, own)
        yield
    finally:
        for (module, name, _), theirs in zip(replaced, before, strict=True):
            setattr(module, name, theirs)


def leave(package: Sglang, *, owns_group: bool) -> None:
    """Destroy SGLang's groups and forget its settings, which are of the whole process.

    Args:
        package: SGLang.
        owns_group: whether the default process group goes, too.
    """
    state = cast("Any", package.parallel_state)
    if state._SELF_PP is not None:  # noqa: SLF001 (SGLang forgets this group)
        state._SELF_PP.destroy()  # noqa: SLF001
        state._SELF_PP = None  # noqa: SLF001
    state.destroy_model_parallel()
    if owns_group:
        state.destroy_distributed_environment()
    elif state._WORLD is not None:  # noqa: SLF001 (the public way destroys the default group, too)
        state._WORLD.destroy()  # noqa: SLF001
        state._WORLD = None  # noqa: SLF001
    package.runtime_context.reset_context()
