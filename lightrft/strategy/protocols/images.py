"""Pictures in prompts, and what turns them into what a model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import attrs

from lightrft.config._checks import at_least
from lightrft.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = ["Image", "Processor"]


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
        self, *, text: list[str], images: Sequence[object], return_tensors: str, add_special_tokens: bool
    ) -> Mapping[str, torch.Tensor]:
        """Return what a model reads of texts with images: `input_ids` and, beside them, what it sees.

        Args:
            text: one text for each sequence; its placeholders are replaced by the tokens of the images.
            images: images of `PIL`, in the order of the placeholders.
            return_tensors: "pt" gives tensors of torch.
            add_special_tokens: whether the tokenizer's own begin and end tokens are added.
        """
        ...
