"""The engine "hf" with images and videos, beside transformers' own `generate` of each prompt alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import attrs
import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lightrft.backends.collectives.simulated import run_simulated
from lightrft.backends.rollout.hf.engine import build_hf
from lightrft.config import EngineConfig, ModelConfig
from lightrft.errors import DataError, UnsupportedError, WeightSyncError
from lightrft.models.build import build_model
from lightrft.models.images import placeholders_of
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy import Completion, EngineHandle, SamplingParams, StrategyConfig, get_strategy
from lightrft.strategy.protocols import EngineSource, Processor
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
from lightrft.testing.conformance.hold import hold
from lightrft.testing.laws.registry import STRATEGY_LAWS
from lightrft.testing.replicated import build_simulated
from lightrft.testing.subject import subject_of

ONE, TWO, THREE = ImageCase(width=9, height=5, seed=1), ImageCase(seed=2), ImageCase(width=3, height=20, seed=3)
MIXED = (
    VisionPrompt(texts=((3, 4),)),
    VisionPrompt(texts=((3,), (4,)), images=(ONE,)),
    VisionPrompt(texts=((), (5, 6), (8,), (7,)), images=(THREE, ONE, TWO)),
)
LONG, SHORT = VideoCase(num_frames=3, first=ONE), VideoCase(num_frames=1, first=TWO)
VIDEOS = (
    MIXED[0],
    VisionPrompt(texts=((3,), (4,)), videos=(LONG,)),
    VisionPrompt(texts=((), (5, 6), (7,)), videos=(SHORT, attrs.evolve(SHORT, first=THREE))),
)
BOTH = (*VIDEOS, VisionPrompt(texts=((9,), (5, 6), (), (7,)), images=(THREE, ONE), videos=(LONG,)), MIXED[1])
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)
TOKENIZER = build_character_tokenizer("0123456789", words=("<image>", "<video>"))
IMAGE_ID, VIDEO_ID = 12, 13


class QwenProcessor:
    """What the processor of Qwen2.5-VL does with images and videos; transformers' own wants torchvision for videos."""

    def __init__(self) -> None:
        self.image_token, self.image_token_id, self.tokenizer = "<image>", IMAGE_ID, TOKENIZER
        self.video_token, self.video_token_id = "<video>", VIDEO_ID
        self.images = cast("Any", Qwen2VLImageProcessorPil)(
            size={"shortest_edge": 64, "longest_edge": 1024}, patch_size=4, merge_size=2
        )

    def __call__(
        self, *, text: list[str], images: Sequence[Any] = (), videos: Sequence[Any] = (), **settings: Any
    ) -> Mapping[str, torch.Tensor]:
        flat = [each for one in images for each in (one if isinstance(one, list) else [one])]
        inputs = dict(self.images(flat, return_tensors="pt")) if flat else {}
        if videos:
            inputs |= self.read_videos(videos, [told["fps"] for told in settings["video_metadata"]])
        counts = {
            token: [int(grid.prod()) // 4 for grid in inputs.get(f"{kind}_grid_thw", ())]
            for kind, token in (("image", self.image_token), ("video", self.video_token))
        }
        pieces = re.split("(<image>|<video>)", text[0])
        ids = torch.tensor(
            [TOKENIZER.encode("".join(each * counts[each].pop(0) if each in counts else each for each in pieces))]
        )
        return {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int(), **inputs}

    def read_videos(self, videos: Sequence[Any], rates: Sequence[float]) -> dict[str, torch.Tensor]:
        """Return patches of two frames each; an image is a video of two frames that are alike."""
        patches: list[torch.Tensor] = []
        grids: list[torch.Tensor] = []
        for video in videos:
            frames = [np.moveaxis(each.numpy(), 0, -1) if isinstance(each, torch.Tensor) else each for each in video]
            frames += frames[-1:] * (len(frames) % 2)
            read = [self.images([PIL.Image.fromarray(np.array(frame))], return_tensors="pt") for frame in frames]
            still = [each["pixel_values"].unflatten(1, (3, 2, -1)) for each in read]
            patches += [
                torch.stack([a[:, :, 0], b[:, :, 1]], 2).flatten(1)
                for a, b in zip(still[::2], still[1::2], strict=True)
            ]
            grids.append(read[0]["image_grid_thw"][0] * torch.tensor([len(frames) // 2, 1, 1]))
        seconds = torch.tensor([2 / fps for fps in rates])
        return {
            "pixel_values_videos": torch.cat(patches),
            "video_grid_thw": torch.stack(grids),
            "second_per_grid_ts": seconds,
        }


def text_settings(**changes: object) -> dict[str, object]:
    return {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        **changes,
    }


def qwen() -> tuple[PreTrainedModel, Processor]:
    vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
    config = Qwen2_5_VLConfig(
        vision_config={**vision, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config=text_settings(rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]}),
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
    )
    return cast("Any", Qwen2_5_VLForConditionalGeneration)(config), QwenProcessor()


def llava() -> tuple[PreTrainedModel, Processor]:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=Qwen3Config(**cast("Any", text_settings(head_dim=16))),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
    )
    sizes = {"size": {"height": 8, "width": 8}, "crop_size": {"height": 8, "width": 8}}
    processor = cast("Any", LlavaProcessor)(
        image_processor=cast("Any", CLIPImageProcessorPil)(**sizes),
        tokenizer=TOKENIZER,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return cast("Any", LlavaForConditionalGeneration)(config), processor


def onevision() -> tuple[PreTrainedModel, Processor]:
    case = VisionCase(sees="videos", seed=1)
    return cast("PreTrainedModel", build_vision_policy(case)), build_processor("videos")


def idefics3() -> tuple[PreTrainedModel, Processor]:
    return cast("PreTrainedModel", build_vision_policy(VisionCase(seed=1))), build_processor()


def seeded(build: Callable[[], tuple[PreTrainedModel, Processor]]) -> tuple[PreTrainedModel, Processor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = build()
    return model.eval(), processor


def start(model: nn.Module, processor: Processor | None, **settings: Any) -> EngineHandle:
    return build_hf(EngineConfig(**settings)).start(EngineSource(model=model, tokenizer=None, processor=processor))


def ask(handle: EngineHandle, sampling: SamplingParams, cases: Sequence[VisionPrompt] = MIXED) -> list[Completion]:
    processor = handle.processor
    assert processor is not None
    return handle.engine.generate(handle, [prompt_of(case, processor) for case in cases], sampling)


def own_logprobs(model: nn.Module, case: VisionPrompt, processor: Processor, completion: Completion) -> list[float]:
    inputs = inputs_of(case, processor)
    ids = torch.cat([inputs.pop("input_ids")[0], torch.tensor(completion.token_ids)])
    inputs = {
        name: nn.functional.pad(each, (0, len(completion.token_ids))) if name == "mm_token_type_ids" else each
        for name, each in inputs.items()
    }
    with torch.no_grad():
        logits = model(input_ids=ids[None], **inputs).logits[0, -1 - len(completion.token_ids) : -1]
    return torch.log_softmax(logits, -1)[torch.arange(len(logits)), torch.tensor(completion.token_ids)].tolist()


def last_state(model: nn.Module, case: VisionPrompt, processor: Processor) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**inputs_of(case, processor), output_hidden_states=True).hidden_states[-1][0, -1]
    return output


def own_best(model: nn.Module, case: VisionPrompt, processor: Processor) -> int:
    with torch.no_grad():
        return int(model(**inputs_of(case, processor)).logits[0, -1].argmax())


@pytest.mark.parametrize(
    ("build", "cases"),
    [(idefics3, MIXED), (llava, MIXED), (onevision, MIXED), (qwen, MIXED), (onevision, VIDEOS), (qwen, BOTH)],
    ids=["idefics3", "llava", "onevision", "qwen", "onevision-videos", "qwen-both"],
)
@pytest.mark.parametrize("batch_size", [1, 64])
def test_text_images_and_videos_in_one_batch_are_what_transformers_generates(
    build: Any, cases: Sequence[VisionPrompt], batch_size: int
) -> None:
    """Token for token, with logprobs within 1e-5 of the model's own forward, whatever else is in the batch.

    Of the models, one writes tokens around each image, one gives images positions of height and width and videos those
    of time, and one reads an image in crops where it is alone, and only videos of one length at once.
    """
    model, processor = seeded(build)
    made = ask(start(model, processor, batch_size=batch_size), GREEDY, cases)
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
        wanted = own_logprobs(model, case, processor, completion)
        assert list(completion.logprobs) == pytest.approx(wanted, abs=1e-5)
    assert len({completion.token_ids for completion in made}) == len(cases)


def test_images_that_touch_are_refused_where_their_positions_cannot_be_counted() -> None:
    """Two grids without text between them are one to transformers."""
    model, processor = seeded(qwen)
    touching = VisionPrompt(texts=((3,), (), (4,)), images=(ONE, TWO))
    with pytest.raises(DataError, match=r"model=Qwen2_5_VLForConditionalGeneration .* put text between"):
        ask(start(model, processor), GREEDY, (*MIXED, touching))


def test_samples_of_a_prompt_with_images_are_drawn_by_the_seed() -> None:
    """Each prompt is given n different samples, the same ones again, and those of its number in a part of the call."""
    model, processor = seeded(qwen)
    handle = start(model, processor)
    sampling = SamplingParams(max_new_tokens=6, n=3, seed=7)
    made = ask(handle, sampling)
    assert ask(handle, sampling) == made
    part = ask(handle, attrs.evolve(sampling, first_prompt=2), MIXED[2:])
    assert [completion.token_ids for completion in part] == [completion.token_ids for completion in made[6:]]
    assert len({completion.token_ids for completion in made}) == 9
    for number, completion in enumerate(made):
        wanted = own_logprobs(model, MIXED[number // 3], processor, completion)
        assert list(completion.logprobs) == pytest.approx(wanted, abs=1e-5)


def test_a_completion_never_has_a_placeholder() -> None:
    """Where it is by far the most likely token, the next one is taken, and logprobs stay those of the model."""
    model, processor = seeded(idefics3)
    with torch.no_grad():
        final = torch.stack([last_state(model, case, processor) for case in MIXED]).sum(0)
        model.get_output_embeddings().weight[processor.image_token_id] = 3 * final / final.norm()
    made = ask(start(model, processor), attrs.evolve(GREEDY, min_new_tokens=2, stop_token_ids=(3,)))
    assert not any(processor.image_token_id in completion.token_ids for completion in made)
    for case, completion in zip(MIXED, made, strict=True):
        assert own_best(model, case, processor) == processor.image_token_id
        wanted = own_logprobs(model, case, processor, completion)
        assert list(completion.logprobs) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_a_processor_goes_with_a_model_that_reads_images() -> None:
    """Beside a model of text it is refused when the engine starts."""
    model = build_model(ModelConfig(hidden_size=16, num_heads=2), TOKENIZER, seed=0)
    with pytest.raises(UnsupportedError, match="processor=Idefics3Processor reads images and model=Qwen3ForCausalLM"):
        start(model, build_processor())


@pytest.mark.parametrize("tied", [True, False])
def test_a_sync_brings_what_sees(tied: bool) -> None:
    """New weights of the vision tower alone arrive, counted by all names, and show in what is made of an image."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    old, other = (build_vision_policy(VisionCase(tied=tied, seed=seed)) for seed in (1, 2))
    new = build_vision_policy(VisionCase(tied=tied, seed=1))
    new.load_state_dict({name: each for name, each in other.state_dict().items() if "vision" in name}, strict=False)
    processor = build_processor()
    with strategy.setup_inference_engine(EngineConfig(), actor=old, processor=processor) as engine:
        before = ask(engine, GREEDY)
        report = strategy.update_engine_weights(engine, new)
        after = ask(engine, GREEDY)
    assert report.num_tensors == len(new.state_dict())
    assert report.max_logprob_difference < 1e-5
    assert before[0].logprobs == after[0].logprobs
    assert before[1].logprobs != after[1].logprobs
    for case, completion in zip(MIXED, after, strict=True):
        assert list(completion.logprobs) == pytest.approx(own_logprobs(new, case, processor, completion), abs=1e-5)


def test_a_sync_that_loses_what_sees_is_noticed() -> None:
    """An engine that keeps its old vision tower agrees on text; the probe shows it an image."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    old, new = (build_vision_policy(VisionCase(seed=seed)) for seed in (1, 2))
    kept = {name: each for name, each in old.state_dict().items() if "vision" in name}
    with strategy.setup_inference_engine(EngineConfig(), actor=old, processor=build_processor()) as engine:
        right = engine.engine

        def put(handle: EngineHandle, tensors: Any) -> None:
            right.put(handle, [(name, kept.get(name, tensor)) for name, tensor in tensors])

        engine.engine = attrs.evolve(right, put=put)
        with pytest.raises(WeightSyncError, match="nats from the trainer's"):
            strategy.update_engine_weights(engine, new)
        engine.engine = right
        assert engine.status == "torn"
        assert strategy.update_engine_weights(engine, new).max_logprob_difference < 1e-5


@pytest.mark.parametrize("world_size", [2, 3])
def test_simulated_ranks_with_images_on_some_of_them_obey_the_law(world_size: int) -> None:
    """Any mixture over two and three ranks gives what one rank gives."""
    subject = subject_of(build_simulated, "strategy", engine=EngineConfig(type="hf"))
    law = STRATEGY_LAWS["rollout.images"]
    report = hold(subject, [law], world_sizes=(world_size,), max_examples=2, ranks="simulated")
    assert [finding.outcome for finding in report.findings] == ["holds"]


def test_processes_with_images_on_some_of_them_obey_the_law() -> None:
    """So it is with two processes that train a sharded model."""
    config = StrategyConfig(strategy="fsdp2")
    subject = subject_of("fsdp2", "strategy", config=config, engine=EngineConfig(type="hf"))
    law = STRATEGY_LAWS["rollout.images"]
    report = hold(subject, [law], world_sizes=(2,), max_examples=1, ranks="processes")
    assert [finding.outcome for finding in report.findings] == ["holds"]


def test_a_video_on_one_rank_and_text_on_another_are_what_one_rank_makes_of_both() -> None:
    """After a sync whose probe has seen a video, by the new weights."""
    old, new = (VisionCase(sees="videos", seed=seed) for seed in (3, 4))
    shares, sampling = ([VIDEOS[1]], [VIDEOS[0], VIDEOS[2]]), SamplingParams(max_new_tokens=4, n=2)

    def program(rank: int) -> list[Completion]:
        strategy = build_simulated(StrategyConfig())
        processor = build_processor("videos")
        with strategy.setup_inference_engine(
            EngineConfig(), actor=build_vision_policy(old), processor=processor
        ) as engine:
            assert strategy.update_engine_weights(engine, build_vision_policy(new)).max_logprob_difference < 1e-5
            mine = [prompt_of(case, processor) for case in shares[rank]]
            return strategy.gather_and_generate(engine, mine, sampling)

    made = [each for rank in run_simulated(2, program) for each in rank]
    whole = ask(
        start(build_vision_policy(new), build_processor("videos")),
        sampling,
        [case for share in shares for case in share],
    )
    assert [each.token_ids for each in made] == [each.token_ids for each in whole]
    assert {each.weight_version for each in made} == {1}


def test_ranks_without_prompts_take_part() -> None:
    """A rank with nothing beside one with three images and one with text."""
    shares = ([MIXED[2]], [], [MIXED[0]])

    def program(rank: int) -> list[Completion]:
        strategy = build_simulated(StrategyConfig())
        processor = build_processor()
        actor = build_vision_policy(VisionCase(seed=3))
        with strategy.setup_inference_engine(EngineConfig(), actor=actor, processor=processor) as engine:
            mine = [prompt_of(case, processor) for case in shares[rank]]
            return strategy.gather_and_generate(engine, mine, SamplingParams(max_new_tokens=4, n=2))

    made = run_simulated(3, program)
    assert [len(each) for each in made] == [2, 0, 2]
    whole = ask(
        start(build_vision_policy(VisionCase(seed=3)), build_processor()),
        SamplingParams(max_new_tokens=4, n=2),
        [MIXED[2], MIXED[0]],
    )
    for seen, wanted in zip([each for rank in made for each in rank], whole, strict=True):
        assert list(seen.logprobs) == pytest.approx(list(wanted.logprobs), abs=1e-5)
        assert attrs.evolve(seen, logprobs=wanted.logprobs) == wanted
