"""Pictures of other packages as images of prompts."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from lightrft.data.images import as_image
from lightrft.errors import ConfigError, DataError
from lightrft.strategy import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_arrays_tensors_and_pictures_of_the_same_pixels_are_the_same_image() -> None:
    """Rows come from the top, pixels from the left, colours as red, green, blue; a part of an array is copied right."""
    image = as_image(PIXELS)
    assert (image.width, image.height) == (7, 5)
    assert image.pixels[:3] == bytes(PIXELS[0, 0])
    assert image.pixels[3 * 7 : 3 * 7 + 3] == bytes(PIXELS[1, 0])
    same = [torch.from_numpy(PIXELS), PIL.Image.fromarray(PIXELS), np.asfortranarray(PIXELS)]
    assert [as_image(picture) for picture in same] == [image] * 3
    assert as_image(PIXELS[:, ::2]) == as_image(PIL.Image.fromarray(PIXELS[:, ::2].copy()))
    assert hash(as_image(PIXELS)) == hash(image)
    assert as_image(PIXELS[::-1]) != image


def test_pictures_with_other_colours_are_converted() -> None:
    """Grey becomes three equal colours."""
    grey = PIL.Image.fromarray(PIXELS[..., 0])
    assert as_image(grey).pixels[:6] == bytes([PIXELS[0, 0, 0]] * 3 + [PIXELS[0, 1, 0]] * 3)


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (PIXELS.astype(np.float32), r"ndarray of float32 and shape \(5, 7, 3\) is no image"),
        (PIXELS[..., 0], r"shape \(5, 7\) is no image"),
        (PIXELS.transpose(2, 0, 1), r"shape \(3, 5, 7\) is no image"),
        (PIXELS[None], r"shape \(1, 5, 7, 3\) is no image; .* of a video, give frames"),
        ("cat.png", "picture=str is no image"),
    ],
)
def test_what_is_no_picture_is_refused(picture: object, said: str) -> None:
    """Paths, floats, other orders of dimensions and videos are refused with what was seen."""
    with pytest.raises(DataError, match=said):
        as_image(picture)


def test_an_image_has_three_bytes_for_each_pixel() -> None:
    """Sizes and bytes that do not fit are refused; the bytes are not shown."""
    with pytest.raises(DataError, match=r"pixels of 5 bytes are no image of width=1 and height=2; give 6"):
        Image(width=1, height=2, pixels=bytes(5))
    with pytest.raises(ConfigError, match="width=0"):
        Image(width=0, height=2, pixels=b"")
    assert repr(Image(width=1, height=1, pixels=bytes(3))) == "Image(width=1, height=1, pixels=<3 bytes>)"
