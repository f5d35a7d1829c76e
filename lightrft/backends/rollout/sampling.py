"""Draws the next token of every sequence of a batch from its logits.

The draw inverts the distribution function at one given uniform number, so it costs one pass over the probabilities and
no random numbers of its own. Nothing is sorted unless top-k or top-p is on.

The returned logprob is the policy's own at the sampling temperature, `log_softmax(logits / temperature)`, whatever
top-k, top-p and banned tokens did to the draw: it is what a trainer computes from the same logits. At temperature 0
the draw is the argmax and the logprob is `log_softmax(logits)`.

Shapes: B sequences, V vocabulary, C candidates or blocks of columns.
"""

from __future__ import annotations

import torch

from lightrft.strategy.protocols.rollout import SamplingParams

__all__ = ["keep_candidates", "sample_tokens"]

# From this vocabulary on, summing blocks and searching twice is faster than one running sum over all columns.
_BLOCKED_FROM = 4096
_BLOCK = 64
# How many most likely tokens are tried for top-p before everything is sorted; a sort of 32768 costs 20 times as much.
_TOP_P_TRIAL = 1024


def sample_tokens(
    logits_BV: torch.Tensor, *, uniforms_B: torch.Tensor, params: SamplingParams, banned_C: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one token per sequence, and its log-probability under the policy.

    Args:
        logits_BV: logits (B, V) of any floating-point type; may be overwritten.
        uniforms_B: float64 numbers (B,) in [0, 1); not used at temperature 0.
        params: temperature, top_p and top_k.
        banned_C: ids (C,) that must not be drawn, int64, or None for none.

    Returns:
        tokens (B,), int64, and logprobs (B,), float32: `log_softmax(logits / temperature)` at the token.
    """
    scaled_BV = logits_BV.float()
    if params.temperature not in (0.0, 1.0):
        scaled_BV = scaled_BV.div_(params.temperature)
    probs_BV = scaled_BV.softmax(-1)
    normaliser_B = _log_normaliser(scaled_BV, probs_BV)
    if banned_C is not None:
        scaled_BV = scaled_BV.index_fill_(1, banned_C, float("-inf"))
        probs_BV = scaled_BV.softmax(-1)
    tokens_B = scaled_BV.argmax(-1) if params.temperature == 0 else _draw(probs_BV, uniforms_B, params)
    return tokens_B, scaled_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1) - normaliser_B


def keep_candidates(probs_BV: torch.Tensor, *, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens that survive top-k and then top-p, most likely first.

    Top-p keeps the smallest number of tokens whose share of what top-k left reaches `top_p`. Among tokens of equal
    probability at a border the choice is torch's, and may differ between devices.

    Args:
        probs_BV: probabilities (B, V), float32.
        top_k: how many tokens to keep; 0 is off.
        top_p: share to reach, in (0, 1]; 1 is off.

    Returns:
        probabilities (B, C) in descending order, float64 and 0 for what was dropped, and ids (B, C), int64.
    """
    vocabulary_size = probs_BV.shape[-1]
    if 0 < top_k < vocabulary_size:
        sorted_BC, ids_BC = probs_BV.topk(top_k, dim=-1)
        total_B1 = sorted_BC.double().sum(-1, keepdim=True)
    else:
        total_B1 = probs_BV.sum(-1, keepdim=True, dtype=torch.float64)
        sorted_BC, ids_BC = _most_likely(probs_BV, top_p * total_B1)
    kept_BC = sorted_BC.double()
    if top_p < 1:
        before_BC = kept_BC.cumsum(-1) - kept_BC
        kept_BC = kept_BC.masked_fill_(before_BC >= top_p * total_B1, 0.0)
    return kept_BC, ids_BC


def _most_likely(probs_BV: torch.Tensor, needed_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most likely tokens in descending order: enough of them to reach the needed mass, or all."""
    if probs_BV.shape[-1] > _TOP_P_TRIAL:
        sorted_BC, ids_BC = probs_BV.topk(_TOP_P_TRIAL, dim=-1)
        if bool((sorted_BC.sum(-1, keepdim=True, dtype=torch.float64) >= needed_B1).all()):
            return sorted_BC, ids_BC
    sorted_BV, ids_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    return sorted_BV, ids_BV


def _log_normaliser(scaled_BV: torch.Tensor, probs_BV: torch.Tensor) -> torch.Tensor:
    """Return logsumexp of each row from its softmax: max(x) - log(max(p)), and max(p) >= 1/V cannot underflow.

    Two maxima cost a tenth of a second pass of exponentials.
    """
    return scaled_BV.amax(-1) - probs_BV.amax(-1).log_()


def _draw(probs_BV: torch.Tensor, uniforms_B: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    uniforms_B1 = uniforms_B.unsqueeze(1)
    if 0 < params.top_k < probs_BV.shape[-1] or params.top_p < 1:
        kept_BC, ids_BC = keep_candidates(probs_BV, top_k=params.top_k, top_p=params.top_p)
        return ids_BC.gather(1, _invert(kept_BC, uniforms_B1)).squeeze(1)
    if probs_BV.shape[-1] < _BLOCKED_FROM:
        return _invert(probs_BV, uniforms_B1).squeeze(1)
    return _invert_blocked(probs_BV, uniforms_B1).squeeze(1)


def _invert(masses_BC: torch.Tensor, uniforms_B1: torch.Tensor) -> torch.Tensor:
    """Return the first column (B, 1) whose cumulative mass exceeds the uniform share of the whole: never one of mass 0.

    The clamps, here and below, are for rows that hold a nan, which the caller reports.
    """
    cumulative_BC = masses_BC.cumsum(-1, dtype=torch.float64)
    targets_B1 = cumulative_BC[:, -1:] * uniforms_B1
    return torch.searchsorted(cumulative_BC, targets_B1, right=True).clamp_(max=masses_BC.shape[-1] - 1)


def _invert_blocked(probs_BV: torch.Tensor, uniforms_B1: torch.Tensor) -> torch.Tensor:
    """Return what `_invert` returns, up to rounding: first the block of columns is found, then the column in it."""
    num_whole = probs_BV.shape[-1] // _BLOCK
    masses_BC = probs_BV[:, : num_whole * _BLOCK].view(-1, num_whole, _BLOCK).sum(-1)
    rest_B1 = probs_BV[:, num_whole * _BLOCK :].sum(-1, keepdim=True)
    cumulative_BC = torch.cat([masses_BC, rest_B1], dim=-1).cumsum(-1, dtype=torch.float64)
    targets_B1 = cumulative_BC[:, -1:] * uniforms_B1
    blocks_B1 = torch.searchsorted(cumulative_BC, targets_B1, right=True).clamp_(max=num_whole)
    below_B1 = torch.where(blocks_B1 > 0, cumulative_BC.gather(1, (blocks_B1 - 1).clamp_(min=0)), 0.0)
    columns_BC = blocks_B1 * _BLOCK + torch.arange(_BLOCK, device=probs_BV.device)
    inside_BC = probs_BV.gather(1, columns_BC.clamp(max=probs_BV.shape[-1] - 1)).double()
    inside_BC = inside_BC.masked_fill_(columns_BC >= probs_BV.shape[-1], 0.0)
    tokens_B1 = columns_BC.gather(1, _find(inside_BC.cumsum(-1), targets_B1 - below_B1))
    return tokens_B1.clamp_(max=probs_BV.shape[-1] - 1)


def _find(cumulative_BC: torch.Tensor, targets_B1: torch.Tensor) -> torch.Tensor:
    """Return the column of each target, which rounding may have put a trifle outside [0, total)."""
    inside_B1 = torch.minimum(targets_B1, cumulative_BC[:, -1:] * (1 - 1e-12)).clamp_(min=0.0)
    return torch.searchsorted(cumulative_BC, inside_B1, right=True).clamp_(max=cumulative_BC.shape[-1] - 1)
