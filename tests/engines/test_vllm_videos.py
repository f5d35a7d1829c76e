"""The engine "vllm" with videos and the real vLLM, beside transformers: the second part of `make test-vllm`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, cast

import pytest
import torch
from guests import installed
from torch import nn

from lightrft.config import EngineConfig
from lightrft.errors import EngineStateError, UnsupportedError
from lightrft.models.images import placeholders_of
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy import Completion, SamplingParams, StrategyConfig, get_strategy
from lightrft.strategy.protocols import Processor
from lightrft.testing.cases.grid import build_grid_policy
from lightrft.testing.cases.vision import (
    ImageCase,
    VideoCase,
    VisionCase,
    VisionPrompt,
    build_processor,
    build_vision_policy,
    inputs_of,
    prompt_of,
)

installed("vllm")
pytestmark = pytest.mark.filterwarnings("ignore")

ENGINE = EngineConfig(type="vllm", cache_gb=0.01, batch_size=8)
NARROW, WIDE = ImageCase(width=9, height=5, seed=1), ImageCase(width=13, height=20, seed=3)
LONG, ONE, OTHER = (
    VideoCase(num_frames=number, first=first) for number, first in ((3, NARROW), (1, ImageCase()), (1, WIDE))
)
MIXED = (
    VisionPrompt(texts=((3, 4),)),
    VisionPrompt(texts=((3,), (4,)), videos=(LONG,)),
    VisionPrompt(texts=((), (5, 6), (7,)), videos=(ONE, OTHER)),
    VisionPrompt(texts=((3,), (4,)), images=(NARROW,)),
)
IMAGES = VisionPrompt(texts=((3,), (4,), (5,), (6,)), images=(NARROW, WIDE, ImageCase()))
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)
TOKENIZER = build_character_tokenizer("0123456789", words=("<|image_pad|>", "<|video_pad|>"))  # those of all of Qwen's


def onevision(*, tied: bool, seed: int) -> tuple[nn.Module, Processor]:
    return build_vision_policy(VisionCase(sees="videos", tied=tied, seed=seed)), build_processor("videos")


def qwen2_5_vl(*, tied: bool, seed: int) -> tuple[nn.Module, Processor]:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    images, videos, build = (
        cast("Any", each) for each in (Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen2_5_VLProcessor)
    )
    size = {"shortest_edge": 28**2, "longest_edge": 4 * 28**2}
    processor = build(
        image_processor=images(size=size),
        tokenizer=TOKENIZER,
        # what is left out here is what needs the newest torchvision
        video_processor=videos(size=size, do_convert_rgb=False),
    )
    placeholders = (processor.image_token_id, processor.video_token_id)
    model = build_grid_policy(vocabulary=len(TOKENIZER), context=64, placeholders=placeholders, tied=tied, seed=seed)
    return model, processor


def require_same(
    cases: Sequence[VisionPrompt], made: Sequence[Completion], model: nn.Module, processor: Processor
) -> None:
    """Raise unless completions are what transformers generates, with logprobs of the model's own forward."""
    for case, completion in zip(cases, made, strict=True):
        inputs = inputs_of(case, processor)
        whole = cast("Any", model).generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=list(placeholders_of(processor)),
        )
        assert (*completion.prompt_ids, *completion.token_ids) == tuple(whole[0].tolist())
        del inputs["input_ids"]
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = nn.functional.pad(types, (0, len(completion.token_ids)))
        with torch.no_grad():
            logits = model(input_ids=whole, **inputs).logits[0, len(completion.prompt_ids) - 1 : -1]
        own = torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(own.tolist(), abs=1e-5)


@pytest.mark.skipif(
    find_spec("torchvision") is None or find_spec("mistral_common") is None,
    reason="vLLM reads videos of this model with the packages torchvision and mistral-common",
)
@pytest.mark.parametrize(
    ("build", "tied", "images"),
    [(onevision, True, ()), (onevision, False, ()), (qwen2_5_vl, True, (IMAGES,))],
    ids=["onevision-tied", "onevision", "qwen2_5_vl-tied"],
)
def test_images_and_videos_are_read_as_transformers_reads_them_before_and_after_a_sync(
    build: Any, tied: bool, images: tuple[VisionPrompt, ...]
) -> None:
    """Text, images, one video and two in one batch, of different lengths; the sync's probe has seen a video, too.

    Of the models, one gives what it sees positions of its own, and for one vLLM reads several images of a prompt in
    crops, each as if it were alone: these are refused.
    """
    strategy, cases = get_strategy(StrategyConfig(strategy="single")), (*MIXED, *images)
    (old, processor), (new, _) = (build(tied=tied, seed=seed) for seed in (1, 2))
    prompts = [prompt_of(case, processor) for case in cases]
    with strategy.setup_inference_engine(ENGINE, actor=old, processor=processor) as handle:
        assert "videos" in handle.engine.capabilities
        require_same(cases, handle.engine.generate(handle, prompts, GREEDY), old, processor)
        assert strategy.update_engine_weights(handle, new).max_logprob_difference < 1e-5
        require_same(cases, handle.engine.generate(handle, prompts, GREEDY), new, processor)
        if not images:
            with pytest.raises(
                EngineStateError, match=r"vLLM read \d+ tokens .* not the \d+ of the processor; use the"
            ):
                handle.engine.generate(handle, [prompt_of(IMAGES, processor)], GREEDY)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="with torchvision videos are taken")
def test_without_torchvision_videos_are_refused() -> None:
    """Images are taken all the same."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    film = prompt_of(MIXED[1], build_processor("videos"))
    actor = build_vision_policy(VisionCase())
    with strategy.setup_inference_engine(ENGINE, actor=actor, processor=build_processor()) as handle:
        assert "images" in handle.engine.capabilities
        assert "videos" not in handle.engine.capabilities
        with pytest.raises(UnsupportedError, match=r"prompts\[0\] has videos and the engine 'vllm' takes none"):
            handle.engine.generate(handle, [film], GREEDY)
