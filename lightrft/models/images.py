"""Prompts with images as a model reads them: placeholders replaced, and beside the tokens what the model sees.

Nothing here knows a model's own tokens: which one stands for an image, and what it becomes, is asked of the processor.

T tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Literal, cast

import attrs
import torch
from torch.nn.functional import pad

from lightrft.errors import DataError, MissingPackageError, UnsupportedError
from lightrft.strategy.protocols.images import Image, Processor
from lightrft.strategy.protocols.rollout import Prompt

__all__ = ["ModelPrompt", "inputs_beside", "pil_image", "read_prompts"]

_TOKENS = ("input_ids", "attention_mask")
"""What the processor says of the tokens and the caller makes anew, as it knows the whole sequence."""

_TYPES = ("token_type_ids", "mm_token_type_ids")
"""What has a number for each token: 0 for text."""

_CROSSING = "cross_attention_mask"
"""What the processors of models that look at images from beside the text give."""


@attrs.frozen(kw_only=True, eq=False)
class ModelPrompt:
    """A prompt as a model reads it.

    Attributes:
        token_ids: each placeholder is replaced by the tokens that the processor gives its image.
        types: by name, a number for each token that says whether it is of an image; empty without images.
        seen: by name, tensors with rows of all images, in their order; empty without images.
    """

    token_ids: tuple[int, ...]
    types: Mapping[str, tuple[int, ...]] = attrs.field(factory=dict[str, tuple[int, ...]])
    seen: Mapping[str, torch.Tensor] = attrs.field(factory=dict[str, torch.Tensor])


def read_prompts(prompts: Sequence[Prompt], processor: Processor | None) -> list[ModelPrompt]:
    """Return prompts as a model reads them; the processor is asked once for each image, and never for text.

    Args:
        prompts: any number of prompts, with images or without.
        processor: of the model; without one, placeholders are tokens like others.

    Raises:
        DataError: a prompt has another number of images than of placeholders, or an image is refused by the processor;
            the prompt's index is named.
        UnsupportedError: there are images and no processor, or one whose model does not read images among tokens.
        MissingPackageError: there are images and no package PIL.
    """
    read: dict[Image, ModelPrompt] = {}
    found: list[ModelPrompt] = []
    for index, prompt in enumerate(prompts):
        if processor is None:
            if prompt.images:
                raise UnsupportedError(
                    f"prompts[{index}] has images and the engine no processor; pass processor= when it is set up, or "
                    "leave them out."
                )
            found.append(ModelPrompt(token_ids=prompt.token_ids))
            continue
        _check_count(prompt, processor, index)
        for place, image in enumerate(prompt.images):
            if image not in read:
                read[image] = _read_image(image, processor, where=f"prompts[{index}].images[{place}]")
        images = [read[image] for image in prompt.images]
        found.append(_replaced(prompt, images, processor) if images else ModelPrompt(token_ids=prompt.token_ids))
    return found


def inputs_beside(
    prompts: Sequence[ModelPrompt], *, length: int, side: Literal["left", "right"], like: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return what a model reads beside `input_ids` of sequences that hold these prompts; nothing if none has images.

    Args:
        prompts: the prompts, with images or without.
        length: tokens of each sequence.
        side: where a sequence has what is not its prompt: padding on the left, a completion on the right.
        like: a parameter of the model; gives the device, and the dtype of what is no integer.

    Example:
        >>> seen = {"pixel_values": torch.ones(1, 4)}
        >>> sees = ModelPrompt(token_ids=(7,), types={"mm_token_type_ids": (1,)}, seen=seen)
        >>> inputs = inputs_beside([sees, ModelPrompt(token_ids=(1, 2))], length=3, side="left", like=torch.ones(1))
        >>> {name: tensor.tolist() for name, tensor in inputs.items()}
        {'mm_token_type_ids': [[0, 0, 1], [0, 0, 0]], 'pixel_values': [[1.0, 1.0, 1.0, 1.0]]}
    """
    with_images = [prompt for prompt in prompts if prompt.seen]
    if not with_images:
        return {}
    inputs = {name: _joined([prompt.seen[name] for prompt in with_images]) for name in with_images[0].seen}
    types = {
        name: torch.stack([_placed(prompt.types.get(name, ()), length, side) for prompt in prompts])
        for name in with_images[0].types
    }
    return {
        name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in {**types, **inputs}.items()
    }


def pil_image(image: Image) -> object:
    """Return an image of the package PIL, which processors take whatever its size.

    Args:
        image: the image.

    Raises:
        MissingPackageError: PIL is not installed.
    """
    try:
        package = import_module("PIL.Image")
    except ImportError as error:
        raise MissingPackageError(
            f"package='pillow' cannot be imported ({error}); run: pip install 'lightrft[images]'."
        ) from error
    return cast("object", package.frombytes("RGB", (image.width, image.height), image.pixels))


def _check_count(prompt: Prompt, processor: Processor, index: int) -> None:
    num_places = prompt.token_ids.count(processor.image_token_id)
    if num_places != len(prompt.images):
        raise DataError(
            f"prompts[{index}] has {num_places} placeholders {processor.image_token!r} "
            f"(token {processor.image_token_id}) and {len(prompt.images)} images; give one image for each."
        )


def _read_image(image: Image, processor: Processor, *, where: str) -> ModelPrompt:
    picture = pil_image(image)
    try:
        inputs = processor(
            text=[processor.image_token], images=[picture], return_tensors="pt", add_special_tokens=False
        )
    except Exception as error:  # each processor refuses in its own way
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{where}={image!r} is refused by the processor ({said}); give another one.") from error
    if _CROSSING in inputs:
        raise UnsupportedError(
            f"processor={type(processor).__name__} is of a model that does not read images among tokens; use one of "
            "another model."
        )
    return ModelPrompt(
        token_ids=tuple(inputs["input_ids"][0].tolist()),
        types={name: tuple(inputs[name][0].tolist()) for name in _TYPES if name in inputs},
        seen={name: tensor for name, tensor in inputs.items() if name not in (*_TOKENS, *_TYPES)},
    )


def _replaced(prompt: Prompt, images: Sequence[ModelPrompt], processor: Processor) -> ModelPrompt:
    token_ids: list[int] = []
    types: dict[str, list[int]] = {name: [] for name in images[0].types}
    following = iter(images)
    for token in prompt.token_ids:
        image = next(following) if token == processor.image_token_id else None
        token_ids += (token,) if image is None else image.token_ids
        for name in types:
            types[name] += (0,) if image is None else image.types[name]
    return ModelPrompt(
        token_ids=tuple(token_ids),
        types={name: tuple(of_tokens) for name, of_tokens in types.items()},
        seen={name: _joined([image.seen[name] for image in images]) for name in images[0].seen},
    )


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the rows of all tensors; smaller ones are filled with zeros, as transformers does with missing tiles."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return torch.cat([_filled(tensor, largest) for tensor in tensors])


def _filled(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    missing = [size - has for size, has in zip(sizes, tensor.shape[1:], strict=True)]
    if not any(missing):
        return tensor
    # torch counts dimensions from the last, with what is missing before and after
    return pad(tensor, [side for size in reversed(missing) for side in (0, size)])


def _placed(of_tokens: Sequence[int], length: int, side: Literal["left", "right"]) -> torch.Tensor:
    numbers_T = torch.tensor(of_tokens, dtype=torch.int64)
    missing = length - len(of_tokens)
    return pad(numbers_T, (missing, 0) if side == "left" else (0, missing))
