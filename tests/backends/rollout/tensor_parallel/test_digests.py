"""What ranks compare of the models and processors that they were given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import nn

from lightrft.backends.rollout.tensor_parallel.digests import digests_of
from lightrft.strategy.protocols import EngineSource, Processor
from lightrft.testing.cases.vision import VisionCase, build_processor, build_vision_policy


def of_model(change: Callable[[Any], object]) -> str:
    model: Any = build_vision_policy(VisionCase(sees="images"))
    change(model)
    return digests_of(EngineSource(model=model, tokenizer=None))["model"]


def of_processor(processor: Processor | None) -> str:
    return digests_of(EngineSource(model=nn.Linear(1, 1), tokenizer=None, processor=processor))["processor"]


def read_from(place: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for config in (model.config, model.config.text_config, model.config.vision_config):
            config._name_or_path = place

    return change


def test_where_a_model_was_read_from_is_no_difference() -> None:
    """Ranks of two machines have read it from two places, and its parts remember that as it does itself."""
    assert of_model(read_from("/one/place")) == of_model(read_from("another"))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.config, "scale_factor", 7),
        lambda model: setattr(model.config.text_config, "rms_norm_eps", 0.5),
        lambda model: setattr(model, "lm_head", nn.Linear(2, 3)),
        lambda model: model.double(),
    ],
    ids=["setting", "setting of a part", "shape", "dtype"],
)
def test_models_that_differ_have_other_digests(change: Callable[[Any], object]) -> None:
    """In a setting, in one of a part, in a shape or in a dtype."""
    assert of_model(change) != of_model(id)


def changed(**settings: object) -> Processor:
    processor: Any = build_processor()
    for name, value in settings.items():
        setattr(processor.image_processor if hasattr(processor.image_processor, name) else processor, name, value)
    return processor


def test_equal_processors_have_one_digest() -> None:
    """Two that were built alike; none at all is alike, too."""
    assert of_processor(build_processor()) == of_processor(build_processor())
    assert of_processor(None) == of_processor(None) != of_processor(build_processor())


@pytest.mark.parametrize(
    "settings",
    [{"image_token_id": 3}, {"image_seq_len": 2}, {"image_mean": [0.5, 0.5, 0.25]}],
    ids=["placeholder", "tokens", "pixels"],
)
def test_processors_that_differ_have_other_digests(settings: dict[str, object]) -> None:
    """In the placeholder, or in what becomes of an image."""
    assert of_processor(changed(**settings)) != of_processor(build_processor())


@attrs.frozen
class Own:
    """A processor of somebody's own."""

    pixel: float = 0.0
    refuses: str = ""
    largest: int = 1000
    place: str = ""
    image_token: str = "<image>"  # noqa: S105 (a placeholder)
    image_token_id: int = 5

    def __call__(
        self, *, text: list[str], images: Sequence[object], return_tensors: str, add_special_tokens: bool
    ) -> Mapping[str, torch.Tensor]:
        del text, images, return_tensors, add_special_tokens
        if self.refuses:
            raise ValueError(f"{self.refuses} {id(self)}")
        return {"input_ids": torch.tensor([[5, 5]]), "pixel_values": torch.full((1, 2), self.pixel)}

    def to_dict(self) -> dict[str, object]:
        return {"parts": [{"largest": self.largest, "_name_or_path": self.place}]}


@pytest.mark.parametrize(
    "own",
    [{"pixel": 0.5}, {"refuses": "small"}, {"largest": 10}, {"image_token_id": 6}],
    ids=["pixels", "refusal", "setting that a small image does not meet", "placeholder"],
)
def test_a_processor_of_somebodys_own_is_told_by_what_it_reads(own: dict[str, Any]) -> None:
    """By the pixels that a model sees, by what it says of itself, by its placeholder, or that it refuses an image."""
    assert of_processor(Own(**own)) == of_processor(Own(**own, place="elsewhere")) != of_processor(Own())
