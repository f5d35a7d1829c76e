"""Scored completions in, optimizer steps out.

Shapes: B completions, T positions of a padded batch, N positions that predict a completion token, H hidden size,
V vocabulary size, C tokens of one chunk of the fused loss.
"""

from __future__ import annotations

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
from lightrft.data.padding import TokenBatch, pad_completions
from lightrft.errors import ConfigError
from lightrft.models.forward import hidden_states_and_head
from lightrft.strategy.protocols.training import StepResult, Trainable, Training

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    training: Training,
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
    `micro_train_batch_size`.

    Args:
        training: the strategy's training functions.
        trainable: the policy; changed in place.
        completions: B completions, each with at least one token.
        advantages_B: (B,) float32.
        algorithm: loss, clipping, divergence, aggregation.
        temperature: of the sampling; logprobs are those of the policy at this temperature.
        max_new_tokens: the longest completion, in tokens.
        train_batch_size: completions of one optimizer step.
        micro_train_batch_size: completions of one forward and backward.
        reference: frozen reference policy; needed when `kl_coef` is not 0.

    Raises:
        ConfigError: the batch is not made of whole micro-batches.
    """
    if train_batch_size % micro_train_batch_size:
        raise ConfigError(
            f"train_batch_size={train_batch_size} is not divisible by micro_train_batch_size("
            f"{micro_train_batch_size}); use "
            f"{train_batch_size // micro_train_batch_size * micro_train_batch_size or micro_train_batch_size}."
        )
    device = next(trainable.model.parameters()).device
    temperature = temperature or 1.0
    batches = _split(pad_completions(completions).to(device), advantages_B.to(device), micro_train_batch_size)
    per_step = train_batch_size // micro_train_batch_size
    is_off_policy = algorithm.num_epochs * len(batches) > per_step
    batches = [
        _with_logprobs(batch, trainable.model if is_off_policy else None, reference, temperature) for batch in batches
    ]
    steps: list[StepResult] = []
    seen: list[_Seen] = []
    for _ in range(algorithm.num_epochs):
        for start in range(0, len(batches), per_step):
            window = batches[start : start + per_step]
            steps.append(_step(training, trainable, window, algorithm, temperature, max_new_tokens, seen))
    return _summary(steps, seen)


@attrs.frozen(kw_only=True, eq=False)
class _Micro:
    """A micro-batch; what is None is not needed."""

    tokens: TokenBatch
    advantages_B: Tensor
    old_logprobs_N: Tensor | None = None
    reference_logprobs_N: Tensor | None = None


@attrs.frozen(kw_only=True, eq=False)
class _Seen:
    """Sums over the tokens of one micro-batch, as tensors, so that nothing waits for the device before the end."""

    loss: Tensor
    num_tokens: int
    logprobs: Tensor
    clipped: Tensor
    kl: Tensor
    difference: Tensor


def _split(batch: TokenBatch, advantages_B: Tensor, size: int) -> list[_Micro]:
    total = len(advantages_B)
    parts = [range(start, min(start + size, total)) for start in range(0, total, size)]
    return [_Micro(tokens=batch.select(part), advantages_B=advantages_B[part.start : part.stop]) for part in parts]


def _with_logprobs(batch: _Micro, policy: nn.Module | None, reference: nn.Module | None, temperature: float) -> _Micro:
    """Add the logprobs of the policy before its first step, and of the reference, where a model is given."""
    with torch.no_grad():
        old_N = None if policy is None else _logprobs(policy, batch.tokens, temperature)
        reference_N = None if reference is None else _logprobs(reference, batch.tokens, temperature)
    return attrs.evolve(batch, old_logprobs_N=old_N, reference_logprobs_N=reference_N)


def _logprobs(model: nn.Module, tokens: TokenBatch, temperature: float) -> Tensor:
    hidden_NH, weight_VH = _hidden(model, tokens)
    return token_logprobs(hidden_NH, weight_VH, tokens.targets_N, temperature=temperature).logprobs_N


def _hidden(model: nn.Module, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    hidden_BTH, weight_VH = hidden_states_and_head(model, tokens.input_ids_BT)
    hidden_NH = hidden_BTH[tokens.mask_BT]
    return hidden_NH, weight_VH.to(hidden_NH.dtype)


def _step(
    training: Training,
    trainable: Trainable,
    window: Sequence[_Micro],
    algorithm: AlgorithmConfig,
    temperature: float,
    max_new_tokens: int,
    seen: list[_Seen],
) -> StepResult:
    mode = cast("AggregationMode", algorithm.aggregation)
    normaliser = sum(
        normaliser_share(batch.tokens.mask_BT, mode=mode, max_completion_tokens=max_new_tokens) for batch in window
    )
    model, optimizer, scheduler = trainable
    for batch in window[:-1]:
        seen.append(_backward(training, trainable, batch, algorithm, temperature, normaliser))
        training.optimizer_step(optimizer, model, scheduler, is_boundary=False)
    seen.append(_backward(training, trainable, window[-1], algorithm, temperature, normaliser))
    return training.optimizer_step(optimizer, model, scheduler, is_boundary=True)


def _backward(
    training: Training,
    trainable: Trainable,
    batch: _Micro,
    algorithm: AlgorithmConfig,
    temperature: float,
    normaliser: float,
) -> _Seen:
    tokens = batch.tokens
    mode = cast("AggregationMode", algorithm.aggregation)
    per_token_N = {
        "advantages": batch.advantages_B[:, None].expand_as(tokens.mask_BT)[tokens.mask_BT],
        "weights": token_weights(tokens.mask_BT, mode=mode, normaliser=normaliser)[tokens.mask_BT],
        "engine": tokens.engine_logprobs_N,
    }
    if batch.old_logprobs_N is not None:
        per_token_N["old"] = batch.old_logprobs_N
    if batch.reference_logprobs_N is not None:
        per_token_N["reference"] = batch.reference_logprobs_N
    hidden_NH, weight_VH = _hidden(trainable.model, tokens)
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
        loss, logprobs_N = fused.loss, fused.logprobs_N
    else:
        result = token_logprobs(
            hidden_NH,
            weight_VH,
            tokens.targets_N,
            temperature=temperature,
            with_entropy=entropy_weights_N is not None,
        )
        loss = _sequencewise(algorithm, result.logprobs_N, per_token_N, tokens.mask_BT)
        if entropy_weights_N is not None and result.entropy_N is not None:
            loss = loss - (entropy_weights_N * result.entropy_N).sum()
        logprobs_N = result.logprobs_N.detach()
    training.backward(loss, trainable.model, trainable.optimizer, weight=1.0)
    return _look(algorithm, loss.detach(), logprobs_N, per_token_N)


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
        num_tokens=len(logprobs_N),
        logprobs=logprobs_N.sum(),
        clipped=clipped_N.float().sum(),
        kl=KL_ESTIMATORS["k3"](logprobs_N, reference_N).sum(),
        difference=(old_N - per_token_N["engine"]).abs().max(),
    )


def _summary(steps: Sequence[StepResult], seen: Sequence[_Seen]) -> Learned:
    num_tokens = sum(one.num_tokens for one in seen)
    return Learned(
        steps=tuple(steps),
        loss=torch.stack([one.loss for one in seen]).sum().item() / len(steps),
        kl=torch.stack([one.kl for one in seen]).sum().item() / num_tokens,
        entropy=-torch.stack([one.logprobs for one in seen]).sum().item() / num_tokens,
        clipped=torch.stack([one.clipped for one in seen]).sum().item() / num_tokens,
        logprob_difference=torch.stack([one.difference for one in seen]).max().item(),
    )
