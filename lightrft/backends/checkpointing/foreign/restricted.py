"""Pickles of other programs, read by torch's restricted unpickler alone.

It makes tensors, numbers, strings, lists, tuples, sets and dictionaries, and looks up nothing by the names that a file
gives. Where a file of a known program names a few classes besides, a stand-in is made under each of those names: it
keeps the data that an instance would have had, and none of the program's code is imported or run.
"""

from __future__ import annotations

import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TypeAlias, cast

import torch

from lightrft.errors import CheckpointError

__all__ = ["as_torch_file", "is_stand_in", "made_of", "read_restricted", "state_of"]

_ZIP = b"PK\x03\x04"  # how a file of `torch.save` begins; older ones are no archives
_NUM_SHOWN = 200

_Allowed: TypeAlias = tuple[Callable[..., object], str]


def read_restricted(file: Path | BytesIO, *, source: str, stand_ins: Collection[str] = ()) -> object:
    """Return what a file of `torch.save` holds, its tensors on the CPU, or on the disk until they are read.

    Args:
        file: the file, or its content.
        source: what it is called in the error.
        stand_ins: full names of the classes for which a stand-in is made.

    Raises:
        CheckpointError: it is missing or damaged, or names anything else.
    """
    allowed: list[_Allowed] = [(_stand_in(name), name) for name in stand_ins]
    try:
        with warnings.catch_warnings(), _allowed_alone(allowed):
            warnings.simplefilter("ignore")  # what it warns of, it refuses
            return torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))
    except OSError as error:
        raise CheckpointError(
            f"{source} cannot be read: {error.strerror or error}; copy the directory again."
        ) from error
    except Exception as error:  # a damaged pickle fails in any way
        raise CheckpointError(
            f"{source} is refused by torch's restricted unpickler: {_reason(error)}; "
            "save it anew without that, or as safetensors."
        ) from error


@contextmanager
def _allowed_alone(allowed: list[_Allowed]) -> Generator[None, None, None]:
    """Let the restricted unpickler make these, and nothing that was allowed elsewhere in this process."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals([*allowed]):
            yield
    finally:
        torch.serialization.add_safe_globals(before)


def as_torch_file(stream: bytes) -> BytesIO:
    """Return a bare pickle in the form of a file of `torch.save`, the only one that the restricted unpickler is given.

    Args:
        stream: a pickle of protocol 2.
    """
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("bare/data.pkl", stream)
        archive.writestr("bare/version", "3\n")
    file.seek(0)
    return file


def is_stand_in(value: object, name: str) -> bool:
    """Return whether a value stands for an instance of a class.

    Args:
        value: anything that was read.
        name: full name of the class.
    """
    return getattr(type(value), "stands_for", None) == name


def state_of(value: object, name: str) -> object:
    """Return the state that an instance of a class would have been given.

    Args:
        value: anything that was read.
        name: full name of the class.

    Raises:
        TypeError: the value stands for no instance of it.
    """
    _require(value, name)
    return getattr(value, "state", None)


def made_of(value: object, name: str) -> tuple[object, ...]:
    """Return the arguments by which an instance of a class would have been made.

    Args:
        value: anything that was read.
        name: full name of the class.

    Raises:
        TypeError: the value stands for no instance of it.
    """
    _require(value, name)
    return cast("tuple[object, ...]", getattr(value, "made_of", ()))


def _require(value: object, name: str) -> None:
    if not is_stand_in(value, name):
        raise TypeError(f"a {type(value).__name__} stands where a {name.rpartition('.')[2]} belongs")


def _stand_in(name: str) -> type:
    class StandIn:
        """The data of an instance of a class that a file names."""

        stands_for = name
        made_of: tuple[object, ...] = ()
        state: object = None

        def __new__(cls, *made_of: object) -> StandIn:  # noqa: PYI034 (nobody inherits)
            made = super().__new__(cls)
            made.made_of = made_of
            return made

        def __setstate__(self, state: object) -> None:
            self.state = state

    return StandIn


def _can_be_mapped(file: Path | BytesIO) -> bool:
    if isinstance(file, BytesIO):
        return False
    if not stat.S_ISREG(file.stat().st_mode):  # a pipe would wait for ever
        raise OSError("it is no plain file")
    with file.open("rb") as opened:
        return opened.read(len(_ZIP)) == _ZIP


def _reason(error: Exception) -> str:
    said = str(error).rpartition("WeightsUnpickler error:")[2]
    named = re.search(r"GLOBAL ([^\s,;]+)", said)
    if named is not None:
        return f"it names {named[1]}, which is none of the data that is expected there"
    return " ".join(said.split())[:_NUM_SHOWN] or type(error).__name__
