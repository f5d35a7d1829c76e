"""The engine "vllm" or "sglang" with images, beside transformers: `make test-vllm`, `make test-sglang`."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import pytest
import torch
from guests import inside_of, installed
from torch import nn

from lightrft.backends.rollout.sglang import inside
from lightrft.config import EngineConfig
from lightrft.errors import UnsupportedError, WeightSyncError
from lightrft.models.images import placeholders_of
from lightrft.strategy import Completion, EngineHandle, SamplingParams, StrategyConfig, get_strategy
from lightrft.strategy.protocols import Processor
from lightrft.testing.cases.vision import (
    ImageCase,
    VisionCase,
    VisionPrompt,
    build_processor,
    build_vision_policy,
    inputs_of,
    prompt_of,
)

NAME = installed("vllm", "sglang")
pytestmark = pytest.mark.filterwarnings("ignore")

ENGINE = EngineConfig(type=NAME, cache_gb=0.01, batch_size=8)
ONE, TWO, THREE = ImageCase(width=9, height=5, seed=1), ImageCase(seed=2), ImageCase(width=3, height=20, seed=3)
MIXED = (
    VisionPrompt(texts=((3, 4),)),
    VisionPrompt(texts=((3,), (4,)), images=(ONE,)),
    VisionPrompt(texts=((3,), (4,)), images=(TWO,)),
    # two images touch where the model of the laws can tell them apart
    VisionPrompt(texts=((), (5, 6), () if NAME == "vllm" else (8,), (7,)), images=(THREE, ONE, TWO)),
)
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)
HOT = SamplingParams(temperature=1.7, max_new_tokens=6, n=3, seed=5)


def start(engines: ExitStack, model: nn.Module, processor: Processor | None = None) -> EngineHandle:
    strategy = get_strategy(StrategyConfig(strategy="single"))
    return engines.enter_context(strategy.setup_inference_engine(ENGINE, actor=model, processor=processor))


def ask(handle: EngineHandle, sampling: SamplingParams, cases: Sequence[VisionPrompt] = MIXED) -> list[Completion]:
    processor = build_processor()
    return handle.engine.generate(handle, [prompt_of(case, processor) for case in cases], sampling)


def logprob_difference(made: Sequence[Completion], model: nn.Module, sampling: SamplingParams) -> float:
    """Return the largest distance of a logprob from that of the model's own forward of the whole text."""
    processor, differences = build_processor(), [0.0]
    for place, completion in enumerate(made):
        inputs = inputs_of(MIXED[place // sampling.n], processor)
        prompt_ids = inputs.pop("input_ids")[0]
        assert completion.prompt_ids == tuple(prompt_ids.tolist())
        ids = torch.cat([prompt_ids, torch.tensor(completion.token_ids)])
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = nn.functional.pad(types, (0, len(completion.token_ids)))
        with torch.no_grad():
            logits = model(input_ids=ids[None], **inputs).logits[0, len(prompt_ids) - 1 : -1]
        own = torch.log_softmax(logits / (sampling.temperature or 1.0), -1)
        chosen = own.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        differences.append((chosen - torch.tensor(completion.logprobs)).abs().max().item())
    return max(differences)


@pytest.mark.parametrize("tied", [True, False])
def test_images_are_read_as_transformers_reads_them_before_and_after_a_sync(engines: ExitStack, tied: bool) -> None:
    """Text, one image and three in one batch: greedy tokens are those of `generate`; logprobs agree within 1e-5."""
    strategy, processor = get_strategy(StrategyConfig(strategy="single")), build_processor()
    models = [build_vision_policy(VisionCase(tied=tied, seed=seed)) for seed in (1, 2)]
    handle = start(engines, models[0], processor)
    for version, model in enumerate(models):
        if version:
            assert strategy.update_engine_weights(handle, model).max_logprob_difference < 1e-5
        made = ask(handle, GREEDY)
        for case, completion in zip(MIXED, made, strict=True):
            whole = cast("Any", model).generate(
                **inputs_of(case, processor),
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=None,
                suppress_tokens=list(placeholders_of(processor)),
            )
            assert (*completion.prompt_ids, *completion.token_ids) == tuple(whole[0].tolist())
        assert logprob_difference(made, model, GREEDY) < 1e-5
        drawn = ask(handle, HOT)
        assert logprob_difference(drawn, model, HOT) < 1e-5
        assert [c.token_ids for c in ask(handle, HOT)] == [c.token_ids for c in drawn]
        assert {completion.weight_version for completion in drawn} == {version}


def with_other_eyes(case: VisionCase, seed: int) -> nn.Module:
    """Return a policy with the vision tower of another one."""
    model, other = build_vision_policy(case), build_vision_policy(VisionCase(seed=seed)).state_dict()
    eyes = {name: each for name, each in other.items() if "vision" in name or "visual" in name}
    model.load_state_dict(eyes, strict=False)
    return model


def keep_what_was_seen(handle: EngineHandle, patch: pytest.MonkeyPatch) -> None:
    """Let the engine keep what it computed of images when its weights change."""

    def keep(*package: object) -> None:
        del package

    if NAME == "vllm":
        patch.setattr(inside_of(handle).llm.llm_engine, "reset_encoder_cache", keep)
    else:
        patch.setattr(inside, "forget_images", keep)


def test_an_image_that_was_seen_with_old_weights_is_seen_anew(
    engines: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the vision tower changed, the same image gives the new model's logprobs; a kept one is noticed."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    handle = start(engines, build_vision_policy(VisionCase(seed=1)), build_processor())
    before, _ = (ask(handle, GREEDY) for _ in range(2))
    new = with_other_eyes(VisionCase(seed=1), seed=2)
    strategy.update_engine_weights(handle, new)
    after = ask(handle, GREEDY)
    assert logprob_difference(after, new, GREEDY) < 1e-5
    assert after[0].logprobs == pytest.approx(before[0].logprobs, abs=1e-5)  # text has no image to see anew
    assert after[1].logprobs != pytest.approx(before[1].logprobs, abs=1e-3)
    keep_what_was_seen(handle, monkeypatch)
    with pytest.raises(WeightSyncError, match="nats from the trainer's"):
        strategy.update_engine_weights(handle, with_other_eyes(VisionCase(seed=1), seed=3))


def test_asleep_and_closed_nothing_of_images_is_left(engines: ExitStack) -> None:
    """After waking the same completions come; no thread outlives the engine."""
    threads = set(threading.enumerate())
    handle = start(engines, build_vision_policy(VisionCase(seed=1)), build_processor())
    before = ask(handle, HOT)
    handle.engine.sleep(handle)
    handle.engine.wake(handle)
    assert [c.token_ids for c in ask(handle, HOT)] == [c.token_ids for c in before]
    handle.engine.close(handle)
    deadline = time.monotonic() + 60
    while not set(threading.enumerate()) <= threads:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_without_a_processor_a_model_that_reads_images_makes_text(engines: ExitStack) -> None:
    """Its vision tower is left out, weights that see are taken all the same, and images are refused."""
    model, new = (build_vision_policy(VisionCase(seed=seed)) for seed in (1, 2))
    handle = start(engines, model)
    assert logprob_difference(ask(handle, GREEDY, MIXED[:1]), model, GREEDY) < 1e-5
    get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, new)
    (made,) = ask(handle, GREEDY, MIXED[:1])
    assert logprob_difference([made], new, GREEDY) < 1e-5
    assert made.weight_version == 1
    with pytest.raises(UnsupportedError, match=r"prompts\[1\] has images and the engine no processor"):
        ask(handle, GREEDY)
