"""How SGLang is given images: what the processor makes of them, and positions by transformers' own count.

SGLang's processors read texts and files, in processes of their own; here the images of a prompt go to its scheduler as
the tensors that the trainer's model would read.

T tokens
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lightrft.backends.rollout.sglang.package import Sglang
from lightrft.errors import UnsupportedError
from lightrft.models.images import ModelPrompt, inputs_beside
from lightrft.models.positions import has_own_positions, positions_of
from lightrft.strategy.protocols.images import Image, Processor
from lightrft.strategy.protocols.rollout import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["forget_images", "image_inputs"]


def image_inputs(
    package: Sglang, prompt: Prompt, read: ModelPrompt, *, processor: Processor, model: PreTrainedModel
) -> object:
    """Return what SGLang is told of a prompt with images; None for text.

    Args:
        package: SGLang.
        prompt: with placeholders.
        read: the prompt as the model reads it.
        processor: of the model.
        model: gives positions; its weights are not looked at.

    Raises:
        UnsupportedError: what the processor makes of images is in a form of its own.
    """
    if not prompt.images:
        return None
    positions_3T, delta = _positions(read, model)
    return package.schedule_batch.MultimodalProcessorOutput(
        mm_items=[_item(package, prompt.images, read, processor.image_token_id)],
        input_ids=list(read.token_ids),
        im_token_id=processor.image_token_id,
        mrope_positions=positions_3T,
        mrope_position_delta=delta,
    )


def _item(package: Sglang, images: Sequence[Image], read: ModelPrompt, placeholder: int) -> object:
    """Return the images of a prompt as one item, as the processor read them together."""
    seen = dict(read.seen)
    if "pixel_values" not in seen:
        raise UnsupportedError(f"processor gives {sorted(seen)} of images and no pixel_values; use the engine 'hf'.")
    batch = package.schedule_batch
    item = batch.MultimodalDataItem(
        modality=batch.Modality.IMAGE,
        feature=seen.pop("pixel_values"),
        offsets=_runs(read.token_ids, placeholder),
        model_specific_data=seen,
    )
    identity = hashlib.sha256()
    for image in images:
        identity.update(f"{image.width} {image.height} ".encode() + image.pixels)
    item.set_identity(identity.digest())
    return item


def _runs(token_ids: Sequence[int], placeholder: int) -> list[tuple[int, int]]:
    """Return the first and the last place of each run of placeholders."""
    places = {place for place, token in enumerate(token_ids) if token == placeholder}
    firsts = sorted(place for place in places if place - 1 not in places)
    lasts = sorted(place for place in places if place + 1 not in places)
    return list(zip(firsts, lasts, strict=True))


def _positions(read: ModelPrompt, model: PreTrainedModel) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return positions (3, T), and how far the next one is beyond the length; none where the model counts plainly."""
    if not has_own_positions(model):
        return None, None
    token_ids_PT = torch.tensor([read.token_ids])
    beside = inputs_beside([read], length=len(read.token_ids), side="left", like=torch.empty(1))
    positions_3PT, next_P = positions_of(model, token_ids_PT, torch.ones_like(token_ids_PT), beside)
    return positions_3PT[:, 0], (next_P - len(read.token_ids))[:, None]


def forget_images(package: Sglang) -> None:
    """Drop what was computed of images with earlier weights: SGLang keeps it when its other caches are flushed.

    Args:
        package: a running SGLang.
    """
    cache = package.mm_schedule.embedding_cache
    if cache is not None:
        package.mm_schedule.init_mm_embedding_cache(cache.max_size)
