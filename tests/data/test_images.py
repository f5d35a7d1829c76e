"""Pictures of other packages as images of prompts."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from lightrft.data.images import as_image, as_video
from lightrft.errors import ConfigError, DataError
from lightrft.strategy import Image, Video

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
        (PIXELS[None], r"shape \(1, 5, 7, 3\) is no image; .* is one for as_video"),
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


def test_arrays_tensors_and_pictures_of_the_same_frames_are_the_same_video() -> None:
    """Frames follow one another as they were given, and each is what `as_image` makes of it."""
    frames = np.random.default_rng(1).integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)
    video = as_video(frames, fps=2.5)
    assert video == Video(frames=tuple(as_image(frame) for frame in frames), fps=2.5)
    same = [torch.from_numpy(frames), list(frames), (PIL.Image.fromarray(frame) for frame in frames)]
    assert [as_video(each, fps=2.5) for each in same] == [video] * 3
    assert as_video(frames[::-1], fps=2.5) != video
    assert as_video(frames, fps=5.0) != video
    assert repr(video) == "Video(frames=<4 of 7 x 5>, fps=2.5)"


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (
            PIXELS,
            r"frames=ndarray of uint8 and shape \(5, 7, 3\) is no video; give uint8 of \(frames, height, width, 3\)",
        ),
        (torch.zeros(2, 3, 5, 7), r"Tensor of float32 and shape \(3, 5, 7\) is no image"),
        (PIXELS[None].astype(np.float32), r"ndarray of float32 and shape \(5, 7, 3\) is no image"),
        (PIL.Image.fromarray(PIXELS), "frames=Image is no video; give pictures"),
        ("cat.mp4", "frames=str is no video; give pictures"),
        ([], r"frames=0 of sizes \[\] .* are no video; give at least one"),
        (PIXELS[None][:0], r"frames=0 of sizes"),
        ([PIXELS, PIXELS[1:]], r"frames=2 of sizes \[\(7, 4\), \(7, 5\)\] \(width, height\) are no video; .* one size"),
    ],
)
def test_what_is_no_video_is_refused(frames: object, said: str) -> None:
    """Paths, floats, one picture, no frame and frames of different sizes are refused with what was seen."""
    with pytest.raises(DataError, match=said):
        as_video(frames, fps=2.0)


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan")])
def test_a_video_has_a_rate(fps: float) -> None:
    """Time that stands still or runs back is refused."""
    with pytest.raises(ConfigError, match="fps="):
        as_video(PIXELS[None], fps=fps)
