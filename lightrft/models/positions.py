"""Where each token of a prompt stands, by the model's own count.

Shapes: P prompts, T columns (tokens).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch.nn.functional import pad

from lightrft.errors import DataError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["has_own_positions", "positions_of", "without_weights"]


def has_own_positions(model: PreTrainedModel) -> bool:
    """Return whether a model gives what it sees positions of height and width.

    Args:
        model: a model of transformers.
    """
    return hasattr(model.base_model, "get_rope_index")


def positions_of(
    model: PreTrainedModel, token_ids_PT: torch.Tensor, mask_PT: torch.Tensor, beside: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the position of each token (P, T), or (3, P, T) where the model gives an image height and width; and next.

    The next one (P) is that of one more token of text: the model says where it is, as it will when it is trained on
    prompt and completion together. After a video it need not follow the largest.

    Args:
        model: a model of transformers; its weights are not looked at.
        token_ids_PT: token ids, int64, padded on the left.
        mask_PT: 1 at tokens and 0 at padding, int64.
        beside: what the model reads beside the tokens; empty for text.

    Raises:
        DataError: two images or videos have no text between them, and the model takes them for one.
    """
    if not beside or not has_own_positions(model):
        positions_PT = (mask_PT.cumsum(-1) - 1).clamp_(min=0)
        return positions_PT, positions_PT[:, -1] + 1
    in_images = cast("Callable[..., tuple[torch.Tensor, torch.Tensor]]", model.base_model.get_rope_index)
    accepted = inspect.signature(in_images).parameters
    settings = {
        name: pad(tensor, (0, 1)) if name.endswith("token_type_ids") else tensor
        for name, tensor in beside.items()
        if name in accepted
    }
    try:
        positions_3PT, _ = in_images(
            input_ids=pad(token_ids_PT, (0, 1)), attention_mask=pad(mask_PT, (0, 1), value=1), **settings
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, StopIteration) as error:  # it takes two grids that touch for one
        raise DataError(
            f"model={type(model).__name__} cannot count where tokens of images or videos stand ({error}); put text "
            "between those that touch."
        ) from error
    return positions_3PT[..., :-1], positions_3PT[0, :, -1]


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model that has the architecture of another one, and no weights.

    Args:
        model: gives the architecture.
    """
    build = cast("Callable[[PretrainedConfig], PreTrainedModel]", type(model))
    with torch.device("meta"):
        return build(copy.deepcopy(model.config))
