"""Pictures of other packages as images of prompts."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from lightrft.errors import DataError
from lightrft.strategy.protocols.images import Image

__all__ = ["Array", "Picture", "as_image"]


@runtime_checkable
class Picture(Protocol):
    """What is asked of an image of the package PIL."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        ...

    def convert(self, mode: str, /) -> Picture:
        """Return the image with other colours, such as "RGB"."""
        ...

    def tobytes(self) -> bytes:
        """Return the pixels, row by row."""
        ...


@runtime_checkable
class Array(Protocol):
    """What is asked of an array of the package numpy."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dimensions."""
        ...

    @property
    def dtype(self) -> object:
        """Kind of its numbers."""
        ...

    def tobytes(self) -> bytes:
        """Return the numbers, the last dimension fastest."""
        ...


def as_image(picture: object) -> Image:
    """Return a picture as an image of a prompt.

    Args:
        picture: an image of the package PIL, whose colours are converted, or an array or tensor of uint8, (height,
            width, 3).

    Raises:
        DataError: it is neither; a video, of four dimensions, is given frame by frame.

    Example:
        >>> as_image(torch.zeros(2, 5, 3, dtype=torch.uint8))
        Image(width=5, height=2, pixels=<30 bytes>)
    """
    if isinstance(picture, Picture):
        width, height = picture.size
        return Image(width=width, height=height, pixels=picture.convert("RGB").tobytes())
    array = picture.cpu().numpy() if isinstance(picture, torch.Tensor) else picture
    if not isinstance(array, Array):
        raise _refusal(picture, "")
    if str(array.dtype) != "uint8" or len(array.shape) != 3 or array.shape[-1] != 3:
        raise _refusal(picture, f" of {array.dtype} and shape {tuple(array.shape)}")
    height, width, _ = array.shape
    return Image(width=width, height=height, pixels=array.tobytes())


def _refusal(picture: object, seen: str) -> DataError:
    return DataError(
        f"picture={type(picture).__name__}{seen} is no image; give one of PIL, or uint8 of (height, width, 3); of a "
        "video, give frames."
    )
