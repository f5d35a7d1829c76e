"""Scored completions in, optimizer steps out.

Shapes: B completions, T positions of a padded batch, N positions that predict a completion token, H hidden size,
V vocabulary size, C tokens of one chunk of the fused loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import attrs
import torch

from lightrft.algorithms.aggregation import AggregationMode, normaliser_share, token_weights
from lightrft.algorithms.clipping import clip_fraction
from lightrft.algorithms.fused_loss import TokenLoss, fused_policy_loss
from lightrft.algorithms.importance import IMPORTANCE_CORRECTIONS
from lightrft.algorithms.kl import KL_ESTIMATORS
from lightrft.algorithms.logprobs import token_logprobs
from lightrft.algorithms.losses import LOSSES, TOKENWISE_LOSSES
from lightrft.config.sections import AlgorithmConfig
from lightrft.data.padding import TokenBatch, pad_completions, pad_sequences
from lightrft.loops.checks import check_shares
from lightrft.loops.ranks import TrainingOnRanks, num_ranks, shares
from lightrft.models.forward import call_with_head
from lightrft.strategy.protocols.training import StepResult, Trainable, Training

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightrft.strategy.protocols.collectives import Collectives
    from lightrft.strategy.protocols.rollout import Completion

__all__ = ["Learned", "learn"]


@attrs.frozen(kw_only=True)
class Learned:
    """What learning from one rollout did, averaged over its completion tokens where nothing else is said.

    Attributes:
        steps: results of the optimizer steps, in order.
        loss: mean of the steps' losses.
        kl: divergence from the reference model or, without one, from the policy that made the rollout (k3, in nats).
        entropy: estimate of the policy's entropy at the sampling temperature, in nats: minus the mean logprob.
        clipped: share of tokens whose ratio was clipped.
        logprob_difference: largest difference between engine and trainer before the first step, in nats.
    """

    steps: tuple[StepResult, ...]
    loss: float
    kl: float
    entropy: float
    clipped: float
    logprob_difference: float


def learn(
    training: TrainingOnRanks,
    trainable: Trainable,
    completions: Sequence[Completion],
    advantages_B: Tensor,
    *,
    algorithm: AlgorithmConfig,
    temperature: float,
    max_new_tokens: int,
    train_batch_size: int,
    micro_train_batch_size: int,
    reference: nn.Module | None = None,
) -> Learned:
    """Return what was learnt from one rollout: `num_epochs` passes in batches of `train_batch_size` completions.

    Every optimizer step has one normaliser over all of its completions, so that the result does not depend on
    `micro_train_batch_size`, nor on the number of ranks: each takes its share of every batch.

    Args:
        training: the strategy's training functions.
        trainable: the policy; changed in place.
        completions: B completions, each with at least one token; the same on all ranks.
        advantages_B: (B,) float32.
        algorithm: loss, clipping, divergence, aggregation.
        temperature: of the sampling; logprobs are those of the policy at this temperature.
        max_new_tokens: the longest completion, in tokens.
        train_batch_size: completions of one optimizer step, on all ranks together.
        micro_train_batch_size: completions of one forward and backward.
        reference: frozen reference policy; needed when `kl_coef` is not 0.

    Raises:
        ConfigError: the batch is not made of whole micro-batches of all ranks.
    """
    rank, world_size = training.get_rank(), num_ranks(training)
    check_shares(train_batch_size, micro_train_batch_size, world_size)
    device = next(trainable.model.parameters()).device
    temperature = temperature or 1.0
    starts = range(0, len(completions), train_batch_size)
    is_off_policy = algorithm.num_epochs * len(starts) > 1
    policy = trainable.model if is_off_policy else None
    windows: list[list[_Micro]] = []
    for start in starts:
        rows = slice(start, start + train_batch_size)
        parts = shares(len(completions[rows]), world_size)
        batches = _window(
            completions[rows], advantages_B[rows], parts, rank, algorithm, max_new_tokens, micro_train_batch_size
        )
        windows.append([_with_logprobs(_on(batch, device), policy, reference, temperature) for batch in batches])
    seen: list[_Seen] = []
    steps = [
        _step(training, trainable, window, algorithm, temperature, seen)
        for _ in range(algorithm.num_epochs)
        for window in windows
    ]
    num_tokens = algorithm.num_epochs * sum(len(completion.token_ids) for completion in completions)
    return _summary(training, steps, seen, num_tokens, device)


@attrs.frozen(kw_only=True, eq=False)
class _Micro:
    """A micro-batch; what is None is not needed.

    Attributes:
        share: 1, or 0 for a filler, which only keeps the ranks in step.
        tokens: its sequences.
        advantages_B: one a sequence.
        weights_BT: of each token in the loss of the window.
        old_logprobs_N: of the policy before its first step.
        reference_logprobs_N: of the reference.
    """

    share: float
    tokens: TokenBatch
    advantages_B: Tensor
    weights_BT: Tensor
    old_logprobs_N: Tensor | None = None
    reference_logprobs_N: Tensor | None = None


@attrs.frozen(kw_only=True, eq=False)
class _Seen:
    """Sums over the tokens of one micro-batch, as tensors, so that nothing waits for the device before the end."""

    loss: Tensor
    logprobs: Tensor
    clipped: Tensor
    kl: Tensor
    difference: Tensor


def _window(
    completions: Sequence[Completion],
    advantages_B: Tensor,
    parts: Sequence[range],
    rank: int,
    algorithm: AlgorithmConfig,
    max_new_tokens: int,
    size: int,
) -> list[_Micro]:
    """Return a rank's micro-batches of a window, of which every rank has equally many."""
    mode = cast("AggregationMode", algorithm.aggregation)
    normaliser = normaliser_share(_mask(completions), mode=mode, max_completion_tokens=max_new_tokens)
    batches: list[_Micro] = []
    for start in parts[rank][::size]:
        rows = slice(start, min(start + size, parts[rank].stop))
        tokens = pad_completions(completions[rows])
        weights_BT = token_weights(tokens.mask_BT, mode=mode, normaliser=normaliser)
        batches.append(_Micro(share=1.0, tokens=tokens, advantages_B=advantages_B[rows], weights_BT=weights_BT))
    most = max(len(part) for part in parts)
    return batches + [_filler()] * (math.ceil(most / size) - len(batches))


def _mask(completions: Sequence[Completion]) -> Tensor:
    """Return a mask (B, T) with as many tokens in each row as the completion has."""
    lengths_B = torch.tensor([len(completion.token_ids) for completion in completions])
    return torch.arange(int(lengths_B.max()))[None] < lengths_B[:, None]


def _filler() -> _Micro:
    nothing = torch.zeros(1)
    return _Micro(share=0.0, tokens=pad_sequences([[0]], [[0]]), advantages_B=nothing, weights_BT=nothing[:, None])


def _on(batch: _Micro, device: torch.device) -> _Micro:
    return attrs.evolve(
        batch,
        tokens=batch.tokens.to(device),
        advantages_B=batch.advantages_B.to(device),
        weights_BT=batch.weights_BT.to(device),
    )


def _with_logprobs(batch: _Micro, policy: nn.Module | None, reference: nn.Module | None, temperature: float) -> _Micro:
    """Add the logprobs of the policy before its first step, and of the reference, where a model is given."""
    with torch.no_grad():
        old_N = None if policy is None else _logprobs(policy, batch.tokens, temperature)
        reference_N = None if reference is None else _logprobs(reference, batch.tokens, temperature)
    return attrs.evolve(batch, old_logprobs_N=old_N, reference_logprobs_N=reference_N)


def _logprobs(model: nn.Module, tokens: TokenBatch, temperature: float) -> Tensor:
    def logprobs(hidden_BTH: Tensor, weight_VH: Tensor) -> Tensor:
        hidden_NH = hidden_BTH[tokens.mask_BT]
        return token_logprobs(hidden_NH, weight_VH, tokens.targets_N, temperature=temperature).logprobs_N

    return call_with_head(model, tokens.input_ids_BT, logprobs)


def _step(
    training: Training,
    trainable: Trainable,
    window: Sequence[_Micro],
    algorithm: AlgorithmConfig,
    temperature: float,
    seen: list[_Seen],
) -> StepResult:
    model, optimizer, scheduler = trainable
    for batch in window[:-1]:
        seen += _backward(training, trainable, batch, algorithm, temperature, is_boundary=False)
        training.optimizer_step(optimizer, model, scheduler, is_boundary=False)
    seen += _backward(training, trainable, window[-1], algorithm, temperature, is_boundary=True)
    return training.optimizer_step(optimizer, model, scheduler, is_boundary=True)


def _backward(
    training: Training,
    trainable: Trainable,
    batch: _Micro,
    algorithm: AlgorithmConfig,
    temperature: float,
    *,
    is_boundary: bool,
) -> list[_Seen]:
    """Add the gradient of a micro-batch, and return what was seen of it: nothing of a filler."""
    model, optimizer, _ = trainable
    mask_BT = batch.tokens.mask_BT
    per_token_N = {
        "advantages": batch.advantages_B[:, None].expand_as(mask_BT)[mask_BT],
        "weights": batch.weights_BT[mask_BT],
        "engine": batch.tokens.engine_logprobs_N,
    }
    if batch.old_logprobs_N is not None:
        per_token_N["old"] = batch.old_logprobs_N
    if batch.reference_logprobs_N is not None:
        per_token_N["reference"] = batch.reference_logprobs_N
    logprobs: list[Tensor] = []

    def loss_of_head(hidden_BTH: Tensor, weight_VH: Tensor) -> Tensor:
        hidden_NH = hidden_BTH[mask_BT]
        loss, logprobs_N = _loss(algorithm, hidden_NH, weight_VH, batch.tokens, per_token_N, temperature)
        logprobs.append(logprobs_N)
        return loss

    loss = call_with_head(model, batch.tokens.input_ids_BT, loss_of_head)
    training.backward(loss, model, optimizer, weight=batch.share, is_boundary=is_boundary)
    return [_look(algorithm, loss.detach(), logprobs[0], per_token_N)] if batch.share else []


def _loss(
    algorithm: AlgorithmConfig,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    tokens: TokenBatch,
    per_token_N: Mapping[str, Tensor],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and the logprobs without gradient."""
    entropy_weights_N = per_token_N["weights"] * algorithm.entropy_coef if algorithm.entropy_coef else None
    if algorithm.loss in TOKENWISE_LOSSES:
        fused = fused_policy_loss(
            hidden_NH,
            weight_VH,
            tokens.targets_N,
            _tokenwise(algorithm),
            per_token_N,
            temperature=temperature,
            entropy_weights_N=entropy_weights_N,
        )
        return fused.loss, fused.logprobs_N
    result = token_logprobs(
        hidden_NH, weight_VH, tokens.targets_N, temperature=temperature, with_entropy=entropy_weights_N is not None
    )
    loss = _sequencewise(algorithm, result.logprobs_N, per_token_N, tokens.mask_BT)
    if entropy_weights_N is not None and result.entropy_N is not None:
        loss = loss - (entropy_weights_N * result.entropy_N).sum()
    return loss, result.logprobs_N.detach()


def _tokenwise(algorithm: AlgorithmConfig) -> TokenLoss:
    """Return the loss of each token as a function of that token alone."""
    policy_loss = LOSSES[algorithm.loss]

    def token_loss(logprobs_C: Tensor, per_token_C: Mapping[str, Tensor], /) -> Tensor:
        loss_C = policy_loss(
            logprobs_C,
            per_token_C.get("old", logprobs_C.detach()),
            per_token_C["advantages"],
            torch.ones_like(logprobs_C),
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
        )
        return _corrected(algorithm, loss_C, logprobs_C, per_token_C) * per_token_C["weights"]

    return token_loss


def _sequencewise(
    algorithm: AlgorithmConfig, logprobs_N: Tensor, per_token_N: Mapping[str, Tensor], mask_BT: Tensor
) -> Tensor:
    """Return the loss of losses that look at whole sequences, from logprobs laid out as (B, T)."""

    def laid_out(values_N: Tensor) -> Tensor:
        values_BT = torch.zeros(mask_BT.shape, dtype=values_N.dtype, device=values_N.device)
        return values_BT.masked_scatter(mask_BT, values_N)

    loss_BT = LOSSES[algorithm.loss](
        laid_out(logprobs_N),
        laid_out(per_token_N.get("old", logprobs_N.detach())),
        laid_out(per_token_N["advantages"]),
        mask_BT,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
    )
    loss_N = _corrected(algorithm, loss_BT[mask_BT], logprobs_N, per_token_N)
    return (loss_N * per_token_N["weights"]).sum()


def _corrected(
    algorithm: AlgorithmConfig, loss_N: Tensor, logprobs_N: Tensor, per_token_N: Mapping[str, Tensor]
) -> Tensor:
    """Return the loss with the correction for the engine's logprobs and the divergence from the reference."""
    if algorithm.importance_correction != "none":
        trainer_N = per_token_N.get("old", logprobs_N.detach())
        correct = IMPORTANCE_CORRECTIONS[algorithm.importance_correction]
        loss_N = loss_N * correct(trainer_N, per_token_N["engine"], cap=algorithm.importance_cap)
    if "reference" in per_token_N:
        kl_N = KL_ESTIMATORS[algorithm.kl_estimator](logprobs_N, per_token_N["reference"])
        loss_N = loss_N + algorithm.kl_coef * kl_N
    return loss_N


def _look(algorithm: AlgorithmConfig, loss: Tensor, logprobs_N: Tensor, per_token_N: Mapping[str, Tensor]) -> _Seen:
    old_N = per_token_N.get("old", logprobs_N)
    clipped_N = clip_fraction(
        logprobs_N, old_N, per_token_N["advantages"], clip_low=algorithm.clip_low, clip_high=algorithm.clip_high
    )
    reference_N = per_token_N.get("reference", per_token_N["engine"])
    return _Seen(
        loss=loss,
        logprobs=logprobs_N.sum(),
        clipped=clipped_N.float().sum(),
        kl=KL_ESTIMATORS["k3"](logprobs_N, reference_N).sum(),
        difference=(old_N - per_token_N["engine"]).abs().max(),
    )


def _summary(
    collectives: Collectives, steps: Sequence[StepResult], seen: Sequence[_Seen], num_tokens: int, device: torch.device
) -> Learned:
    nothing = torch.zeros(1, device=device)  # of a rank that had fillers alone
    mine = {
        "loss": torch.stack([one.loss for one in seen]).sum()[None] if seen else nothing,
        "kl": torch.stack([one.kl for one in seen]).sum()[None] if seen else nothing,
        "logprobs": torch.stack([one.logprobs for one in seen]).sum()[None] if seen else nothing,
        "clipped": torch.stack([one.clipped for one in seen]).sum()[None] if seen else nothing,
        "difference": torch.stack([one.difference for one in seen]).max()[None] if seen else nothing,
    }
    every = collectives.all_gather(mine)
    return Learned(
        steps=tuple(steps),
        loss=every["loss"].sum().item() / len(steps),
        kl=every["kl"].sum().item() / num_tokens,
        entropy=-every["logprobs"].sum().item() / num_tokens,
        clipped=every["clipped"].sum().item() / num_tokens,
        logprob_difference=every["difference"].max().item(),
    )
