"""Small policies that read images, their processor, and prompts with images, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn

from lightrft.models.installed import require_transformers
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy.protocols import Image, Processor, Prompt

__all__ = [
    "VISION_CONTEXT",
    "VISION_VOCABULARY",
    "ImageCase",
    "Read",
    "VisionCase",
    "VisionPrompt",
    "build_image",
    "build_processor",
    "build_vision_policy",
    "inputs_of",
    "prompt_of",
    "read_by_transformers",
    "vision_cases",
    "vision_prompt_cases",
]

VISION_CONTEXT = 64
"""Tokens that a policy here can take: with the four tokens of an image, three images and a few words."""

_IMAGE = "<image>"
_WORDS = (_IMAGE, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")  # what the processor writes
_ALPHABET = "0123456789"
_NUM_SPECIAL = 2  # of the tokenizer, before its alphabet
_SIDE = 8
_PATCH = 4

VISION_VOCABULARY = _NUM_SPECIAL + len(_ALPHABET) + len(_WORDS)
"""Token ids of every policy here."""


@attrs.frozen(kw_only=True)
class VisionCase:
    """A small vision-language model of transformers, Idefics3.

    Attributes:
        tied: whether the head's weight is the embedding's.
        seed: of the weights.
    """

    tied: bool = False
    seed: int = 0


@attrs.frozen(kw_only=True)
class ImageCase:
    """An image.

    Attributes:
        width: pixels of a row.
        height: number of rows.
        seed: of its pixels.
    """

    width: int = 8
    height: int = 8
    seed: int = 0


@attrs.frozen(kw_only=True)
class VisionPrompt:
    """A prompt in which texts and images take turns.

    Attributes:
        texts: token ids before the first image, between two of them, and after the last one: one more than images.
        images: the images.
    """

    texts: tuple[tuple[int, ...], ...]
    images: tuple[ImageCase, ...] = ()


def build_processor() -> Processor:
    """Return the processor of every policy here: characters, and one tile for each image.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    require_transformers()
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    # transformers leaves both untyped, or typed wider than what they take
    build_images = cast("Callable[..., object]", Idefics3ImageProcessorPil)
    build = cast("Callable[..., Processor]", Idefics3Processor)
    images = build_images(
        size={"longest_edge": _SIDE}, max_image_size={"longest_edge": _SIDE}, do_image_splitting=False
    )
    tokenizer = build_character_tokenizer(_ALPHABET, words=_WORDS)
    return build(image_processor=images, tokenizer=tokenizer, image_seq_len=1)


def build_vision_policy(case: VisionCase) -> nn.Module:
    """Return the model of a case, in evaluation mode; equal cases give equal bits.

    Args:
        case: what to build.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    require_transformers()
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    build = cast("Callable[[object], nn.Module]", Idefics3ForConditionalGeneration)
    text = LlamaConfig(
        vocab_size=VISION_VOCABULARY,
        hidden_size=64,  # heads of 32, the smallest that vLLM's attention takes on a CPU
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=VISION_CONTEXT,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=case.tied,
    )
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": _SIDE,
        "patch_size": _PATCH,
        "initializer_range": 0.25,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=_NUM_SPECIAL + len(_ALPHABET),
        scale_factor=_SIDE // _PATCH,
        pad_token_id=0,
        tie_word_embeddings=case.tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(case.seed)
        return build(config).eval()


def build_image(case: ImageCase) -> Image:
    """Return the image of a case.

    Args:
        case: what to build.
    """
    generator = torch.Generator().manual_seed(case.seed)
    numbers = torch.randint(0, 256, (3 * case.width * case.height,), generator=generator)
    return Image(width=case.width, height=case.height, pixels=bytes(numbers.tolist()))


def prompt_of(case: VisionPrompt, processor: Processor) -> Prompt:
    """Return the prompt that an engine is given.

    Args:
        case: texts and images.
        processor: gives the placeholder.
    """
    token_ids = list(case.texts[0])
    for text in case.texts[1:]:
        token_ids += (processor.image_token_id, *text)
    return Prompt(token_ids=tuple(token_ids), images=tuple(build_image(image) for image in case.images))


def inputs_of(case: VisionPrompt, processor: Processor) -> dict[str, Tensor]:
    """Return what transformers' processor makes of the whole prompt at once: an independent reference.

    Args:
        case: texts and images.
        processor: the processor of `build_processor`.
    """
    import PIL.Image

    tokenizer = cast("Any", processor).tokenizer
    text = processor.image_token.join(tokenizer.decode(list(text)) for text in case.texts)
    images = [build_image(image) for image in case.images]
    pictures = [PIL.Image.frombytes("RGB", (image.width, image.height), image.pixels) for image in images]
    inputs = cast("Any", processor)(
        text=[text], images=[pictures] if pictures else None, return_tensors="pt", add_special_tokens=False
    )
    return {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}


@attrs.frozen(kw_only=True, eq=False)
class Read:
    """Prompts as transformers' own processor reads them, for n completions of each.

    Attributes:
        token_ids: of each prompt, with the tokens of its images.
        beside: what the model is given beside them, for each completion.
    """

    token_ids: list[tuple[int, ...]]
    beside: list[Mapping[str, Tensor]]


def read_by_transformers(cases: Sequence[VisionPrompt], *, n: int) -> Read:
    """Return what transformers' processor makes of whole prompts.

    Args:
        cases: texts and images.
        n: completions of each prompt.
    """
    processor = build_processor()
    inputs = [inputs_of(case, processor) for case in cases]
    token_ids = [tuple(each.pop("input_ids")[0].tolist()) for each in inputs]
    return Read(token_ids=token_ids, beside=[each for each in inputs for _ in range(n)])


def vision_cases() -> SearchStrategy[VisionCase]:
    """Return a strategy for policies, tied and untied."""
    return st.builds(VisionCase, tied=st.booleans(), seed=st.integers(0, 2**31 - 1))


@st.composite
def vision_prompt_cases(
    draw: DrawFn, *, min_prompts: int = 0, max_prompts: int = 4, max_images: int = 3
) -> tuple[VisionPrompt, ...]:
    """Return a strategy for prompts with text alone, one image or many, in any mixture; some images come twice.

    Args:
        draw: hypothesis' own.
        min_prompts: bound on their number.
        max_prompts: bound on their number.
        max_images: bound on the images of each.
    """
    # special tokens are no text, and what the processor writes is its own
    words = st.lists(st.integers(_NUM_SPECIAL, _NUM_SPECIAL + len(_ALPHABET) - 1), max_size=3).map(tuple)
    images = st.builds(ImageCase, width=st.integers(1, 20), height=st.integers(1, 20), seed=st.integers(0, 3))
    prompts: list[VisionPrompt] = []
    for _ in range(draw(st.integers(min_prompts, max_prompts))):
        seen = tuple(draw(st.lists(images, max_size=max_images)))
        first = draw(words) or ((2,) if not seen else ())
        prompts.append(VisionPrompt(texts=(first, *(draw(words) for _ in seen)), images=seen))
    return tuple(prompts)
