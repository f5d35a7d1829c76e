"""Prompts with images as a model reads them, beside what transformers makes of whole texts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import Idefics3Processor, LlavaNextProcessor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lightrft.data.images import as_image
from lightrft.errors import DataError, MissingPackageError, UnsupportedError
from lightrft.models.images import ModelPrompt, inputs_beside, read_prompts
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy import Prompt, Video
from lightrft.strategy.protocols import Processor
from lightrft.testing.cases.vision import VideoCase, build_processor, build_video

TAGS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "\n")
GRID = tuple(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))
TOKENIZER = build_character_tokenizer("0123456789\n", words=(*TAGS[:4], *GRID))
RANDOM = np.random.default_rng(0)
PICTURES = [
    PIL.Image.fromarray(RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((8, 8), (8, 24), (20, 9))
]


def idefics3(*, tiles: bool) -> Processor:
    images = cast("Any", Idefics3ImageProcessorPil)(
        size={"longest_edge": 24}, max_image_size={"longest_edge": 8}, do_image_splitting=tiles
    )
    return cast("Any", Idefics3Processor)(image_processor=images, tokenizer=TOKENIZER, image_seq_len=2)


def llava() -> Processor:
    sizes = {"size": {"height": 8, "width": 8}, "crop_size": {"height": 8, "width": 8}}
    return cast("Any", LlavaProcessor)(
        image_processor=cast("Any", CLIPImageProcessorPil)(**sizes),
        tokenizer=TOKENIZER,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


CROPS = [[8, 8], [8, 16], [16, 8], [8, 24]]


def llava_next() -> Processor:
    sizes = {"size": {"height": 8, "width": 8}, "crop_size": {"height": 8, "width": 8}}
    return cast("Any", LlavaNextProcessor)(
        image_processor=cast("Any", LlavaNextImageProcessorPil)(**sizes, image_grid_pinpoints=CROPS),
        tokenizer=TOKENIZER,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def take_any(processor: object, name: str, part: object) -> type:
    del processor, name
    return type(part)


def unchecked(kind: type) -> Any:
    """Return a kind of processor that can do without a reader of videos, which wants torchvision."""
    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": take_any})


def llava_onevision() -> Processor:
    images = cast("Any", LlavaOnevisionImageProcessorPil)(
        size={"height": 8, "width": 8}, image_grid_pinpoints=CROPS, do_convert_rgb=False
    )
    return cast(
        "Processor",
        unchecked(LlavaOnevisionProcessor)(
            image_processor=images,
            tokenizer=TOKENIZER,
            video_processor=None,
            num_image_tokens=4,
            vision_feature_select_strategy="full",
        ),
    )


def qwen2_5_vl() -> Processor:
    images = cast("Any", Qwen2VLImageProcessorPil)(size={"shortest_edge": 28**2, "longest_edge": 4 * 28**2})
    named = build_character_tokenizer("0123456789\n", words=(*TAGS[:4], *GRID, "<video>"))
    cast("Any", named).image_token, cast("Any", named).video_token = "<image>", "<video>"
    return cast(
        "Processor", unchecked(Qwen2_5_VLProcessor)(image_processor=images, tokenizer=named, video_processor=None)
    )


def prompt_of(text: str, pictures: Sequence[PIL.Image.Image]) -> Prompt:
    return Prompt(token_ids=tuple(TOKENIZER.encode(text)), images=tuple(as_image(each) for each in pictures))


class Counting:
    """A processor that counts its calls."""

    def __init__(self, inner: Processor) -> None:
        self.inner, self.calls = inner, 0
        self.image_token, self.image_token_id = inner.image_token, inner.image_token_id

    def __call__(
        self, *, text: list[str], images: Sequence[Sequence[object]], return_tensors: str, add_special_tokens: bool
    ) -> Mapping[str, torch.Tensor]:
        self.calls += 1
        return self.inner(
            text=text, images=images, return_tensors=return_tensors, add_special_tokens=add_special_tokens
        )


FAMILIES = (
    llava,
    llava_next,
    llava_onevision,
    qwen2_5_vl,
    lambda: idefics3(tiles=False),
    lambda: idefics3(tiles=True),
)


@pytest.mark.parametrize("build", FAMILIES)
def test_a_prompt_is_read_as_transformers_reads_its_text(build: Any) -> None:
    """One image, and some between texts and side by side, become the tokens and tensors of one call with all of them.

    Of the families, one reads an image in crops where it is alone, and without where others are beside it.
    """
    processor, twice = build(), [PICTURES[2], *PICTURES]
    for text, pictures in [
        ("1<image>2", PICTURES[1:2]),
        ("<image>3<image>4", PICTURES[1:]),
        ("<image>34<image><image>5", PICTURES),
        ("<image><image>6<image>7<image>", twice),
        ("12", []),
    ]:
        (read,) = read_prompts([prompt_of(text, pictures)], processor)
        whole = processor(
            text=[text], images=[pictures] if pictures else None, return_tensors="pt", add_special_tokens=False
        )
        assert list(read.token_ids) == whole.pop("input_ids")[0].tolist()
        whole.pop("attention_mask")
        types = whole.pop("mm_token_type_ids", torch.zeros(1, len(read.token_ids)))[0].tolist()
        assert list(read.types.get("mm_token_type_ids", types)) == types
        assert set(read.seen) == set(whole)
        for name, tensor in read.seen.items():
            assert torch.equal(tensor, whole[name])


def test_the_processor_is_asked_once_for_each_prompts_images_and_never_for_text() -> None:
    """An image that comes twice is read once; several of a prompt are read together, too; text costs no call."""
    processor = Counting(llava())
    read_prompts([prompt_of("12", []), prompt_of("3", [])], processor)
    assert processor.calls == 0
    first, second = PICTURES[:2]
    read_prompts([prompt_of("1<image>", [first]), prompt_of("2<image>", [first])], processor)
    assert processor.calls == 1
    read_prompts(
        [prompt_of("<image><image>", [first, second]), prompt_of("<image>1<image>", [first, second])], processor
    )
    assert processor.calls == 1 + 3


class Ordinal(Counting):
    """A processor that gives each further image of a prompt one token more."""

    def __call__(self, **settings: Any) -> Mapping[str, torch.Tensor]:
        num_images = settings["text"][0].count(self.image_token)
        tokens = sum(range(num_images + 1))
        return {**super().__call__(**settings), "input_ids": torch.full((1, tokens), self.image_token_id)}


class Framing(Counting):
    """A processor that puts text around an image, which becomes one token where two images touch."""

    def __call__(self, **settings: Any) -> Mapping[str, torch.Tensor]:
        num_images = settings["text"][0].count(self.image_token)
        ids = [5, *[self.image_token_id, 6] * num_images]
        return {**super().__call__(**settings), "input_ids": torch.tensor([[*ids[:-1], 5]])}


def test_text_that_a_processor_puts_around_images_is_that_of_each() -> None:
    """In a prompt there may be something between them, so what it makes of two that touch says nothing."""
    processor = Framing(llava())
    (read,) = read_prompts([prompt_of("<image>1<image>", PICTURES[:2])], processor)
    assert read.token_ids == (5, 13, 5, 3, 5, 13, 5)
    alone = [read_prompts([prompt_of("<image>", [picture])], processor)[0].seen for picture in PICTURES[:2]]
    assert torch.equal(read.seen["pixel_values"], torch.cat([seen["pixel_values"] for seen in alone]))


def test_images_whose_tokens_cannot_be_told_apart_are_refused() -> None:
    """Where an image has as many tokens as its place says, the prompt is refused by its number; one image is read."""
    processor = Ordinal(llava())
    assert read_prompts([prompt_of("1<image>", PICTURES[:1])], processor)[0].token_ids == (3, 13)
    with pytest.raises(UnsupportedError, match=r"prompts\[1\] has 2 images .*processor=Ordinal .*; give one image"):
        read_prompts([prompt_of("1", []), prompt_of("<image>1<image>", PICTURES[:2])], processor)


@pytest.mark.parametrize(("text", "num_images", "num_places"), [("1<image>", 0, 1), ("1", 1, 0), ("<image>2", 3, 1)])
def test_as_many_images_as_placeholders_are_needed(text: str, num_images: int, num_places: int) -> None:
    """Another number is refused with the prompt, the placeholder, and both numbers."""
    said = rf"prompts\[1\] has {num_places} placeholders '<image>' \(token 13\) and {num_images} images; give one"
    with pytest.raises(DataError, match=said):
        read_prompts([prompt_of("1", []), prompt_of(text, PICTURES[:num_images])], llava())


def test_without_a_processor_images_are_refused_and_placeholders_are_tokens() -> None:
    """A model of text has no placeholders."""
    (read,) = read_prompts([prompt_of("1<image>", [])], None)
    assert read.token_ids == (3, 13)
    with pytest.raises(UnsupportedError, match=r"prompts\[0\] has images and the engine no processor; pass processor="):
        read_prompts([prompt_of("1<image>", PICTURES[:1])], None)


class Failing(Counting):
    """A processor that refuses every image, or reads them from beside the text."""

    crosses = False

    def __call__(self, **settings: Any) -> Mapping[str, torch.Tensor]:
        if not self.crosses:
            raise ValueError("too\n  thin")
        return {**super().__call__(**settings), "cross_attention_mask": torch.ones(1, 1)}


def test_what_the_processor_cannot_do_is_told() -> None:
    """Its refusal names the image; a model that looks from beside the text, and a missing package, are refused too."""
    failing = Failing(llava())
    with pytest.raises(DataError, match=r"prompts\[0\]\.images\[0\]=.*is refused by the processor \(too thin\)"):
        read_prompts([prompt_of("<image>", PICTURES[:1])], failing)
    failing.crosses = True
    with pytest.raises(UnsupportedError, match="processor=Failing is of a model that does not read images among"):
        read_prompts([prompt_of("<image>", PICTURES[:1])], failing)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PIL images are refused with the command that installs it; text is read."""
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert read_prompts([prompt_of("1", [])], llava())[0].token_ids == (3,)
    with pytest.raises(MissingPackageError, match=r"pip install 'lightrft\[images\]'"):
        read_prompts(
            [Prompt(token_ids=(13,), images=(as_image(RANDOM.integers(0, 2, (1, 1, 3), dtype=np.uint8)),))], llava()
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_images_of_several_sequences_are_put_together(side: Any) -> None:
    """Rows follow one another, fewer tiles are filled with zeros, integers stay, and text alone gives nothing."""
    processor = idefics3(tiles=True)
    read = read_prompts(
        [prompt_of("1<image>", PICTURES[1:2]), prompt_of("22", []), prompt_of("<image>", PICTURES[:1])], processor
    )
    inputs = inputs_beside(read, length=99, side=side, like=torch.zeros(1, dtype=torch.bfloat16))
    few, many = read[0].seen["pixel_values"], read[2].seen["pixel_values"]
    assert few.shape[1] < many.shape[1]
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["pixel_values"].shape == (2, *many.shape[1:])
    assert inputs["pixel_values"][0, few.shape[1] :].count_nonzero() == 0
    assert torch.equal(inputs["pixel_values"][1], many[0].bfloat16())
    assert inputs["pixel_attention_mask"].dtype == torch.int64
    assert inputs_beside(read[1:2], length=99, side=side, like=torch.zeros(1)) == {}


VIDEOS = build_processor("videos")
VIDEO_ID = int(cast("Any", VIDEOS).video_token_id)
THREE_FRAMES, TWO_FRAMES = (build_video(VideoCase(num_frames=number)) for number in (3, 2))


def shows(*videos: Video) -> Prompt:
    return Prompt(token_ids=(3, *(VIDEO_ID for _ in videos), 4), videos=videos)


def test_every_frame_of_a_video_is_seen() -> None:
    """One token for each frame and one after the last, as this model has it, and the pixels of all of them."""
    (read,) = read_prompts([shows(THREE_FRAMES)], VIDEOS)
    assert read.token_ids == (3, *(VIDEO_ID,) * 4, 4)
    (pixels,) = read.seen.values()
    wanted = np.frombuffer(b"".join(frame.pixels for frame in THREE_FRAMES.frames), np.uint8).reshape(3, 8, 8, 3)
    assert torch.equal((255 * pixels[0]).round().byte(), torch.tensor(wanted).permute(0, 3, 1, 2))


def test_as_many_videos_as_placeholders_are_needed() -> None:
    """Images beside them are counted for themselves."""
    wrong = Prompt(token_ids=(3, VIDEO_ID, VIDEO_ID), videos=(TWO_FRAMES,))
    with pytest.raises(
        DataError, match=r"prompts\[0\] has 2 placeholders '<video>' \(token \d+\) and 1 videos; give one"
    ):
        read_prompts([wrong], VIDEOS)
    images = Prompt(token_ids=(3, VIDEO_ID), images=(TWO_FRAMES.frames[0],), videos=(TWO_FRAMES,))
    with pytest.raises(DataError, match=r"prompts\[0\] has 0 placeholders '<image>' \(token \d+\) and 1 images"):
        read_prompts([images], VIDEOS)


def test_videos_are_refused_by_a_processor_of_images_and_without_one() -> None:
    """A word for videos is a word like others there."""
    with pytest.raises(
        UnsupportedError, match=r"prompts\[1\] has videos and processor=LlavaProcessor reads none; leave"
    ):
        read_prompts([prompt_of("1", []), shows(TWO_FRAMES)], llava())
    with pytest.raises(UnsupportedError, match=r"prompts\[0\] has videos and the engine no processor; pass processor="):
        read_prompts([shows(TWO_FRAMES)], None)


def test_videos_of_different_lengths_are_not_filled_up_for_a_model_that_reads_them_as_one() -> None:
    """Frames of zeros would be seen; one prompt is refused by its number, and prompts are not put together."""
    with pytest.raises(
        DataError, match=r"prompts\[1\] has videos that its model reads in one tensor, .*as many frames"
    ):
        read_prompts([prompt_of("1", []), shows(THREE_FRAMES, TWO_FRAMES)], VIDEOS)
    read = read_prompts([shows(THREE_FRAMES), shows(TWO_FRAMES)], VIDEOS)
    with pytest.raises(DataError, match="a batch has videos"):
        inputs_beside(read, length=9, side="left", like=torch.zeros(1))


def test_what_is_one_number_for_each_video_keeps_its_digits() -> None:
    """Pixels are of the model's dtype; seconds, from which positions come, would be rounded to others."""
    seen = {"pixel_values_videos": torch.ones(4, 2), "second_per_grid_ts": torch.tensor([1 / 3])}
    inputs = inputs_beside(
        [ModelPrompt(token_ids=(1,), seen=seen)], length=1, side="left", like=torch.zeros(1, dtype=torch.bfloat16)
    )
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16
    assert inputs["second_per_grid_ts"].tolist() == torch.tensor([1 / 3]).tolist()
