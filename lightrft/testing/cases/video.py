"""A small policy that reads videos, and its processor, which runs with torchvision and without."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lightrft.models.tokenizer import ModelTokenizer
from lightrft.strategy.protocols import Processor

__all__ = ["build_video_policy", "build_video_processor"]

_SIDE = 8
_PATCH = 4


def build_video_processor(tokenizer: ModelTokenizer) -> Processor:
    """Return a processor of LLaVA-OneVision: one token for each frame and one after the last.

    transformers' own wants torchvision, to resize frames and to check what it is built of. Without that package frames
    are resized by the nearest pixel, and nothing is checked.

    Args:
        tokenizer: has the words "<image>" and "<video>".
    """
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
    from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

    whole: Any = LlavaOnevisionProcessor
    images: Any = LlavaOnevisionImageProcessorPil
    frames: Any = LlavaOnevisionVideoProcessor
    if find_spec("torchvision") is not None:
        # the one that is found where a processor is loaded
        from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor

        images = LlavaOnevisionImageProcessor
    else:
        # under their own names, which transformers looks for where it must know what a part is
        own = {
            "check_argument_for_proper_class": _kind_of,
            "save_pretrained": _save,
            "__qualname__": _Saved.__qualname__,
        }
        whole = type(whole.__name__, (whole,), own)
        frames = type(frames.__name__, (frames,), {"resize": _resized})
    size = {"height": _SIDE, "width": _SIDE}
    return cast(
        "Processor",
        whole(
            image_processor=images(size=size, image_grid_pinpoints=[[_SIDE, _SIDE]], do_convert_rgb=False),
            tokenizer=tokenizer,
            # what is left out here is what needs the newest torchvision
            video_processor=frames(size=size, do_convert_rgb=False, do_normalize=False),
            num_image_tokens=(_SIDE // _PATCH) ** 2,
            vision_feature_select_strategy="full",
        ),
    )


class _Saved:
    """What another process finds by the name of the processor that was made here: it makes it again."""

    @staticmethod
    def from_pretrained(directory: str, **settings: bool) -> Processor:
        from transformers import PreTrainedTokenizerFast

        load = cast("Callable[..., ModelTokenizer]", PreTrainedTokenizerFast.from_pretrained)
        return build_video_processor(load(directory, **settings))


def _save(processor: object, directory: str) -> None:
    cast("Any", processor).tokenizer.save_pretrained(directory)


def _kind_of(processor: object, name: str, part: object) -> type:
    del processor, name
    return type(part)


def _resized(processor: object, image: Tensor, size: object, **settings: object) -> Tensor:
    del processor, settings
    wanted = cast("Any", size)
    resized = interpolate(image.flatten(0, -4).float(), (wanted.height, wanted.width)).to(image.dtype)
    return resized.view(*image.shape[:-2], *resized.shape[-2:])


def build_video_policy(
    *, vocabulary: int, context: int, placeholders: tuple[int, int], tied: bool, seed: int
) -> nn.Module:
    """Return a model of LLaVA-OneVision, in evaluation mode; equal arguments give equal bits.

    Args:
        vocabulary: number of token ids.
        context: tokens that it can take.
        placeholders: token ids that stand for an image and for a video.
        tied: whether the head's weight is the embedding's.
        seed: of the weights.
    """
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    build = cast("Callable[[object], nn.Module]", LlavaOnevisionForConditionalGeneration)
    text = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=64,  # heads of 32, the smallest that vLLM's attention takes on a CPU
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=tied,
    )
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": _SIDE,
        "patch_size": _PATCH,
        "initializer_range": 0.25,
        "vision_use_head": False,
    }
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=text,
        image_token_index=placeholders[0],
        video_token_index=placeholders[1],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[_SIDE, _SIDE]],
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build(config).eval()
