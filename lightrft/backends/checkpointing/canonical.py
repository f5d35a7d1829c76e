"""Checkpoints in one format for every backend: names of the plain model, safetensors and JSON, one manifest.

What a backend brings is the access to its live tensors and the collectives of its ranks; where the files stand is
written in `layout`.
"""

from __future__ import annotations

import attrs

from lightrft.backends.checkpointing.access import StateAccess
from lightrft.backends.checkpointing.huggingface import build_load_model, build_save_model
from lightrft.backends.checkpointing.loading import build_latest_ckpt, build_load_ckpt
from lightrft.backends.checkpointing.saving import build_save_ckpt
from lightrft.strategy.protocols.checkpointing import LatestCkpt, LoadCkpt, LoadModel, SaveCkpt, SaveModel
from lightrft.strategy.protocols.collectives import Collectives

__all__ = ["CheckpointFunctions", "build_checkpointing"]


@attrs.frozen(kw_only=True, eq=False)
class CheckpointFunctions:
    """What is kept on disk; each field's contract stands on its callback protocol."""

    save_ckpt: SaveCkpt
    load_ckpt: LoadCkpt
    latest_ckpt: LatestCkpt
    save_model: SaveModel
    load_model: LoadModel


def build_checkpointing(
    *, collectives: Collectives, access: StateAccess, strategy: str | None = None
) -> CheckpointFunctions:
    """Return the checkpoint functions of a backend.

    `save_ckpt` numbers the first checkpoint 1 where no step is given.

    Args:
        collectives: what the ranks do together.
        access: what the backend knows of live tensors; `lightrft.backends.checkpointing.live.build_live_access` for
            models and optimizers of torch's own kind.
        strategy: key of the backend, which the manifest of a checkpoint names.
    """
    return CheckpointFunctions(
        save_ckpt=build_save_ckpt(collectives, access, strategy=strategy),
        load_ckpt=build_load_ckpt(collectives, access),
        latest_ckpt=build_latest_ckpt(),
        save_model=build_save_model(collectives, access),
        load_model=build_load_model(collectives, access),
    )
