"""Keys and values of the sequences that are being decoded, in buffers that are allocated once per batch.

Sequences are aligned at their prompts' ends: prompts shorter than the longest one have empty columns on the left,
which the attention bias hides. So all sequences write the same column at each step, in one copy per layer.

Shapes: B sequences, K key-value heads, T columns (tokens), D head size, R pairs of a head (D / 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

__all__ = ["KVCache", "allocate_cache", "keep_rows"]


@attrs.define(kw_only=True, eq=False)
class KVCache:
    """A handle: everything in it changes while decoding.

    Attributes:
        layers: for each layer a buffer (B, 2K, T, D): keys in the first K heads, values in the others.
        bias_B11T: added to attention scores, -inf at empty columns; None where there are none.
        positions_B: position of the next token of each sequence, int64.
        rotations_TR: rotary factors exp(i * angle) of each position, complex64.
        length: how many columns are written.
    """

    layers: list[torch.Tensor]
    bias_B11T: torch.Tensor | None
    positions_B: torch.Tensor
    rotations_TR: torch.Tensor
    length: int


def allocate_cache(
    *,
    prompt_lengths: Sequence[int],
    max_new_tokens: int,
    num_layers: int,
    num_kv_heads: int,
    rotations_TR: torch.Tensor,
    dtype: torch.dtype,
) -> KVCache:
    """Return a cache whose columns up to the longest prompt count as written; the caller writes them.

    Args:
        prompt_lengths: tokens in the prompt of each of the B sequences.
        max_new_tokens: tokens that will be generated at most; the last one is never read, so it has no column.
        num_layers: layers of the model.
        num_kv_heads: K.
        rotations_TR: rotary factors of every position that can occur.
        dtype: type of the buffers.
    """
    device = rotations_TR.device
    longest = max(prompt_lengths)
    shape = (len(prompt_lengths), 2 * num_kv_heads, longest + max_new_tokens - 1, 2 * rotations_TR.shape[1])
    lengths_B = torch.tensor(prompt_lengths, device=device)
    # Empty columns are multiplied by a weight of 0, so they must hold numbers: what torch.empty leaves may be nan.
    is_ragged = min(prompt_lengths) < longest
    allocate = torch.zeros if is_ragged else torch.empty
    return KVCache(
        layers=[allocate(shape, dtype=dtype, device=device) for _ in range(num_layers)],
        bias_B11T=_padding_bias(longest - lengths_B, num_columns=shape[2], dtype=dtype) if is_ragged else None,
        positions_B=lengths_B,
        rotations_TR=rotations_TR,
        length=longest,
    )


def keep_rows(cache: KVCache, rows_B: torch.Tensor) -> None:
    """Keep the sequences with the given ascending indices, inside the same buffers.

    Args:
        cache: changed in place.
        rows_B: indices of the sequences to keep, int64.
    """
    count = len(rows_B)
    for layer, buffer in enumerate(cache.layers):
        buffer[:count, :, : cache.length] = buffer[rows_B, :, : cache.length]
        cache.layers[layer] = buffer[:count]
    cache.positions_B = cache.positions_B[rows_B]
    if cache.bias_B11T is not None:
        cache.bias_B11T = cache.bias_B11T[rows_B]


def _padding_bias(num_empty_B: torch.Tensor, *, num_columns: int, dtype: torch.dtype) -> torch.Tensor:
    columns_T = torch.arange(num_columns, device=num_empty_B.device)
    is_empty_BT = columns_T < num_empty_B.unsqueeze(1)
    bias_BT = torch.zeros(is_empty_BT.shape, dtype=dtype, device=num_empty_B.device)
    return bias_BT.masked_fill_(is_empty_BT, float("-inf"))[:, None, None, :]
