"""A policy loss straight from hidden states and head, with its gradients formed in the same pass over the tokens.

Shapes: N tokens, C tokens of one chunk, H hidden size, V vocabulary size.

A loss that is elementwise in tokens tells the gradient of each logprob as soon as that logprob is known. So each chunk
of logits serves for the loss and for its gradients and is never formed twice: three matrix products of N * H * V in
all, which is what a loss with gradients to hidden states and head takes at least.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from lightrft.algorithms.chunked_head import (
    HeadGradients,
    HeadInputs,
    add_head_gradients,
    build_head_gradients,
    build_workspace,
    check_head_inputs,
    chunk_rows,
    exponentiate_,
    fill_logits,
    logit_gradient_,
    refuse_second_derivative,
    wide_dtype,
)
from lightrft.errors import ConfigError, StepError

__all__ = ["FusedLoss", "TokenLoss", "fused_policy_loss"]

_PROBE_MULTIPLE = 64
"""Torch's vectorised loops take 8 to 64 numbers at a time and treat the rest apart."""


class TokenLoss(Protocol):
    """What `fused_policy_loss` calls, once for each chunk of tokens."""

    def __call__(self, logprobs_C: Tensor, per_token_C: Mapping[str, Tensor], /) -> Tensor:
        """Return the weighted loss of each token, (C,); their sum over all tokens is the loss.

        Laws, which make the result independent of how the tokens are cut into chunks:

        - Elementwise: the loss of a token depends on the logprob and the per-token values of that token alone. Whatever
          normalises (the number of tokens, the length of a sequence) is computed before and handed in as a per-token
          weight; `(loss * mask) / mask.sum()` in here would normalise each chunk by itself.
        - Pure: it may be called more often than once for a token.
        - Differentiable in `logprobs_C` by torch. Gradients reach nothing else.

        Args:
            logprobs_C: log-probabilities of the chosen tokens in nats, float32 (float64 for float64 inputs).
            per_token_C: the same tokens' rows of the tensors that were given to `fused_policy_loss`.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class FusedLoss:
    """A loss with what is worth looking at beside it.

    Attributes:
        loss: scalar, float32 (float64 for float64 inputs); its backward hands out the gradients, once.
        logprobs_N: log-probabilities of the chosen tokens in nats, detached.
        entropy_N: entropies in nats, detached; None unless they were asked for.
    """

    loss: Tensor
    logprobs_N: Tensor
    entropy_N: Tensor | None


def fused_policy_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    token_ids_N: Tensor,
    loss_fn: TokenLoss,
    per_token_N: Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_weights_N: Tensor | None = None,
) -> FusedLoss:
    """Return sum(loss_fn(logprobs)) - sum(entropy_weights * entropy), with gradients already formed.

    Gradients go to the hidden states and to the head, where they are asked for and gradients are enabled; otherwise
    nothing is spent on them. Memory beyond the results and the two gradients: one chunk of logits, and for 16-bit
    inputs the gradient of the head in float32, to which the chunks are added. `loss.backward()` scales the gradients in
    place: it can be called once.

    Args:
        hidden_NH: hidden states after the last norm, (N, H), floating point.
        weight_VH: weight of the head, (V, H), same dtype and device.
        token_ids_N: chosen tokens, (N,), int32 or int64.
        loss_fn: the loss of each token; see `TokenLoss` for its laws.
        per_token_N: tensors whose first dimension is N (old logprobs, advantages, weights, ...), none of which may ask
            for a gradient; `loss_fn` gets their rows.
        temperature: the logits are divided by it.
        with_entropy: also return the entropy.
        entropy_weights_N: weight of each token's entropy in the loss, (N,): the coefficient of an entropy bonus times
            the token's share in the mean. Implies `with_entropy`; costs a few more passes over each chunk of logits.

    Raises:
        ConfigError: for inputs that do not fit one another, or a `loss_fn` that breaks its laws where that can be seen.
        DataError: for a token id outside of the vocabulary.
        StepError: from a second backward.
        UnsupportedError: from a backward with `create_graph=True`.

    Example:
        >>> def loss_fn(logprobs_C, per_token_C):
        ...     return -logprobs_C * per_token_C["advantages"] / 2
        >>> hidden_NH = torch.zeros(2, 3, requires_grad=True)
        >>> weight_VH, ids_N = torch.zeros(4, 3), torch.tensor([0, 3])
        >>> fused = fused_policy_loss(hidden_NH, weight_VH, ids_N, loss_fn, {"advantages": torch.ones(2)})
        >>> fused.loss.backward()
        >>> fused.loss.item()  # log(4)
        1.3862943649291992
    """
    inputs = check_head_inputs(hidden_NH, weight_VH, token_ids_N, temperature)
    _check_per_token(per_token_N, inputs)
    if entropy_weights_N is not None:
        _check_per_token({"entropy_weights": entropy_weights_N}, inputs)
    learns = torch.is_grad_enabled()
    gradients = build_head_gradients(
        inputs,
        needs_hidden=learns and hidden_NH.requires_grad,
        needs_weight=learns and weight_VH.requires_grad,
    )
    with torch.no_grad():
        fused = _pass(
            inputs,
            gradients,
            loss_fn,
            per_token_N,
            entropy_weights_N=entropy_weights_N,
            with_entropy=with_entropy or entropy_weights_N is not None,
        )
    if not _any(gradients):
        return fused
    apply: _Apply = _HandOut.apply  # torch leaves it untyped
    return attrs.evolve(fused, loss=apply(hidden_NH, weight_VH, fused.loss, gradients))


class _Apply(Protocol):
    def __call__(self, hidden_NH: Tensor, weight_VH: Tensor, loss: Tensor, gradients: HeadGradients, /) -> Tensor: ...


def _any(gradients: HeadGradients) -> bool:
    return gradients.hidden_NH is not None or gradients.weight_VH is not None


def _check_per_token(per_token_N: Mapping[str, Tensor], inputs: HeadInputs) -> None:
    num_tokens, device = inputs.hidden_NH.shape[0], inputs.hidden_NH.device
    for name, tensor_N in per_token_N.items():
        if tensor_N.ndim == 0 or tensor_N.shape[0] != num_tokens:
            raise ConfigError(
                f"{name}.shape={tuple(tensor_N.shape)} has not one row for each of {num_tokens} tokens; flatten it "
                "as the hidden states were, and repeat what belongs to a sequence for each of its tokens."
            )
        if tensor_N.device != device:
            raise ConfigError(f"{name}.device={str(tensor_N.device)!r} is not that of hidden, {device}; move it there.")
        if tensor_N.requires_grad:
            raise ConfigError(f"{name}.requires_grad=True, but gradients reach hidden and weight alone; detach it.")


def _pass(
    inputs: HeadInputs,
    gradients: HeadGradients,
    loss_fn: TokenLoss,
    per_token_N: Mapping[str, Tensor],
    *,
    entropy_weights_N: Tensor | None,
    with_entropy: bool,
) -> FusedLoss:
    dtype, device = wide_dtype(inputs.hidden_NH.dtype), inputs.hidden_NH.device
    loss = torch.zeros((), dtype=dtype, device=device)
    logprobs_N = torch.empty(inputs.hidden_NH.shape[0], dtype=dtype, device=device)
    entropy_N = torch.empty_like(logprobs_N if with_entropy else logprobs_N[:0])
    workspace = build_workspace(inputs)
    for rows in chunk_rows(inputs):
        logits_CV = fill_logits(inputs, workspace, rows)
        statistics = exponentiate_(logits_CV, inputs.token_ids_N[rows], with_entropy=with_entropy)
        logprobs_N[rows], entropy_N[rows] = statistics.logprobs_C, statistics.entropy_C
        per_token_C = {name: tensor_N[rows] for name, tensor_N in per_token_N.items()}
        loss_C, grad_logprobs_C = _differentiate(loss_fn, statistics.logprobs_C, per_token_C)
        if rows.start == 0:
            _check_elementwise(loss_fn, loss_C, statistics.logprobs_C, per_token_C)
        loss += loss_C.sum(dtype=dtype)
        grad_entropy_C = None
        if entropy_weights_N is not None:
            grad_entropy_C = -entropy_weights_N[rows].to(dtype)
            loss += (grad_entropy_C * statistics.entropy_C).sum()
        if _any(gradients):
            factor_C = logit_gradient_(
                logits_CV,
                sums_C=statistics.sums_C,
                token_ids_C=inputs.token_ids_N[rows],
                grad_logprobs_C=grad_logprobs_C,
                entropy_C=statistics.entropy_C,
                grad_entropy_C=grad_entropy_C,
            )
            sums_C = statistics.sums_C
            add_head_gradients(
                inputs, workspace, gradients, rows, gradient_CV=logits_CV, sums_C=sums_C, factor_C=factor_C
            )
    return FusedLoss(loss=loss, logprobs_N=logprobs_N, entropy_N=entropy_N if with_entropy else None)


def _differentiate(loss_fn: TokenLoss, logprobs_C: Tensor, per_token_C: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    variable_C = logprobs_C.detach().requires_grad_()
    with torch.enable_grad():
        loss_C = loss_fn(variable_C, per_token_C)
        if loss_C.shape != logprobs_C.shape:
            raise ConfigError(
                f"loss_fn returned shape={tuple(loss_C.shape)} for {logprobs_C.shape[0]} tokens; return the weighted "
                "loss of each token, neither summed nor averaged."
            )
        if not loss_C.requires_grad:
            raise ConfigError(
                "loss_fn returned requires_grad=False: the loss does not depend on the logprobs; compute it from them "
                "with torch, without detaching them."
            )
        (grad_logprobs_C,) = torch.autograd.grad(loss_C.sum(), variable_C)
    return loss_C.detach(), grad_logprobs_C


def _check_elementwise(
    loss_fn: TokenLoss, loss_C: Tensor, logprobs_C: Tensor, per_token_C: Mapping[str, Tensor]
) -> None:
    """Refuse a loss whose first tokens change when those after them are left out, as a mean over the chunk does.

    The number of tokens that stay is a multiple of every vector width, so that the same instructions compute them and
    even a loss that is all rounding (a KL of a policy with itself) comes out equal. Fewer tokens than two such groups
    always fit in one chunk, for which a mean over the chunk is the mean over all.
    """
    num_alone = loss_C.shape[0] // 2 // _PROBE_MULTIPLE * _PROBE_MULTIPLE
    if num_alone == 0:
        return
    alone_C = loss_fn(logprobs_C[:num_alone], {name: tensor_C[:num_alone] for name, tensor_C in per_token_C.items()})
    together_C = loss_C[:num_alone]
    if alone_C.shape != together_C.shape or not torch.allclose(alone_C, together_C, 1e-3, 0.0, equal_nan=True):
        raise ConfigError(
            f"loss_fn({loss_C.shape[0]} tokens) is not elementwise in tokens: the loss of a token changed when other "
            "tokens were left out; compute normalisers before and pass them as a per-token weight."
        )


class _HandOut(torch.autograd.Function):
    """The one inheritance that torch demands: a gradient of one's own is written as a subclass of `autograd.Function`.

    The gradients exist already; backward scales them. `ctx` is made by torch, which does not publish its type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,  # noqa: ARG004  # torch records from it where its gradient goes
        weight_VH: Tensor,
        loss: Tensor,
        gradients: HeadGradients,
    ) -> Tensor:
        ctx.gradients, ctx.dtype = gradients, weight_VH.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        refuse_second_derivative()
        (grad_loss,) = grad_outputs
        gradients: HeadGradients | None = ctx.gradients
        if gradients is None:
            raise StepError(
                "backward=2 of one fused loss: the first handed out its gradients; call fused_policy_loss again."
            )
        ctx.gradients = None  # scaled in place below, so that no second copy of the head's gradient is needed
        hidden_NH, weight_VH = gradients.hidden_NH, gradients.weight_VH
        return (
            None if hidden_NH is None else hidden_NH.mul_(grad_loss),
            None if weight_VH is None else weight_VH.mul_(grad_loss).to(ctx.dtype),
            None,
            None,
        )
