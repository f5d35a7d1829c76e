"""The random streams of one process, as JSON: Python's, numpy's (if it is loaded), torch's, and the CUDA device's."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch

from lightrft.backends.checkpointing.layout import random_file
from lightrft.backends.checkpointing.lossless import as_dict, decode, encode_internal, loads
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["capture_streams", "plan_streams"]


def capture_streams() -> dict[str, Json]:
    """Return the state of every stream of this process; none of them moves."""
    streams: dict[str, Json] = {
        "python": encode_internal(random.getstate(), "random"),
        "torch": _hex(torch.get_rng_state()),
    }
    if "numpy" in sys.modules:
        streams["numpy"] = _capture_numpy()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        streams["cuda"] = _hex(torch.cuda.get_rng_state())
    return streams


def plan_streams(directory: Path, *, rank: int, world_size: int) -> Callable[[], None]:
    """Return a function that restores this rank's streams; the states are checked here, on streams that nobody uses.

    A rank that the saved run did not have keeps the streams that it was set up with: they are its own, and nothing drew
    from them. Streams are never copied from one rank to another. A stream that one of the two processes lacks (numpy is
    not loaded, there is no CUDA device) stays as it is.

    Args:
        directory: the checkpoint.
        rank: number of this process.
        world_size: ranks of the run that wrote the checkpoint.

    Raises:
        CheckpointError: a state is not one.
    """
    if rank >= world_size:
        return _keep
    path = directory / random_file(rank)
    streams = as_dict(loads(path.read_bytes(), source=str(path)), source=str(path))
    try:
        return _plan(streams)
    except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds no state of a random stream ({error}); load another checkpoint."
        ) from error


def _plan(streams: Mapping[str, Json]) -> Callable[[], None]:
    restore = [_plan_python(streams["python"]), _plan_torch(streams["torch"])]
    if "numpy" in streams and "numpy" in sys.modules:
        restore.append(_plan_numpy(streams["numpy"]))
    if "cuda" in streams and torch.cuda.is_available():
        restore.append(_plan_cuda(streams["cuda"]))

    def restore_streams() -> None:
        for action in restore:
            action()

    return restore_streams


def _keep() -> None:
    return


def _hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_hex(state: Json) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(str(state))), dtype=torch.uint8)


def _capture_numpy() -> Json:
    import numpy as np

    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 (numpy's global stream)
    return encode_internal([name, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)], "numpy")


def _plan_python(state: Json) -> Callable[[], None]:
    decoded = cast("tuple[object, ...]", decode(state))
    random.Random().setstate(decoded)  # noqa: S311 (no secret)

    def restore() -> None:
        random.setstate(decoded)

    return restore


def _plan_torch(state: Json) -> Callable[[], None]:
    decoded = _from_hex(state)
    torch.Generator().set_state(decoded)

    def restore() -> None:
        torch.set_rng_state(decoded)

    return restore


def _plan_numpy(state: Json) -> Callable[[], None]:
    import numpy as np

    name, keys, position, has_gauss, gauss = cast("tuple[str, list[int], int, int, float]", decode(state))
    decoded = (name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss)
    np.random.RandomState(0).set_state(decoded)

    def restore() -> None:
        np.random.set_state(decoded)  # noqa: NPY002 (numpy's global stream)

    return restore


def _plan_cuda(state: Json) -> Callable[[], None]:
    decoded = _from_hex(state)
    torch.Generator(device="cuda").set_state(decoded)

    def restore() -> None:
        torch.cuda.set_rng_state(decoded)

    return restore
