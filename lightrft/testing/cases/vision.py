"""Small policies that read images or videos, their processors, and prompts with them, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias, cast

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn

from lightrft.models.installed import require_transformers
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy.protocols import Image, Processor, Prompt, Video, VideoProcessor
from lightrft.testing.cases.grid import build_grid_policy, build_grid_processor
from lightrft.testing.cases.video import build_video_policy, build_video_processor

__all__ = [
    "VISION_CONTEXT",
    "VISION_VOCABULARY",
    "ImageCase",
    "Read",
    "Seen",
    "VideoCase",
    "VisionCase",
    "VisionPrompt",
    "build_image",
    "build_processor",
    "build_video",
    "build_vision_policy",
    "inputs_of",
    "prompt_of",
    "read_by_transformers",
    "vision_cases",
    "vision_prompt_cases",
]

VISION_CONTEXT = 64
"""Tokens that a policy here can take: with the four tokens of an image, three images and a few words."""

Seen: TypeAlias = Literal["images", "videos"]
"""What a policy reads beside text."""

# what the processor of images writes, and the placeholder of videos
_WORDS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>")
_ALPHABET = "0123456789"
_NUM_SPECIAL = 2  # of the tokenizer, before its alphabet
_SIDE = 8
_PATCH = 4

VISION_VOCABULARY = _NUM_SPECIAL + len(_ALPHABET) + len(_WORDS)
"""Token ids of every policy here."""


@attrs.frozen(kw_only=True)
class VisionCase:
    """A small vision-language model of transformers: Idefics3 for images, LLaVA-OneVision for videos.

    Where SGLang is installed, which knows no Idefics3, it is Qwen2.5-VL for images.

    Attributes:
        sees: what it reads.
        tied: whether the head's weight is the embedding's.
        seed: of the weights.
    """

    sees: Seen = "images"
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
class VideoCase:
    """A video.

    Attributes:
        num_frames: its length.
        first: its first frame; the others differ from it in their pixels.
    """

    num_frames: int = 2
    first: ImageCase = ImageCase()


@attrs.frozen(kw_only=True)
class VisionPrompt:
    """A prompt in which texts and what is seen take turns: images, and then videos.

    Attributes:
        texts: token ids before the first of them, between two, and after the last one: one more than images and videos.
        images: the images.
        videos: the videos.
    """

    texts: tuple[tuple[int, ...], ...]
    images: tuple[ImageCase, ...] = ()
    videos: tuple[VideoCase, ...] = ()


def _reads_grids(sees: Seen) -> bool:
    return sees == "images" and find_spec("sglang") is not None


def build_processor(sees: Seen = "images") -> Processor:
    """Return the processor of the policies here: characters, and one tile for each image or frame.

    Args:
        sees: what the policies read.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    require_transformers()
    tokenizer = build_character_tokenizer(_ALPHABET, words=_WORDS)
    if sees == "videos":
        return build_video_processor(tokenizer)
    if _reads_grids(sees):
        return build_grid_processor(tokenizer)
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    # transformers leaves both untyped, or typed wider than what they take
    build_images = cast("Callable[..., object]", Idefics3ImageProcessorPil)
    build = cast("Callable[..., Processor]", Idefics3Processor)
    images = build_images(
        size={"longest_edge": _SIDE}, max_image_size={"longest_edge": _SIDE}, do_image_splitting=False
    )
    return build(image_processor=images, tokenizer=tokenizer, image_seq_len=1)


def build_vision_policy(case: VisionCase) -> nn.Module:
    """Return the model of a case, in evaluation mode; equal cases give equal bits.

    Args:
        case: what to build.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    require_transformers()
    if case.sees == "videos" or _reads_grids(case.sees):
        build = build_video_policy if case.sees == "videos" else build_grid_policy
        return build(
            vocabulary=VISION_VOCABULARY,
            context=VISION_CONTEXT,
            placeholders=(_NUM_SPECIAL + len(_ALPHABET), VISION_VOCABULARY - 1),
            tied=case.tied,
            seed=case.seed,
        )
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    build_model = cast("Callable[[object], nn.Module]", Idefics3ForConditionalGeneration)
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
        "num_attention_heads": 2,  # so that ranks can share them
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
        return build_model(config).eval()


def build_image(case: ImageCase) -> Image:
    """Return the image of a case.

    Args:
        case: what to build.
    """
    generator = torch.Generator().manual_seed(case.seed)
    numbers = torch.randint(0, 256, (3 * case.width * case.height,), generator=generator)
    return Image(width=case.width, height=case.height, pixels=bytes(numbers.tolist()))


def build_video(case: VideoCase) -> Video:
    """Return the video of a case.

    Args:
        case: what to build.
    """
    seeds = range(case.first.seed, case.first.seed + case.num_frames)
    return Video(frames=tuple(build_image(attrs.evolve(case.first, seed=seed)) for seed in seeds), fps=2.0)


def prompt_of(case: VisionPrompt, processor: Processor) -> Prompt:
    """Return the prompt that an engine is given.

    Args:
        case: texts, images and videos.
        processor: gives the placeholders.
    """
    token_ids = list(case.texts[0])
    placeholders = [processor.image_token_id] * len(case.images)
    if case.videos:
        placeholders += [cast("VideoProcessor", processor).video_token_id] * len(case.videos)
    for placeholder, text in zip(placeholders, case.texts[1:], strict=True):
        token_ids += (placeholder, *text)
    return Prompt(
        token_ids=tuple(token_ids),
        images=tuple(map(build_image, case.images)),
        videos=tuple(map(build_video, case.videos)),
    )


def inputs_of(case: VisionPrompt, processor: Processor) -> dict[str, Tensor]:
    """Return what transformers' processor makes of the whole prompt at once: an independent reference.

    Args:
        case: texts, images and videos.
        processor: of the model.
    """
    asked = cast("Any", processor)
    settings: dict[str, object] = {"return_tensors": "pt", "add_special_tokens": False}
    placeholders = [asked.image_token] * len(case.images)
    if case.images:
        settings["images"] = [[_picture(build_image(image)) for image in case.images]]
    if case.videos:
        videos = [build_video(video) for video in case.videos]
        placeholders += [asked.video_token] * len(videos)
        settings["input_data_format"] = "channels_last"  # it guesses wrong where a frame has three rows
        settings["videos"] = [[_picture(frame) for frame in video.frames] for video in videos]
        settings["video_metadata"] = [
            {"total_num_frames": len(video.frames), "fps": video.fps, "frames_indices": list(range(len(video.frames)))}
            for video in videos
        ]
    texts = [asked.tokenizer.decode(list(text)) for text in case.texts]
    whole = "".join(text + placeholder for text, placeholder in zip(texts, [*placeholders, ""], strict=True))
    inputs = asked(text=[whole], **settings)
    return {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}


def _picture(image: Image) -> object:
    import PIL.Image

    return PIL.Image.frombytes("RGB", (image.width, image.height), image.pixels)


@attrs.frozen(kw_only=True, eq=False)
class Read:
    """Prompts as transformers' own processor reads them, for n completions of each.

    Attributes:
        token_ids: of each prompt, with the tokens of what it sees.
        beside: what the model is given beside them, for each completion.
    """

    token_ids: list[tuple[int, ...]]
    beside: list[Mapping[str, Tensor]]


def read_by_transformers(cases: Sequence[VisionPrompt], *, n: int, sees: Seen = "images") -> Read:
    """Return what transformers' processor makes of whole prompts.

    Args:
        cases: texts, with images or videos.
        n: completions of each prompt.
        sees: what the policy reads.
    """
    processor = build_processor(sees)
    inputs = [inputs_of(case, processor) for case in cases]
    token_ids = [tuple(each.pop("input_ids")[0].tolist()) for each in inputs]
    return Read(token_ids=token_ids, beside=[each for each in inputs for _ in range(n)])


def vision_cases(sees: Seen = "images") -> SearchStrategy[VisionCase]:
    """Return a strategy for policies, tied and untied.

    Args:
        sees: what they read.
    """
    return st.builds(VisionCase, sees=st.just(sees), tied=st.booleans(), seed=st.integers(0, 2**31 - 1))


@st.composite
def vision_prompt_cases(
    draw: DrawFn, *, min_prompts: int = 0, max_prompts: int = 4, max_seen: int = 3, sees: Seen = "images"
) -> tuple[VisionPrompt, ...]:
    """Return a strategy for prompts of text alone, with one image or video or many, in any mixture; some come twice.

    Args:
        draw: hypothesis' own.
        min_prompts: bound on their number.
        max_prompts: bound on their number.
        max_seen: bound on the images or videos of each.
        sees: which of both.
    """
    # special tokens are no text, and what the processor writes is its own; a grid ends where text follows
    digits, least = st.integers(_NUM_SPECIAL, _NUM_SPECIAL + len(_ALPHABET) - 1), int(_reads_grids(sees))
    words = st.lists(digits, min_size=least, max_size=3).map(tuple)
    images = st.builds(ImageCase, width=st.integers(1, 20), height=st.integers(1, 20), seed=st.integers(0, 3))
    prompts: list[VisionPrompt] = []
    for _ in range(draw(st.integers(min_prompts, max_prompts))):
        seen = tuple(draw(st.lists(images, max_size=max_seen)))
        texts = (draw(words) or ((2,) if not seen else ()), *(draw(words) for _ in seen))
        if sees == "images":
            prompts.append(VisionPrompt(texts=texts, images=seen))
            continue
        num_frames = draw(st.integers(1, 3))  # of all videos of a prompt: transformers reads no others together
        videos = tuple(VideoCase(num_frames=num_frames, first=image) for image in seen)
        prompts.append(VisionPrompt(texts=texts, videos=videos))
    return tuple(prompts)
