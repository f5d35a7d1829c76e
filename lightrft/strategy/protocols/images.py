"""Pictures and videos in prompts, and what turns them into what a model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import attrs

from lightrft.config._checks import at_least, between
from lightrft.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = ["Image", "Processor", "Video", "VideoProcessor"]


def _fits(image: Image, field: attrs.Attribute[bytes], pixels: bytes) -> None:
    del field
    needed = 3 * image.width * image.height
    if len(pixels) != needed:
        raise DataError(
            f"pixels of {len(pixels)} bytes are no image of width={image.width} and height={image.height}; give "
            f"{needed}, three for each pixel."
        )


def _num_bytes(pixels: bytes) -> str:
    return f"<{len(pixels)} bytes>"


@attrs.frozen(kw_only=True)
class Image:
    """A picture as plain data: it can be compared, stored, and sent to another process as it is.

    Attributes:
        width: pixels of a row.
        height: number of rows.
        pixels: red, green and blue of each pixel, a byte each, row by row from the top left.

    Raises:
        DataError: the number of bytes is not that of the pixels.

    Example:
        >>> Image(width=1, height=2, pixels=bytes([255, 0, 0, 0, 0, 255]))
        Image(width=1, height=2, pixels=<6 bytes>)
    """

    width: int = attrs.field(validator=at_least(1, whole=True))
    height: int = attrs.field(validator=at_least(1, whole=True))
    pixels: bytes = attrs.field(repr=_num_bytes, validator=_fits)


def _one_size(video: Video, field: attrs.Attribute[tuple[Image, ...]], frames: tuple[Image, ...]) -> None:
    del video, field
    sizes = sorted({(frame.width, frame.height) for frame in frames})
    if len(sizes) != 1:
        raise DataError(
            f"frames={len(frames)} of sizes {sizes} (width, height) are no video; give at least one, all of one size."
        )


def _num_frames(frames: tuple[Image, ...]) -> str:
    return f"<{len(frames)} of {frames[0].width} x {frames[0].height}>"


@attrs.frozen(kw_only=True)
class Video:
    """A video as plain data: the frames that a model shall see, every one of them.

    Attributes:
        frames: images of one size, in the order of time.
        fps: frames in a second; some models take from it when a frame was seen.

    Raises:
        DataError: there is no frame, or they are not all of one size.

    Example:
        >>> Video(frames=(Image(width=1, height=1, pixels=bytes(3)),) * 4, fps=2.0)
        Video(frames=<4 of 1 x 1>, fps=2.0)
    """

    frames: tuple[Image, ...] = attrs.field(repr=_num_frames, validator=_one_size)
    fps: float = attrs.field(validator=between(0, 10_000, above_low=True))


class Processor(Protocol):
    """What is asked of a processor of text and images; transformers' have it, though their annotations are wider."""

    @property
    def image_token(self) -> str:
        """Text of the placeholder that stands for one image in a prompt."""
        ...

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder."""
        ...

    def __call__(
        self, *, text: list[str], images: Sequence[Sequence[object]], return_tensors: str, add_special_tokens: bool
    ) -> Mapping[str, torch.Tensor]:
        """Return what a model reads of texts with images: `input_ids` and, beside them, what it sees.

        Args:
            text: one text for each sequence; its placeholders are replaced by the tokens of the images.
            images: for each text its images, of `PIL`, in the order of its placeholders.
            return_tensors: "pt" gives tensors of torch.
            add_special_tokens: whether the tokenizer's own begin and end tokens are added.
        """
        ...


@runtime_checkable
class VideoProcessor(Protocol):
    """What is asked besides of a processor that reads videos; transformers' have it, with torchvision installed."""

    @property
    def video_token(self) -> str:
        """Text of the placeholder that stands for one video in a prompt."""
        ...

    @property
    def video_token_id(self) -> int:
        """Id of the placeholder."""
        ...

    def __call__(
        self,
        *,
        text: list[str],
        videos: Sequence[torch.Tensor],
        video_metadata: Sequence[Mapping[str, object]],
        do_sample_frames: bool,
        input_data_format: str,
        return_tensors: str,
        add_special_tokens: bool,
    ) -> Mapping[str, torch.Tensor]:
        """Return what a model reads of texts with videos: `input_ids` and, beside them, what it sees.

        Args:
            text: one text for each sequence; its placeholders are replaced by the tokens of the videos.
            videos: frames (frames, 3, height, width) of uint8, in the order of the placeholders.
            video_metadata: of each video `total_num_frames`, `frames_indices`, `fps`, `width` and `height`.
            do_sample_frames: whether frames are left out; False sees all of them.
            input_data_format: "channels_first", as the frames are.
            return_tensors: "pt" gives tensors of torch.
            add_special_tokens: whether the tokenizer's own begin and end tokens are added.
        """
        ...
