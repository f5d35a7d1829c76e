"""Log-probabilities of chosen tokens, straight from hidden states and head, without the logits of all tokens at once.

Shapes: N tokens, C tokens of one chunk, H hidden size, V vocabulary size.

Cost in matrix products of N * H * V: one without gradient; four with it, because the backward pass forms each chunk of
logits again instead of keeping it. A loss that is elementwise in tokens needs three: `lightrft.algorithms.fused_loss`.
"""

from __future__ import annotations

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
    softmax_,
    wide_dtype,
)

__all__ = ["TokenLogprobs", "token_logprobs"]


@attrs.frozen(kw_only=True, eq=False)
class TokenLogprobs:
    """Log-probabilities of chosen tokens.

    Attributes:
        logprobs_N: in nats, float32 (float64 for float64 inputs).
        entropy_N: of the distribution that the token was chosen from, in nats; None unless it was asked for.
    """

    logprobs_N: Tensor
    entropy_N: Tensor | None


def token_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    token_ids_N: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> TokenLogprobs:
    """Return log softmax(hidden @ weight.T / temperature)[token], computed chunk by chunk of tokens.

    Where gradients are enabled and the hidden states or the head ask for one, both results can be differentiated (not
    twice); the backward pass computes only the gradients that are asked for. Memory beyond the results and gradients:
    one chunk of logits, and in the backward pass for 16-bit inputs the gradient of the head in float32, to which the
    chunks are added.

    Args:
        hidden_NH: hidden states after the last norm, (N, H), floating point.
        weight_VH: weight of the head, (V, H), same dtype and device. For a head with a bias, append the bias to the
            weight as a column and a one to each hidden state.
        token_ids_N: chosen tokens, (N,), int32 or int64.
        temperature: the logits are divided by it.
        with_entropy: also return the entropy, for three more passes over each chunk of logits.

    Raises:
        ConfigError: for shapes, dtypes, devices or a temperature that have no meaning.
        DataError: for a token id outside of the vocabulary.
        UnsupportedError: from a backward with `create_graph=True`.

    Example:
        >>> hidden_NH, weight_VH = torch.zeros(2, 3), torch.zeros(4, 3)
        >>> token_logprobs(hidden_NH, weight_VH, torch.tensor([0, 3])).logprobs_N  # log(1/4)
        tensor([-1.3863, -1.3863])
    """
    inputs = check_head_inputs(hidden_NH, weight_VH, token_ids_N, temperature)
    apply: _Apply = _Recompute.apply  # torch leaves it untyped
    logprobs_N, entropy_N = apply(hidden_NH, weight_VH, inputs.token_ids_N, inputs.temperature, with_entropy)
    return TokenLogprobs(logprobs_N=logprobs_N, entropy_N=entropy_N if with_entropy else None)


class _Apply(Protocol):
    def __call__(
        self, hidden_NH: Tensor, weight_VH: Tensor, token_ids_N: Tensor, temperature: float, with_entropy: bool, /
    ) -> tuple[Tensor, Tensor]: ...


class _Recompute(torch.autograd.Function):
    """The one inheritance that torch demands: a gradient of one's own is written as a subclass of `autograd.Function`.

    `ctx` is made by torch, which does not publish its type.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, token_ids_N: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        inputs = HeadInputs(hidden_NH=hidden_NH, weight_VH=weight_VH, token_ids_N=token_ids_N, temperature=temperature)
        logprobs_N, logsumexp_N, entropy_N = _forward(inputs, with_entropy=with_entropy)
        ctx.save_for_backward(hidden_NH, weight_VH, token_ids_N, logsumexp_N, entropy_N)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an entropy that takes no part in the loss costs no pass over the vocabulary
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        refuse_second_derivative()
        grad_logprobs_N, grad_entropy_N = grad_outputs
        hidden_NH, weight_VH, token_ids_N, logsumexp_N, entropy_N = ctx.saved_tensors
        inputs = HeadInputs(
            hidden_NH=hidden_NH, weight_VH=weight_VH, token_ids_N=token_ids_N, temperature=ctx.temperature
        )
        gradients = build_head_gradients(
            inputs, needs_hidden=ctx.needs_input_grad[0], needs_weight=ctx.needs_input_grad[1]
        )
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros_like(logsumexp_N)
        _backward(
            inputs,
            gradients,
            logsumexp_N=logsumexp_N,
            entropy_N=entropy_N,
            grad_logprobs_N=grad_logprobs_N,
            grad_entropy_N=grad_entropy_N,
        )
        grad_weight_VH = None if gradients.weight_VH is None else gradients.weight_VH.to(weight_VH.dtype)
        return gradients.hidden_NH, grad_weight_VH, None, None, None


def _forward(inputs: HeadInputs, *, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, dtype = inputs.hidden_NH.shape[0], wide_dtype(inputs.hidden_NH.dtype)
    logprobs_N = torch.empty(num_tokens, dtype=dtype, device=inputs.hidden_NH.device)
    logsumexp_N = torch.empty_like(logprobs_N)
    entropy_N = torch.empty_like(logprobs_N if with_entropy else logprobs_N[:0])
    workspace = build_workspace(inputs)
    for rows in chunk_rows(inputs):
        logits_CV = fill_logits(inputs, workspace, rows)
        statistics = exponentiate_(logits_CV, inputs.token_ids_N[rows], with_entropy=with_entropy)
        logprobs_N[rows] = statistics.logprobs_C
        logsumexp_N[rows] = statistics.logsumexp_C
        entropy_N[rows] = statistics.entropy_C
    return logprobs_N, logsumexp_N, entropy_N


def _backward(
    inputs: HeadInputs,
    gradients: HeadGradients,
    *,
    logsumexp_N: Tensor,
    entropy_N: Tensor,
    grad_logprobs_N: Tensor,
    grad_entropy_N: Tensor | None,
) -> None:
    workspace = build_workspace(inputs)
    ones_N = torch.ones_like(logsumexp_N)  # probabilities are exponentials whose rows sum to one
    for rows in chunk_rows(inputs):
        probabilities_CV = softmax_(fill_logits(inputs, workspace, rows), logsumexp_N[rows])
        factor_C = logit_gradient_(
            probabilities_CV,
            sums_C=ones_N[rows],
            token_ids_C=inputs.token_ids_N[rows],
            grad_logprobs_C=grad_logprobs_N[rows],
            entropy_C=entropy_N[rows],
            grad_entropy_C=None if grad_entropy_N is None else grad_entropy_N[rows],
        )
        add_head_gradients(
            inputs,
            workspace,
            gradients,
            rows,
            gradient_CV=probabilities_CV,
            sums_C=ones_N[rows],
            factor_C=factor_C,
        )
