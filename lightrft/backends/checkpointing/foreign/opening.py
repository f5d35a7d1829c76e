"""Which program wrote a directory, and what it holds."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import torch

from lightrft.backends.checkpointing.access import StoredTensor
from lightrft.backends.checkpointing.durable import disk_errors
from lightrft.backends.checkpointing.foreign.dcp_parts import read_dcp
from lightrft.backends.checkpointing.foreign.deepspeed import read_deepspeed
from lightrft.backends.checkpointing.foreign.deepspeed_files import find_deepspeed
from lightrft.backends.checkpointing.foreign.record import ForeignModel, ForeignTensor
from lightrft.backends.checkpointing.foreign.torch_dcp import METADATA
from lightrft.backends.checkpointing.layout import MANIFEST
from lightrft.backends.checkpointing.stored import read_stored
from lightrft.backends.checkpointing.weight_files import INDEX, open_weights
from lightrft.errors import CheckpointError, ConfigError, LightRFTError

__all__ = ["open_foreign"]

_WEIGHTS = "model.safetensors"
_LOOKED_FOR = f"{_WEIGHTS}, {INDEX}, {METADATA}, latest or *_model_states.pt"
_REFUSED = {
    MANIFEST: "is a checkpoint of lightrft already; load it, or `lightrft checkpoint export` a model of it",
    "adapter_model.safetensors": "holds adapters alone; load them with PeftModel.from_pretrained",
    "pytorch_model.bin": "holds its weights in a pickle; save it with safe_serialization=True",
    "pytorch_model.bin.index.json": "holds its weights in pickles; save it with safe_serialization=True",
}


@contextmanager
def open_foreign(directory: Path, *, name: str) -> Generator[ForeignModel, None, None]:
    """Yield a model of another program's checkpoint; its tensors are read one at a time, while it is open.

    Args:
        directory: in the Hugging Face layout, of `torch.distributed.checkpoint`, or of DeepSpeed.
        name: which model, where there are several.

    Raises:
        ConfigError: there is no such directory, its kind is unknown, or it has several models and none of this name.
        CheckpointError: a file is missing, damaged or holds more than data.
        UnsupportedError: the model was parallel in a way that is not read.
    """
    if not directory.is_dir():
        raise ConfigError(f"SOURCE={str(directory)!r} is not a directory; name one that holds a checkpoint.")
    with ExitStack() as files:
        with disk_errors("SOURCE", directory, advice="make it readable, or copy it again"):
            try:
                found = _open(directory, name, files)
                _require_names(found, directory)
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                if isinstance(error, LightRFTError):
                    raise
                raise CheckpointError(
                    f"{directory} has not the form of a checkpoint that is known ({error!r}); pass another one."
                ) from error
        yield found


def _require_names(found: ForeignModel, directory: Path) -> None:
    for name in found.tensors:
        if not isinstance(cast("object", name), str) or name == "__metadata__":  # which a safetensors file has already
            raise CheckpointError(f"{directory} has a tensor of the name {name!r}; rename it, and save it again.")


def _open(directory: Path, name: str, files: ExitStack) -> ForeignModel:
    if (directory / METADATA).is_file():
        return read_dcp(directory, name=name)
    of_deepspeed = find_deepspeed(directory)  # before the weights: a Trainer of transformers writes both
    if of_deepspeed is not None:
        return read_deepspeed(of_deepspeed)
    if (directory / INDEX).is_file() or (directory / _WEIGHTS).is_file():
        weights = files.enter_context(open_weights(directory))
        tensors = {name: _foreign(tensor) for name, tensor in weights.items()}
        return ForeignModel(kind="huggingface", tensors=tensors, notes=["missing: the optimizer."])
    for file, words in _REFUSED.items():
        if (directory / file).exists():
            raise ConfigError(f"SOURCE={str(directory)!r} {words}.")
    raise ConfigError(
        f"SOURCE={str(directory)!r} is no checkpoint that is known (it holds no {_LOOKED_FOR}); name another directory."
    )


def _foreign(tensor: StoredTensor) -> ForeignTensor:
    def read() -> torch.Tensor:
        return read_stored(tensor)

    return ForeignTensor(shape=tensor.shape, dtype=tensor.dtype, read=read)
