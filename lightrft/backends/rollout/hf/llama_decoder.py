"""A decoder for Llama, Qwen2 and Qwen3 that makes few calls per layer.

transformers spends most of a small model's step outside of its matrix products: this decoder runs the same arithmetic
on fused weights, rotates queries and keys in one complex product, and writes keys and values into preallocated
buffers. Prompts are packed for the matrix products, so padding is never computed.

Shapes: B sequences, P prompts, N packed tokens, H hidden, V vocabulary, D head size, Q query heads, K key-value heads,
A query and key heads (Q + K), G query heads per key-value head (Q / K), R pairs of a head (D / 2), T columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import attrs
import torch
from torch.nn import functional

from lightrft.backends.rollout.hf.decoder import Decoder
from lightrft.backends.rollout.hf.kv_cache import KVCache, allocate_cache, keep_rows
from lightrft.backends.rollout.hf.llama_weights import LayerWeights, ModelShape, read_head, read_layer, read_shape
from lightrft.backends.rollout.projection import Project
from lightrft.errors import EngineStateError
from lightrft.models.images import ModelPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["build_llama_decoder"]

# Tokens per prefill pass: enough to keep the matrix products busy, few enough to bound the activations.
_PREFILL_TOKENS = 4096


class _Attend(Protocol):
    def __call__(self, layer: int, qkv_NAD: torch.Tensor) -> torch.Tensor: ...


@attrs.define(kw_only=True, eq=False)
class _Weights:
    """A handle: `refresh` fills it, `release` empties it."""

    layers: list[LayerWeights]
    head: Project


@attrs.frozen(kw_only=True, eq=False)
class _PromptGroup:
    """Prompts of one length that stand side by side among the packed tokens of a pass.

    Attributes:
        start: packed index of their first token.
        length: tokens per prompt.
        count: number of prompts.
        sequences_B: the cache's sequences that begin with one of them.
        sources_B: for each of these, which of the prompts.
    """

    start: int
    length: int
    count: int
    sequences_B: torch.Tensor
    sources_B: torch.Tensor


def build_llama_decoder(model: PreTrainedModel) -> Decoder[KVCache]:
    """Return a decoder whose logits equal the model's own to within float32 rounding.

    It is built without weights: `refresh` reads them, and must be called again whenever they change.

    Args:
        model: a model that `explain_unsupported` has nothing against. Its train or eval mode makes no difference: the
            decoder has no dropout.
    """
    shape = read_shape(model)
    weights = _Weights(layers=[], head=_refuse)
    embed = model.get_parameter("model.embed_tokens.weight")
    final_norm_H = model.get_parameter("model.norm.weight")

    def compute_logits(hidden_NH: torch.Tensor) -> torch.Tensor:
        return weights.head(_norm(hidden_NH, final_norm_H, shape))

    def prefill(
        prompts: Sequence[Sequence[int]], rows_B: torch.Tensor, max_new_tokens: int, read: Sequence[ModelPrompt] = ()
    ) -> tuple[torch.Tensor, KVCache]:
        del read  # these models see no images
        cache = _allocate(model, shape, [len(prompts[row]) for row in rows_B.tolist()], max_new_tokens)
        last_PH = embed.new_empty(len(prompts), embed.shape[1])
        for chosen in _passes([len(prompt) for prompt in prompts]):
            groups = _group([len(prompts[index]) for index in chosen], chosen, rows_B)
            token_ids_N = torch.tensor([token for index in chosen for token in prompts[index]], device=embed.device)
            positions_N = torch.cat([torch.arange(len(prompts[index]), device=embed.device) for index in chosen])
            hidden_NH = functional.embedding(token_ids_N, embed)
            attend = _attend_to_prompts(cache, shape, groups)
            hidden_NH = _run_layers(hidden_NH, weights.layers, shape, cache.rotations_TR[positions_N], attend)
            ends_P = torch.tensor([len(prompts[index]) for index in chosen], device=embed.device).cumsum(0) - 1
            last_PH[torch.tensor(chosen, device=embed.device)] = hidden_NH[ends_P]
        return compute_logits(last_PH)[rows_B], cache

    def step(cache: KVCache, tokens_B: torch.Tensor) -> torch.Tensor:
        hidden_BH = functional.embedding(tokens_B, embed)
        rotations_BR = cache.rotations_TR[cache.positions_B]
        hidden_BH = _run_layers(hidden_BH, weights.layers, shape, rotations_BR, _attend_to_cache(cache, shape))
        cache.positions_B += 1
        cache.length += 1
        return compute_logits(hidden_BH)

    def refresh() -> None:
        with torch.no_grad():
            # Layer by layer, so that only one layer exists twice at a time.
            for layer in range(shape.num_layers):
                weights.layers[layer : layer + 1] = [read_layer(model, shape, layer)]
            weights.head = read_head(model)

    def release() -> None:
        weights.layers.clear()
        weights.head = _refuse

    return Decoder(prefill=prefill, step=step, keep_rows=keep_rows, refresh=refresh, release=release)


def _refuse(inputs_NI: torch.Tensor, /) -> torch.Tensor:
    raise EngineStateError(
        f"weights=None hold nothing to multiply {tuple(inputs_NI.shape)} inputs with; call refresh() before generating."
    )


def _allocate(model: PreTrainedModel, shape: ModelShape, lengths_B: list[int], max_new_tokens: int) -> KVCache:
    # The model's own table of inverse frequencies: the default rotary embedding has no other setting.
    inverse_R = model.get_buffer("model.rotary_emb.inv_freq").float()
    positions_T = torch.arange(max(lengths_B) + max_new_tokens, device=inverse_R.device, dtype=torch.float32)
    angles_TR = torch.outer(positions_T, inverse_R)
    return allocate_cache(
        prompt_lengths=lengths_B,
        max_new_tokens=max_new_tokens,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        rotations_TR=torch.polar(torch.ones_like(angles_TR), angles_TR),
        dtype=torch.float32,
    )


def _passes(lengths_P: Sequence[int]) -> Iterator[list[int]]:
    """Yield the prompts' indices by ascending length, in passes of a bounded number of tokens (or of one prompt)."""
    chosen: list[int] = []
    num_tokens = 0
    for index in sorted(range(len(lengths_P)), key=lengths_P.__getitem__):
        if chosen and num_tokens + lengths_P[index] > _PREFILL_TOKENS:
            yield chosen
            chosen, num_tokens = [], 0
        chosen.append(index)
        num_tokens += lengths_P[index]
    yield chosen


def _group(lengths: Sequence[int], chosen: Sequence[int], rows_B: torch.Tensor) -> list[_PromptGroup]:
    """Return the groups of equal length of a pass, whose prompts come by ascending length."""
    groups: list[_PromptGroup] = []
    start = first = 0
    for length, members in groupby(lengths):
        count = len(list(members))
        prompts = torch.tensor(chosen[first : first + count], device=rows_B.device)
        sequences_B, sources_B = (rows_B.unsqueeze(1) == prompts).nonzero(as_tuple=True)
        groups.append(
            _PromptGroup(start=start, length=length, count=count, sequences_B=sequences_B, sources_B=sources_B)
        )
        start, first = start + count * length, first + count
    return groups


def _run_layers(
    hidden_NH: torch.Tensor,
    layers: Sequence[LayerWeights],
    shape: ModelShape,
    rotations_NR: torch.Tensor,
    attend: _Attend,
) -> torch.Tensor:
    num_rotated = shape.num_heads + shape.num_kv_heads
    num_all = num_rotated + shape.num_kv_heads
    rotations_N1R = rotations_NR.unsqueeze(1)
    for index, layer in enumerate(layers):
        heads_NAD = layer.qkv(_norm(hidden_NH, layer.attention_norm_H, shape)).view(-1, num_all, shape.head_size)
        rotated_NAD = heads_NAD[:, :num_rotated]
        if layer.qk_norm_AD is not None:
            rotated_NAD.copy_(_norm(rotated_NAD, None, shape).mul_(layer.qk_norm_AD))
        pairs_NAR2 = rotated_NAD.view(-1, num_rotated, shape.head_size // 2, 2)
        torch.view_as_complex(pairs_NAR2).mul_(rotations_N1R)
        hidden_NH.add_(layer.attention_output(attend(index, heads_NAD)))
        gate_NI, up_NI = layer.gate_up(_norm(hidden_NH, layer.mlp_norm_H, shape)).chunk(2, dim=-1)
        hidden_NH.add_(layer.down(functional.silu(gate_NI).mul_(up_NI)))
    return hidden_NH


def _norm(inputs: torch.Tensor, weight: torch.Tensor | None, shape: ModelShape) -> torch.Tensor:
    return functional.rms_norm(inputs, inputs.shape[-1:], weight, shape.norm_eps)


def _attend_to_prompts(cache: KVCache, shape: ModelShape, groups: Sequence[_PromptGroup]) -> _Attend:
    """Return causal attention inside each prompt, which also writes the keys and values of every sequence."""

    def attend(layer: int, qkv_NAD: torch.Tensor) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        for group in groups:
            flat = qkv_NAD[group.start : group.start + group.count * group.length]
            heads_PATD = flat.view(group.count, group.length, *flat.shape[1:]).transpose(1, 2)
            query, key_value = heads_PATD[:, : shape.num_heads], heads_PATD[:, shape.num_heads :]
            columns = slice(cache.length - group.length, cache.length)
            cache.layers[layer][group.sequences_B, :, columns] = key_value[group.sources_B]
            key, value = key_value.chunk(2, dim=1)
            output = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            outputs.append(output.transpose(1, 2).reshape(group.count * group.length, -1))
        return torch.cat(outputs)

    return attend


def _attend_to_cache(cache: KVCache, shape: ModelShape) -> _Attend:
    """Return attention of one new token per sequence, whose key and value it writes first.

    The query heads of a group take the place of query positions, so keys and values are never repeated.
    """
    end = cache.length + 1
    bias = None if cache.bias_B11T is None else cache.bias_B11T[..., :end]
    num_kv_heads = shape.num_kv_heads

    def attend(layer: int, qkv_NAD: torch.Tensor) -> torch.Tensor:
        buffer = cache.layers[layer]
        buffer[:, :, end - 1] = qkv_NAD[:, shape.num_heads :]
        query_BKGD = qkv_NAD[:, : shape.num_heads].view(len(qkv_NAD), num_kv_heads, -1, shape.head_size)
        output_BKGD = functional.scaled_dot_product_attention(
            query_BKGD, buffer[:, :num_kv_heads, :end], buffer[:, num_kv_heads:, :end], attn_mask=bias
        )
        return output_BKGD.reshape(len(qkv_NAD), -1)

    return attend
