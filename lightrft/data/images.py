"""Pictures and videos of other packages as images and videos of prompts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast, runtime_checkable

import torch

from lightrft.errors import DataError
from lightrft.strategy.protocols.images import Image, Video

__all__ = ["Array", "Picture", "as_image", "as_video"]


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
        DataError: it is neither; for a video, of four dimensions, there is `as_video`.

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


def as_video(frames: object, *, fps: float) -> Video:
    """Return frames as a video of a prompt; which ones of a long video a model shall see is chosen before.

    Args:
        frames: pictures as `as_image` takes them, in the order of time, or an array or tensor of uint8, (frames,
            height, width, 3).
        fps: frames in a second, of those that are given.

    Raises:
        DataError: they are neither, there is none, or they are not all of one size.

    Example:
        >>> as_video(torch.zeros(4, 2, 5, 3, dtype=torch.uint8), fps=2.0)
        Video(frames=<4 of 5 x 2>, fps=2.0)
    """
    if isinstance(frames, (torch.Tensor, Array)) and len(frames.shape) != 4:
        raise DataError(
            f"frames={type(frames).__name__} of {frames.dtype} and shape {tuple(frames.shape)} is no video; give uint8 "
            "of (frames, height, width, 3)."
        )
    if isinstance(frames, (str, bytes, Picture)) or not isinstance(frames, Iterable):
        raise DataError(
            f"frames={type(frames).__name__} is no video; give pictures, or uint8 of (frames, height, width, 3)."
        )
    return Video(frames=tuple(as_image(frame) for frame in cast("Iterable[object]", frames)), fps=fps)


def _refusal(picture: object, seen: str) -> DataError:
    return DataError(
        f"picture={type(picture).__name__}{seen} is no image; give one of PIL, or uint8 of (height, width, 3); a "
        "video, of (frames, height, width, 3), is one for as_video."
    )
