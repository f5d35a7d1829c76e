"""What ranks compare before they run one engine together: of the model and of the processor that each was given."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from lightrft.models.images import placeholders_of, read_prompts
from lightrft.strategy.protocols.images import Processor
from lightrft.strategy.protocols.rollout import EngineSource, Prompt
from lightrft.weight_sync.probe import seeing_prompts

__all__ = ["digests_of"]

_PLACE = "name_or_path"
"""How settings end that say where something was read from, which may be another place on every rank."""

_PLAIN = (str, int, float, type(None), torch.dtype)
"""Settings that are written alike wherever they are equal."""


def digests_of(source: EngineSource) -> dict[str, str]:
    """Return of the model and of the processor the kind, and after a "#" a digest of what two of that kind differ in.

    Of a model these are its settings, and the shapes and dtypes of its tensors. Of a processor they are its settings,
    its placeholders, and what it makes of an image and a video.

    Args:
        source: what an engine is started from.
    """
    return {
        "model": _digest(source.model, _of_model(source.model)),
        "processor": _digest(source.processor, _of_processor(source.processor)),
    }


def _of_model(model: nn.Module) -> Iterator[str]:
    yield _settings(getattr(model, "config", None))
    for name, tensor in model.state_dict().items():
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}"


def _of_processor(processor: Processor | None) -> Iterator[str]:
    if processor is not None:
        yield _settings(processor)
        yield from _reading(processor)


def _digest(of: object, words: Iterator[str]) -> str:
    kind = "None" if of is None else type(of).__name__
    return f"{kind}#{hashlib.sha256(chr(10).join(_told(words)).encode()).hexdigest()}"


def _told(words: Iterator[str]) -> Iterator[str]:
    """Yield what is told until something raises, which is told, too: the other ranks wait for a digest."""
    try:
        yield from words
    except Exception as error:  # noqa: BLE001 (whatever it is, it is the same on all ranks, or it is a difference)
        yield type(error).__name__


def _settings(of: object) -> str:
    to_dict: Callable[[], dict[str, object]] = getattr(of, "to_dict", dict)
    return _written(to_dict())


def _written(value: object) -> str:
    """Return a setting as text, without where it or a part of it was read from."""
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return f"{{{', '.join(sorted(f'{key}: {_written(part)}' for key, part in items if not _is_place(key)))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, cast('Sequence[object]', value)))}]"
    return repr(value) if isinstance(value, _PLAIN) else type(value).__name__


def _is_place(key: object) -> bool:
    return str(key).endswith(_PLACE)


def _reading(processor: Processor) -> Iterator[str]:
    """Yield the placeholders, and what becomes of each kind of what is seen."""
    yield _written(placeholders_of(processor))
    for prompt in seeing_prompts(processor, takes=frozenset({"images", "videos"})):
        yield _made_of(prompt, processor)


def _made_of(prompt: Prompt, processor: Processor) -> str:
    try:
        (read,) = read_prompts([prompt], processor)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is the same on all ranks, or it is a difference)
        return type(error).__name__
    seen = {name: _pixels(tensor) for name, tensor in read.seen.items()}
    return _written({"token_ids": read.token_ids, "types": read.types, "seen": seen})


def _pixels(tensor: torch.Tensor) -> str:
    octets = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(octets).hexdigest()}"
