"""What the decode loop asks of a model: a record of four functions around a cache that only they look into.

Shapes: B sequences, P prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import attrs
import torch

from lightrft.models.images import ModelPrompt

__all__ = ["Decoder", "KeepRows", "Prefill", "RefreshWeights", "ReleaseWeights", "Step"]

CacheT = TypeVar("CacheT")
CacheT_co = TypeVar("CacheT_co", covariant=True)
CacheT_contra = TypeVar("CacheT_contra", contravariant=True)


class Prefill(Protocol[CacheT_co]):
    """Reads the prompts."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        rows_B: torch.Tensor,
        max_new_tokens: int,
        read: Sequence[ModelPrompt] = (),
    ) -> tuple[torch.Tensor, CacheT_co]:
        """Return the logits that follow each sequence's prompt, and a cache of B sequences.

        Law: each prompt is computed once, however many sequences begin with it.

        Args:
            prompts: P prompts of any lengths, each of at least one token.
            rows_B: for each sequence the index of its prompt, int64, on the decoder's device.
            max_new_tokens: how many tokens each sequence will have at most; the cache has room for them.
            read: the same prompts with what the model sees of their images and videos; empty where none has any.

        Returns:
            logits (B, V) that the caller may overwrite, and the cache.
        """
        ...


class Step(Protocol[CacheT_contra]):
    """Reads one token per sequence."""

    def __call__(self, cache: CacheT_contra, tokens_B: torch.Tensor) -> torch.Tensor:
        """Append a token to each sequence, and return the logits (B, V) that follow; the caller may overwrite them.

        Args:
            cache: a cache from `Prefill`; it is changed in place.
            tokens_B: the tokens, int64, one for each of the cache's sequences.
        """
        ...


class KeepRows(Protocol[CacheT_contra]):
    """Drops sequences."""

    def __call__(self, cache: CacheT_contra, rows_B: torch.Tensor) -> None:
        """Keep only some sequences of the cache, in the given order.

        Args:
            cache: a cache from `Prefill`; it is changed in place.
            rows_B: ascending indices of the sequences to keep, int64.
        """
        ...


class RefreshWeights(Protocol):
    """Follows a change of the model's weights."""

    def __call__(self) -> None:
        """Read the model's weights again. Without this call after a change, a decoder may use the old ones."""
        ...


class ReleaseWeights(Protocol):
    """Gives memory back."""

    def __call__(self) -> None:
        """Drop every copy of weights; `RefreshWeights` makes them again, and nothing may be generated before it."""
        ...


@attrs.frozen(kw_only=True, eq=False)
class Decoder(Generic[CacheT]):
    """One way to run a causal language model token by token.

    Attributes:
        prefill: reads the prompts and makes the cache.
        step: reads one token per sequence.
        keep_rows: drops finished sequences from the cache.
        refresh: follows a change of the model's weights.
        release: drops copies of weights.
    """

    prefill: Prefill[CacheT]
    step: Step[CacheT]
    keep_rows: KeepRows[CacheT]
    refresh: RefreshWeights
    release: ReleaseWeights
