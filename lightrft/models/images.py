"""Prompts with images and videos as a model reads them: placeholders replaced, and beside the tokens what it sees.

Nothing here knows a model's own tokens: which one stands for an image, and what it becomes, is asked of the processor.

T tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Literal, TypeAlias, TypeVar, cast

import attrs
import torch
from torch.nn.functional import pad

from lightrft.errors import DataError, MissingPackageError, UnsupportedError
from lightrft.strategy.protocols.images import Image, Processor, Video, VideoProcessor
from lightrft.strategy.protocols.rollout import Prompt

__all__ = [
    "Kind",
    "ModelPrompt",
    "frames_of",
    "frames_shapes",
    "inputs_beside",
    "metadata_of",
    "pil_image",
    "placeholders_of",
    "read_prompts",
]

Kind: TypeAlias = Literal["image", "video"]
"""What a placeholder stands for."""

_TOKENS = ("input_ids", "attention_mask")
"""What the processor says of the tokens and the caller makes anew, as it knows the whole sequence."""

_TYPES = ("token_type_ids", "mm_token_type_ids")
"""What has a number for each token: 0 for text."""

_Value = TypeVar("_Value")

_FRAMES = "pixel_values_videos"
"""What a model reads of videos; where frames were missing, zeros would be frames."""

_CROSSING = "cross_attention_mask"
"""What the processors of models that look at images from beside the text give."""


@attrs.frozen(kw_only=True, eq=False)
class ModelPrompt:
    """A prompt as a model reads it.

    Attributes:
        token_ids: each placeholder is replaced by the tokens that the processor gives its image or video.
        types: by name, a number for each token that says whether it is of one, and of which kind; empty for text.
        seen: by name, tensors with rows of all images or videos, in their order; empty for text.
    """

    token_ids: tuple[int, ...]
    types: Mapping[str, tuple[int, ...]] = attrs.field(factory=dict[str, tuple[int, ...]])
    seen: Mapping[str, torch.Tensor] = attrs.field(factory=dict[str, torch.Tensor])


def placeholders_of(processor: Processor | None) -> dict[int, Kind]:
    """Return the ids of the placeholders of a processor, with what each stands for.

    Args:
        processor: of a model; without one there are none.
    """
    if processor is None:
        return {}
    reads_videos = _as_video_processor(processor)
    videos: dict[int, Kind] = {} if reads_videos is None else {reads_videos.video_token_id: "video"}
    return {**videos, processor.image_token_id: "image"}


def _as_video_processor(processor: object) -> VideoProcessor | None:
    if isinstance(processor, VideoProcessor) and cast("object", processor.video_token_id) is not None:
        return processor
    return None  # those of images alone may have the attributes all the same


def read_prompts(prompts: Sequence[Prompt], processor: Processor | None) -> list[ModelPrompt]:
    """Return prompts as a model reads them, with all images of a prompt in one call of the processor.

    Some processors read an image in crops where it is alone, and without them where others are beside it. Each image is
    read alone, too, which tells where its tokens end; no call is made twice, and the processor is never asked for text.

    Args:
        prompts: any number of prompts, with images and videos or without.
        processor: of the model; without one, placeholders are tokens like others.

    Raises:
        DataError: a prompt has another number of images or videos than of their placeholders, one of them is refused by
            the processor, or its videos differ in a size that the model reads as one; the prompt's index is named.
        UnsupportedError: there are images or videos and no processor that reads them, or one whose model does not read
            them among tokens, or that reads images together so that their tokens cannot be told apart.
        MissingPackageError: there are images and no package PIL.
    """
    read: dict[tuple[Image | Video, ...], ModelPrompt] = {}

    def read_once(seen: tuple[Image | Video, ...], where: str) -> ModelPrompt:
        if seen not in read:
            read[seen] = _read_together(seen, cast("Processor", processor), where=where)
        return read[seen]

    found: list[ModelPrompt] = []
    kinds = placeholders_of(processor)
    for index, prompt in enumerate(prompts):
        _check_kinds(prompt, processor, kinds, index)
        if processor is None:
            found.append(ModelPrompt(token_ids=prompt.token_ids))
            continue
        for kind, seen in _seen(prompt).items():
            _check_count(prompt, processor, kind, len(seen), index)
        images = _images(prompt.images, processor, read_once, index)
        videos = [read_once((video,), f"prompts[{index}].videos[{place}]") for place, video in enumerate(prompt.videos)]
        following = {"image": iter(images), "video": iter(videos)}
        parts = [next(following[kinds[token]]) if token in kinds else None for token in prompt.token_ids]
        found.append(_replaced(prompt, parts, index))
    return found


def _seen(prompt: Prompt) -> dict[Kind, Sequence[Image | Video]]:
    return {"image": prompt.images, "video": prompt.videos}


def inputs_beside(
    prompts: Sequence[ModelPrompt], *, length: int, side: Literal["left", "right"], like: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return what a model reads beside `input_ids` of sequences that hold these prompts; nothing if all are of text.

    Args:
        prompts: the prompts, with images and videos or without.
        length: tokens of each sequence.
        side: where a sequence has what is not its prompt: padding on the left, a completion on the right.
        like: a parameter of the model; gives the device, and the dtype of pixels.

    Raises:
        DataError: videos differ in a size that the model reads as one; see `frames_shapes`.

    Example:
        >>> seen = {"pixel_values": torch.ones(1, 4)}
        >>> sees = ModelPrompt(token_ids=(7,), types={"mm_token_type_ids": (1,)}, seen=seen)
        >>> inputs = inputs_beside([sees, ModelPrompt(token_ids=(1, 2))], length=3, side="left", like=torch.ones(1))
        >>> {name: tensor.tolist() for name, tensor in inputs.items()}
        {'mm_token_type_ids': [[0, 0, 1], [0, 0, 0]], 'pixel_values': [[1.0, 1.0, 1.0, 1.0]]}
    """
    _check_frames(prompts, of="a batch")
    inputs = {name: _joined(tensors) for name, tensors in _by_name([prompt.seen for prompt in prompts]).items()}
    types = {
        name: torch.stack([_placed(prompt.types.get(name, ()), length, side) for prompt in prompts])
        for name in _by_name([prompt.types for prompt in prompts])
    }
    return {name: tensor.to(like.device, _dtype(tensor, like)) for name, tensor in {**types, **inputs}.items()}


def _by_name(records: Sequence[Mapping[str, _Value]]) -> dict[str, list[_Value]]:
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record[name] for record in records if name in record] for name in names}


def _dtype(tensor: torch.Tensor, like: torch.Tensor) -> torch.dtype:
    """Return the model's dtype for pixels; one number for each video, such as seconds, keeps all of its digits."""
    return like.dtype if tensor.is_floating_point() and tensor.dim() > 1 else tensor.dtype


def frames_shapes(prompt: ModelPrompt) -> tuple[int, ...]:
    """Return the sizes that the videos of all prompts of a batch must share; empty where any go together.

    Args:
        prompt: a prompt as the model reads it.
    """
    return tuple(prompt.seen[_FRAMES].shape[1:]) if _FRAMES in prompt.seen else ()


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


def frames_of(video: Video) -> torch.Tensor:
    """Return the frames of a video (frames, 3, height, width), uint8.

    Args:
        video: the video.
    """
    width, height = video.frames[0].width, video.frames[0].height
    pixels = bytearray(b"".join(frame.pixels for frame in video.frames))
    return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, height, width, 3).permute(0, 3, 1, 2).contiguous()


def metadata_of(video: Video) -> dict[str, object]:
    """Return what processors are told of a video beside its frames.

    Args:
        video: the video.
    """
    return {
        "total_num_frames": len(video.frames),
        "frames_indices": list(range(len(video.frames))),
        "fps": video.fps,
        "width": video.frames[0].width,
        "height": video.frames[0].height,
        "duration": len(video.frames) / video.fps,
    }


def _check_kinds(prompt: Prompt, processor: Processor | None, kinds: Mapping[int, Kind], index: int) -> None:
    for kind, seen in _seen(prompt).items():
        if seen and processor is None:
            raise UnsupportedError(
                f"prompts[{index}] has {kind}s and the engine no processor; pass processor= when it is set up, or "
                "leave them out."
            )
        if seen and kind not in kinds.values():
            raise UnsupportedError(
                f"prompts[{index}] has {kind}s and processor={type(processor).__name__} reads none; leave them out."
            )


def _check_count(prompt: Prompt, processor: Processor, kind: Kind, num_seen: int, index: int) -> None:
    token = next((token for token, stands_for in placeholders_of(processor).items() if stands_for == kind), None)
    num_places = prompt.token_ids.count(token) if token is not None else 0
    if num_places != num_seen:
        raise DataError(
            f"prompts[{index}] has {num_places} placeholders {getattr(processor, f'{kind}_token')!r} "
            f"(token {token}) and {num_seen} {kind}s; give one {kind} for each."
        )


def _images(
    images: tuple[Image, ...],
    processor: Processor,
    read_once: Callable[[tuple[Image | Video, ...], str], ModelPrompt],
    index: int,
) -> list[ModelPrompt]:
    """Return a prompt's images as the model reads them beside one another; the first one has what is seen of all."""
    alone = [read_once((image,), f"prompts[{index}].images[{place}]") for place, image in enumerate(images)]
    if len(images) < 2:
        return alone
    where = f"prompts[{index}].images"
    together = read_once(images, where)
    if sum((part.token_ids for part in alone), ()) == together.token_ids:
        return _divided(together, [len(part.token_ids) for part in alone])
    # an image beside others has as many tokens as beside itself
    pairs = [read_once((image, image), where) for image in images]
    halves = [pair.token_ids[: len(pair.token_ids) // 2] for pair in pairs]
    if sum(halves, ()) != together.token_ids:
        if _is_seen_alike(alone, together, processor.image_token_id):  # text that it puts around them became one token
            return alone
        raise UnsupportedError(
            f"prompts[{index}] has {len(images)} images that processor={type(processor).__name__} reads together so "
            "that the tokens of each cannot be told; give one image."
        )
    return _divided(together, list(map(len, halves)))


def _is_seen_alike(alone: Sequence[ModelPrompt], together: ModelPrompt, token: int) -> bool:
    """Return whether what is seen of all images, in as many tokens, is what is seen of each, one after the other."""
    single, num_tokens = _by_name([one.seen for one in alone]), together.token_ids.count(token)
    if not num_tokens or num_tokens != sum(one.token_ids.count(token) for one in alone):
        return False
    return single.keys() == together.seen.keys() and all(
        torch.equal(_joined(single[name]), tensor) for name, tensor in together.seen.items()
    )


def _divided(read: ModelPrompt, lengths: Sequence[int]) -> list[ModelPrompt]:
    """Return parts of the tokens; the first one has what is seen of all."""
    return [
        ModelPrompt(
            token_ids=read.token_ids[start:end],
            types={name: numbers[start:end] for name, numbers in read.types.items()},
            seen={} if start else read.seen,
        )
        for start, end in pairwise(accumulate(lengths, initial=0))
    ]


def _read_together(seen: Sequence[Image | Video], processor: Processor, *, where: str) -> ModelPrompt:
    pictures = [pil_image(one) for one in seen if isinstance(one, Image)]
    try:
        inputs = _read_images(pictures, processor) if pictures else _read_video(cast("Video", seen[0]), processor)
    except Exception as error:  # each processor refuses in its own way
        said = " ".join(str(error).split())[:200] or type(error).__name__
        shown = seen[0] if len(seen) == 1 else list(seen)
        raise DataError(f"{where}={shown!r} is refused by the processor ({said}); give another one.") from error
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


def _read_images(pictures: Sequence[object], processor: Processor) -> Mapping[str, torch.Tensor]:
    # those of one text in a list of their own: else some processors take each for that of a text
    text = processor.image_token * len(pictures)
    return processor(text=[text], images=[pictures], return_tensors="pt", add_special_tokens=False)


def _read_video(video: Video, processor: object) -> Mapping[str, torch.Tensor]:
    asked = cast("VideoProcessor", processor)
    return asked(
        text=[asked.video_token],
        videos=[frames_of(video)],
        video_metadata=[metadata_of(video)],
        do_sample_frames=False,  # each frame that was given is seen
        input_data_format="channels_first",  # it guesses where a frame has three columns
        return_tensors="pt",
        add_special_tokens=False,
    )


def _replaced(prompt: Prompt, parts: Sequence[ModelPrompt | None], index: int) -> ModelPrompt:
    """Return a prompt with each token that has a part replaced by it."""
    seen = [part for part in parts if part is not None]
    _check_frames(seen, of=f"prompts[{index}]")
    token_ids: list[int] = []
    types: dict[str, list[int]] = {name: [] for part in seen for name in part.types}
    for token, part in zip(prompt.token_ids, parts, strict=True):
        of_part = ModelPrompt(token_ids=(token,)) if part is None else part
        token_ids += of_part.token_ids
        for name in types:
            types[name] += of_part.types.get(name, (0,) * len(of_part.token_ids))
    return ModelPrompt(
        token_ids=tuple(token_ids),
        types={name: tuple(numbers) for name, numbers in types.items()},
        seen={name: _joined(tensors) for name, tensors in _by_name([part.seen for part in seen]).items()},
    )


def _check_frames(prompts: Sequence[ModelPrompt], *, of: str) -> None:
    shapes = {shape for shape in map(frames_shapes, prompts) if shape}
    if len(shapes) > 1:
        raise DataError(
            f"{of} has videos that its model reads in one tensor, and they are of {sorted(shapes)}; give all as many "
            "frames."
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
