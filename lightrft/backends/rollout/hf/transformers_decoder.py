"""A decoder that calls a transformers model's own forward, for any architecture that transformers can generate with.

Prompts are padded on the left. The attention mask is always passed, and the positions too where the model takes them.

Shapes: B sequences, P prompts, T columns (tokens), V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import attrs
import torch
from torch.nn.utils.rnn import pad_sequence

from lightrft.backends.rollout.hf.decoder import Decoder
from lightrft.errors import UnsupportedError
from lightrft.models.images import ModelPrompt, inputs_beside
from lightrft.models.positions import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PastCache", "build_transformers_decoder"]


class _Past(Protocol):
    """What is asked of a transformers cache."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None: ...


class _Output(Protocol):
    @property
    def logits(self) -> torch.Tensor: ...

    @property
    def past_key_values(self) -> _Past: ...


@attrs.define(kw_only=True, eq=False)
class PastCache:
    """A handle: everything in it changes while decoding.

    Attributes:
        past: the model's own cache.
        mask_BT: 1 at tokens and 0 at padding, with room for every token to come, int64.
        positions_B: position of the next token of each sequence, int64.
        length: how many columns are written.
    """

    past: _Past
    mask_BT: torch.Tensor
    positions_B: torch.Tensor
    length: int


def build_transformers_decoder(model: PreTrainedModel) -> Decoder[PastCache]:
    """Return a decoder around the model's forward; it copies no weights, so refreshing it does nothing.

    Args:
        model: a causal language model in eval mode while it is used.

    Raises:
        UnsupportedError: the model is not a decoder-only language model.
    """
    if model.config.is_encoder_decoder or not model.can_generate():
        raise UnsupportedError(
            f"model={type(model).__name__} is not a decoder-only language model; use a model of AutoModelForCausalLM."
        )
    accepted = inspect.signature(model.forward).parameters

    def forward(
        token_ids_BT: torch.Tensor,
        cache_mask_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        past: _Past | None,
        beside: Mapping[str, torch.Tensor],
    ) -> _Output:
        optional = {"position_ids": positions_BT, "logits_to_keep": 1}
        return cast(
            "_Output",  # transformers types this call as a Tensor, like every Module's
            model(
                input_ids=token_ids_BT,
                attention_mask=cache_mask_BT,
                past_key_values=past,
                use_cache=True,
                return_dict=True,
                **beside,
                **{name: value for name, value in optional.items() if name in accepted},
            ),
        )

    def prefill(
        prompts: Sequence[Sequence[int]], rows_B: torch.Tensor, max_new_tokens: int, read: Sequence[ModelPrompt] = ()
    ) -> tuple[torch.Tensor, PastCache]:
        token_ids_PT, mask_PT = _pad(prompts, rows_B.device)
        beside = inputs_beside(read, length=token_ids_PT.shape[1], side="left", like=next(model.parameters()))
        positions_PT, next_P = positions_of(model, token_ids_PT, mask_PT, beside)
        output = forward(token_ids_PT, mask_PT, positions_PT, None, beside)
        output.past_key_values.reorder_cache(rows_B)
        room_B = mask_PT.new_ones(len(rows_B), max_new_tokens)
        cache = PastCache(
            past=output.past_key_values,
            mask_BT=torch.cat([mask_PT[rows_B], room_B], dim=-1),
            positions_B=next_P[rows_B],
            length=mask_PT.shape[1],
        )
        return output.logits[:, -1][rows_B], cache

    def step(cache: PastCache, tokens_B: torch.Tensor) -> torch.Tensor:
        mask_BT = cache.mask_BT[:, : cache.length + 1]
        output = forward(tokens_B.unsqueeze(1), mask_BT, cache.positions_B.unsqueeze(1), cache.past, {})
        cache.past = output.past_key_values
        cache.positions_B = cache.positions_B + 1
        cache.length += 1
        return output.logits[:, -1]

    return Decoder(prefill=prefill, step=step, keep_rows=_keep_rows, refresh=_do_nothing, release=_do_nothing)


def _keep_rows(cache: PastCache, rows_B: torch.Tensor) -> None:
    cache.past.reorder_cache(rows_B)
    cache.mask_BT = cache.mask_BT[rows_B]
    cache.positions_B = cache.positions_B[rows_B]


def _do_nothing() -> None:
    """Hold no weights."""


def _pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left-padded ids and their mask; the padding id is 0, which the mask hides."""
    rows = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
    token_ids_PT = pad_sequence(rows, batch_first=True, padding_side="left")
    mask_PT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return token_ids_PT.to(device), mask_PT.to(device)
