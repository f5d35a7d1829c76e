"""A small policy that reads images as grids of patches, and its processor, for engines that know no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from lightrft.models.tokenizer import ModelTokenizer
from lightrft.strategy.protocols import Processor

__all__ = ["build_grid_policy", "build_grid_processor"]

_PATCH = 14  # of every Qwen2.5-VL; SGLang takes patches of other sizes for what the tower has seen already
_MERGED = 2


def build_grid_processor(tokenizer: ModelTokenizer) -> Processor:
    """Return the processor of Qwen2.5-VL: a token for each 28 x 28 pixels, of which an image has few.

    Args:
        tokenizer: has the words "<image>" and "<video>".
    """
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    side = _PATCH * _MERGED
    images: Any = Qwen2VLImageProcessorPil
    videos: Any = Qwen2VLVideoProcessor
    build: Any = Qwen2_5_VLProcessor
    named = cast("Any", tokenizer)
    named.image_token, named.video_token = "<image>", "<video>"
    size = {"shortest_edge": side * side, "longest_edge": 4 * side * side}
    return cast("Processor", build(image_processor=images(size=size), tokenizer=named, video_processor=videos()))


def build_grid_policy(
    *, vocabulary: int, context: int, placeholders: tuple[int, int], tied: bool, seed: int
) -> nn.Module:
    """Return a model of Qwen2.5-VL, in evaluation mode; equal arguments give equal bits.

    Args:
        vocabulary: number of token ids.
        context: tokens that it can take.
        placeholders: token ids that stand for an image and for a video.
        tied: whether the head's weight is the embedding's.
        seed: of the weights.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    build = cast("Callable[[object], nn.Module]", Qwen2_5_VLForConditionalGeneration)
    text: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": context,
        "initializer_range": 0.25,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "tie_word_embeddings": tied,
    }
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 16,
        "depth": 1,
        "num_heads": 1,
        "patch_size": _PATCH,
        "spatial_merge_size": _MERGED,
        "window_size": 4 * _PATCH,
        "fullatt_block_indexes": [0],
        "initializer_range": 0.05,
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=placeholders[0],
        video_token_id=placeholders[1],
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build(config).eval()
