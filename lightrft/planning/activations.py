"""The memory of activations and of the loss, as sums of plain numbers, for decoders built like Llama and Qwen3."""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs

from lightrft.planning.line import Line

__all__ = ["Computing", "DecoderSizes", "activation_lines"]

Computing: TypeAlias = Literal["float32", "autocast", "bfloat16"]
"""How a layer computes: in float32, in bfloat16 operator by operator, or in bfloat16 throughout."""

_FLOAT32, _BFLOAT16 = 4, 2
"""Bytes of a number."""

_OF_LAYER = {
    ("float32", True): (24, 16, 16, 16),
    ("float32", False): (24, 8, 8, 16),
    ("autocast", True): (26, 10, 10, 8),
    ("autocast", False): (26, 4, 4, 8),
    ("bfloat16", True): (16, 10, 10, 8),
    ("bfloat16", False): (16, 4, 4, 8),
}
"""Bytes that a layer keeps for each number of a position's hidden state, queries, keys and feed-forward state, by how
it computes and whether queries and keys have norms of their own."""

_AROUND_LAYERS = {"float32": 12, "autocast": 12, "bfloat16": 8}
"""Bytes kept for each number of a position's last hidden state: the last norm, and the gradient that the loss forms."""


@attrs.frozen(kw_only=True)
class DecoderSizes:
    """What the activations of a decoder follow from.

    Attributes:
        num_layers: its layers.
        hidden: width of the hidden state.
        attention: width of the queries of all heads.
        key_value: width of the keys of all heads, and of the values.
        intermediate: width of the feed-forward state.
        vocabulary: rows of the head.
        has_head_norms: whether queries and keys have norms of their own, as those of Qwen3 have.
    """

    num_layers: int
    hidden: int
    attention: int
    key_value: int
    intermediate: int
    vocabulary: int
    has_head_norms: bool = False


def activation_lines(
    decoder: DecoderSizes, *, num_positions: int, chunk_rows: int, computing: Computing, is_recomputed: bool
) -> list[Line]:
    """Return what the forward pass of a micro-batch keeps for its backward pass, and what the loss needs.

    Both ways to keep activations are there; the one that is not set is not counted.

    Args:
        decoder: the model's sizes.
        num_positions: of the micro-batch.
        chunk_rows: positions whose logits exist at a time.
        computing: how layers compute.
        is_recomputed: whether layers keep their inputs alone (gradient checkpointing).
    """
    layer, words = _bytes_of_layer(decoder, computing)
    around = _AROUND_LAYERS[computing] * decoder.hidden
    width = _BFLOAT16 if computing == "bfloat16" else _FLOAT32
    number = decoder.num_layers
    end = f"{_AROUND_LAYERS[computing]} B x {decoder.hidden}"
    kept = f"{number} layers x {width} B x {decoder.hidden}"
    # a chunk of another dtype than float32 exists in both
    of_logit = _FLOAT32 if width == _FLOAT32 else _FLOAT32 + _BFLOAT16
    return [
        Line(
            name="activations",
            num_bytes=num_positions * (number * layer + around),
            formula=f"{num_positions:,} positions x ({number} layers x ({words}) + {end})",
            place="not counted" if is_recomputed else "device",
        ),
        Line(
            name="activations, recomputed",
            num_bytes=num_positions * (number * width * decoder.hidden + layer + around),
            formula=f"{num_positions:,} positions x ({kept} + {words} + {end})",
            place="device" if is_recomputed else "not counted",
        ),
        Line(
            name="logits chunk",
            num_bytes=of_logit * chunk_rows * decoder.vocabulary,
            formula=f"{of_logit} B x {chunk_rows:,} positions x {decoder.vocabulary:,} tokens",
        ),
        Line(
            name="gradient of the head",
            num_bytes=_FLOAT32 * decoder.vocabulary * decoder.hidden,
            formula=f"{_FLOAT32} B x {decoder.vocabulary:,} tokens x {decoder.hidden:,}",
        ),
    ]


def _bytes_of_layer(decoder: DecoderSizes, computing: Computing) -> tuple[int, str]:
    widths = (decoder.hidden, decoder.attention, decoder.key_value, decoder.intermediate)
    factors = _OF_LAYER[computing, decoder.has_head_norms]
    parts = list(zip(factors, widths, strict=True))
    return sum(factor * width for factor, width in parts), " + ".join(
        f"{factor} B x {width}" for factor, width in parts
    )
