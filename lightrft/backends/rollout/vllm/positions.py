"""Positions in vLLM by transformers' own count: after a video, text goes on elsewhere by that of vLLM.

T tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from lightrft.models.images import placeholders_of
from lightrft.models.positions import has_own_positions, positions_of, without_weights
from lightrft.strategy.protocols.images import Processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["count_as_transformers"]

_TYPES = {"image": 1, "video": 2}
"""How transformers numbers the tokens of what is seen; 0 is text."""


class _Field(Protocol):
    data: torch.Tensor


class _Feature(Protocol):
    """What vLLM knows of an image or a video of a prompt."""

    data: Mapping[str, _Field]


_Count = Callable[[list[int], Sequence[_Feature]], tuple[torch.Tensor, int]]


def count_as_transformers(running: nn.Module, model: PreTrainedModel, processor: Processor) -> None:
    """Let vLLM ask transformers where the tokens of a prompt with images or videos stand.

    Args:
        running: vLLM's own model.
        model: the trainer's, whose weights are not looked at.
        processor: of the model.
    """
    if not has_own_positions(model):
        return
    architecture, asked = without_weights(model), cast("Any", running)
    types = {token: _TYPES[kind] for token, kind in placeholders_of(processor).items()}
    count_text: _Count = asked.get_mrope_input_positions

    def get_mrope_input_positions(input_tokens: list[int], mm_features: Sequence[_Feature]) -> tuple[torch.Tensor, int]:
        if not mm_features:
            return count_text(input_tokens, mm_features)
        token_ids_PT = torch.tensor([input_tokens])
        seen = {"mm_token_type_ids": torch.tensor([[types.get(token, 0) for token in input_tokens]])}
        beside = {**seen, **_together([feature.data for feature in mm_features])}
        positions_3PT, next_P = positions_of(architecture, token_ids_PT, torch.ones_like(token_ids_PT), beside)
        return positions_3PT[:, 0], int(next_P) - len(input_tokens)

    asked.get_mrope_input_positions = get_mrope_input_positions


def _together(features: Sequence[Mapping[str, _Field]]) -> dict[str, torch.Tensor]:
    """Return the sizes of all images, of all videos, and what is known of their time."""
    names = dict.fromkeys(name for feature in features for name in feature if not name.startswith("pixel_values"))
    return {name: torch.stack([each[name].data for each in features if name in each]) for name in names}
