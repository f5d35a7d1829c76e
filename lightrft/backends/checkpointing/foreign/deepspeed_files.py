"""The files of a DeepSpeed checkpoint: which there are, and what each rank wrote.

save_dir/
  latest                                          the name of the newest of the directories beside it
  global_step42/
    mp_rank_00_model_states.pt                    stages 0 to 2: the module, and of stage 0 the optimizer
    zero_pp_rank_0_mp_rank_00_model_states.pt     stage 3: one file a rank
    zero_pp_rank_0_mp_rank_00_optim_states.pt     stages 1 to 3: one file a rank; "bf16_" before it with bfloat16
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import attrs

from lightrft.backends.checkpointing.foreign.restricted import read_restricted
from lightrft.errors import CheckpointError, UnsupportedError

__all__ = ["RankFiles", "find_deepspeed", "open_ranks"]

_LATEST = "latest"
_WHOLE = "mp_rank_00_model_states.pt"
_OF_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]+)_mp_rank_00_(model|optim)_states\.pt")
_STATES = re.compile(r".*_(?:model|optim)_states\.pt")
# what the files hold beside tensors; none of it is asked for
_STAND_INS = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)


@attrs.frozen(kw_only=True, eq=False)
class RankFiles:
    """What the files of a checkpoint hold.

    Attributes:
        models: of the first rank alone, or of each where the parameters are partitioned.
        optimizers: of each rank; none in stage 0.
        is_partitioned: whether the parameters are, as in stage 3.
    """

    models: Sequence[Mapping[str, object]]
    optimizers: Sequence[Mapping[str, object]]
    is_partitioned: bool


def find_deepspeed(directory: Path) -> Path | None:
    """Return the directory of the newest checkpoint of DeepSpeed's, this one or one inside of it; None without one.

    Args:
        directory: what `save_checkpoint` was given, or one of the directories inside of that.

    Raises:
        CheckpointError: it names a newest one that is not there.
    """
    latest = directory / _LATEST
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if Path(name).name != name or not (directory / name).is_dir():
            raise CheckpointError(f"{latest} names {name!r}, which is no directory beside it; name one that is.")
        return directory / name
    return directory if any(_STATES.fullmatch(path.name) for path in directory.iterdir()) else None


def open_ranks(directory: Path) -> RankFiles:
    """Return what the files of all ranks hold; tensors stay on the disk until they are read.

    Args:
        directory: that of one checkpoint.

    Raises:
        CheckpointError: a file is missing, damaged or holds more than data.
        UnsupportedError: the model was parallel in other ways than by data.
    """
    names = sorted(path.name for path in directory.iterdir() if _STATES.fullmatch(path.name))
    of_rank = {name: match for name in names if (match := _OF_RANK.fullmatch(name))}
    other = [name for name in names if name != _WHOLE and name not in of_rank]
    if other:
        raise UnsupportedError(
            f"{directory / other[0]} is of a model that was split by tensors, layers or experts; merge it with "
            "DeepSpeed's own tools, and import a Hugging Face directory of it."
        )
    of_models, of_optimizers = (
        {int(match[1]): name for name, match in of_rank.items() if match[2] == kind} for kind in ("model", "optim")
    )
    models = [_WHOLE] if _WHOLE in names else _in_order(of_models, directory)
    found = RankFiles(
        models=[_read(directory / name) for name in models],
        optimizers=[_read(directory / name) for name in _in_order(of_optimizers, directory)],
        is_partitioned=_WHOLE not in names,
    )
    _require_all(found, directory)
    return found


def _in_order(names: Mapping[int, str], directory: Path) -> list[str]:
    lacking = [rank for rank in range(len(names)) if rank not in names]
    if lacking:
        raise CheckpointError(f"{directory} lacks a file of rank {lacking[0]}; copy the directory again.")
    return [names[rank] for rank in range(len(names))]


def _require_all(found: RankFiles, directory: Path) -> None:
    if not found.models:
        raise CheckpointError(f"{directory} lacks {_WHOLE}; copy the directory again.")
    world_size = found.models[0].get("dp_world_size")
    for files in (found.optimizers, found.models if found.is_partitioned else ()):
        if files and len(files) != world_size:
            raise CheckpointError(
                f"{directory} has files of {len(files)} ranks, and {world_size} wrote it; copy the directory again."
            )


def _read(path: Path) -> Mapping[str, object]:
    return cast("Mapping[str, object]", read_restricted(path, source=str(path), stand_ins=_STAND_INS))
