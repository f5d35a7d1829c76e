"""Prompts with images as a model reads them, beside what transformers makes of whole texts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import Idefics3Processor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from lightrft.data.images import as_image
from lightrft.errors import DataError, MissingPackageError, UnsupportedError
from lightrft.models.images import inputs_beside, read_prompts
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy import Prompt
from lightrft.strategy.protocols import Processor

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


def prompt_of(text: str, pictures: Sequence[PIL.Image.Image]) -> Prompt:
    return Prompt(token_ids=tuple(TOKENIZER.encode(text)), images=tuple(as_image(each) for each in pictures))


class Counting:
    """A processor that counts its calls."""

    def __init__(self, inner: Processor) -> None:
        self.inner, self.calls = inner, 0
        self.image_token, self.image_token_id = inner.image_token, inner.image_token_id

    def __call__(
        self, *, text: list[str], images: Sequence[object], return_tensors: str, add_special_tokens: bool
    ) -> Mapping[str, torch.Tensor]:
        self.calls += 1
        return self.inner(
            text=text, images=images, return_tensors=return_tensors, add_special_tokens=add_special_tokens
        )


@pytest.mark.parametrize("build", [llava, lambda: idefics3(tiles=False), lambda: idefics3(tiles=True)])
def test_a_prompt_is_read_as_transformers_reads_its_text(build: Any) -> None:
    """One image, and three between texts and side by side, become the tokens and tensors of the whole text."""
    processor = build()
    for text, pictures in [("1<image>2", PICTURES[1:2]), ("<image>34<image><image>5", PICTURES), ("12", [])]:
        (read,) = read_prompts([prompt_of(text, pictures)], processor)
        whole = processor(
            text=[text], images=[pictures] if pictures else None, return_tensors="pt", add_special_tokens=False
        )
        assert list(read.token_ids) == whole["input_ids"][0].tolist()
        assert {"input_ids", "attention_mask", *read.seen} == set(whole)
        for name, tensor in read.seen.items():
            assert tensor[tensor != 0].tolist() == whole[name][whole[name] != 0].tolist()


def test_the_processor_is_asked_once_for_each_image_and_never_for_text() -> None:
    """An image that comes three times is read once; prompts of text alone cost no call."""
    processor = Counting(llava())
    read_prompts([prompt_of("12", []), prompt_of("3", [])], processor)
    assert processor.calls == 0
    first, second = PICTURES[:2]
    read_prompts([prompt_of("<image><image>", [first, second]), prompt_of("1<image>", [first])], processor)
    assert processor.calls == 2


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
