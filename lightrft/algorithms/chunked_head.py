"""The language-model head applied to one chunk of tokens: its logits, their softmax, and the gradients through both.

A head of V rows turns N hidden states into N x V logits, which for a large vocabulary is far more memory than the rest
of a training step. `lightrft.algorithms.logprobs` and `lightrft.algorithms.fused_loss` therefore walk over the tokens
in chunks and use one workspace again for every chunk. What they share is here.

Shapes: N tokens, C tokens of one chunk, R tokens of one block of a chunk, H hidden size, V vocabulary size.

Numbers: logits are formed in the dtype of the hidden states, as the head of the model itself would; everything after
that (maximum, exponentials, sums, logarithms, the sum of weight gradients over chunks) is in float32, or in float64 for
float64 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from lightrft.errors import ConfigError, DataError, UnsupportedError
from lightrft.onednn import linear_operator

__all__ = [
    "ChunkStatistics",
    "HeadGradients",
    "HeadInputs",
    "Workspace",
    "add_head_gradients",
    "build_head_gradients",
    "build_workspace",
    "check_head_inputs",
    "chunk_rows",
    "exponentiate_",
    "fill_logits",
    "logit_gradient_",
    "max_chunk_rows",
    "refuse_second_derivative",
    "softmax_",
    "wide_dtype",
]

_MIN_CHUNK_ROWS = 128
"""With fewer rows a product waits for the head to be read: it has 0.75 of the full rate at 64 rows and 0.44 at 16."""

_CPU_CHUNK_BYTES = 30 * 2**20
"""240 rows at V = 32k. Each product packs the whole head anew, so wider is faster; 32 MiB is all we want to take."""

_DEVICE_CHUNK_BYTES = 512 * 2**20
"""On an accelerator, kernel launches and passes over the head's gradient per chunk cost more: 880 rows at V = 152k."""

_CPU_BLOCK_BYTES = 2**19
"""The softmax makes four passes; in blocks of this size all but the first are served by a core's own cache."""


@attrs.frozen(kw_only=True, eq=False)
class HeadInputs:
    """What the head is applied to, and how; build it with `check_head_inputs`.

    Attributes:
        hidden_NH: hidden states after the last norm.
        weight_VH: weight of the head, same dtype and device.
        token_ids_N: chosen tokens, int64.
        temperature: the logits are divided by it.
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    token_ids_N: Tensor
    temperature: float


@attrs.frozen(kw_only=True, eq=False)
class Workspace:
    """The memory of one chunk, written again for every chunk.

    Attributes:
        narrow_CV: takes the result of the matrix product, in the dtype of the hidden states.
        wide_CV: takes everything after it; float32 or float64. The same tensor as `narrow_CV` where the dtypes agree.
    """

    narrow_CV: Tensor
    wide_CV: Tensor


@attrs.frozen(kw_only=True, eq=False)
class ChunkStatistics:
    """What the softmax of one chunk leaves behind per token.

    Attributes:
        logprobs_C: log-probability of the chosen token.
        sums_C: sum of exp(logit - largest logit).
        logsumexp_C: log of the sum of exp(logit).
        entropy_C: entropy of the distribution in nats; empty unless it was asked for.
    """

    logprobs_C: Tensor
    sums_C: Tensor
    logsumexp_C: Tensor
    entropy_C: Tensor


@attrs.frozen(kw_only=True, eq=False)
class HeadGradients:
    """Where gradients are collected, None where none is needed.

    Attributes:
        hidden_NH: in the dtype of the hidden states; each chunk writes its rows.
        weight_VH: float32 or float64; each chunk adds to all of it.
    """

    hidden_NH: Tensor | None
    weight_VH: Tensor | None


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over the vocabulary are formed: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def check_head_inputs(hidden_NH: Tensor, weight_VH: Tensor, token_ids_N: Tensor, temperature: float) -> HeadInputs:
    """Return the inputs as a record, or refuse those that do not fit one another.

    Token ids are looked at, so a device that runs behind the host is waited for once.

    Raises:
        ConfigError: for shapes, dtypes, devices or a temperature that have no meaning.
        DataError: for a token id outside of the vocabulary.
    """
    _check_shapes(hidden_NH, weight_VH, token_ids_N)
    _check_kinds(hidden_NH, weight_VH, token_ids_N)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature={temperature!r} is not a positive number; use the one that was sampled with.")
    outside_N = (token_ids_N < 0) | (token_ids_N >= weight_VH.shape[0])
    if bool(outside_N.any()):
        position = int(outside_N.nonzero()[0])
        raise DataError(
            f"token_ids[{position}]={int(token_ids_N[position])} is outside of the vocabulary of {weight_VH.shape[0]}; "
            "give masked tokens any id inside of it and the weight 0."
        )
    return HeadInputs(
        hidden_NH=hidden_NH, weight_VH=weight_VH, token_ids_N=token_ids_N.long(), temperature=float(temperature)
    )


def _check_shapes(hidden_NH: Tensor, weight_VH: Tensor, token_ids_N: Tensor) -> None:
    if hidden_NH.ndim != 2 or weight_VH.ndim != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ConfigError(
            f"hidden.shape={tuple(hidden_NH.shape)} and weight.shape={tuple(weight_VH.shape)} are not (tokens, hidden) "
            "and (vocabulary, hidden); flatten the batch and pass the weight of the head as a linear layer holds it."
        )
    if token_ids_N.shape != hidden_NH.shape[:1]:
        raise ConfigError(
            f"token_ids.shape={tuple(token_ids_N.shape)} is not one id for each of {hidden_NH.shape[0]} hidden states; "
            "flatten both alike, after dropping the positions that predict nothing."
        )


def _check_kinds(hidden_NH: Tensor, weight_VH: Tensor, token_ids_N: Tensor) -> None:
    if hidden_NH.dtype != weight_VH.dtype or not hidden_NH.is_floating_point():
        raise ConfigError(
            f"hidden={hidden_NH.dtype} and weight={weight_VH.dtype} are not one floating-point dtype; cast one of them."
        )
    if token_ids_N.dtype not in {torch.int32, torch.int64}:
        raise ConfigError(f"token_ids={token_ids_N.dtype} are not int32 or int64; cast them.")
    if not hidden_NH.device == weight_VH.device == token_ids_N.device:
        raise ConfigError(
            f"hidden={hidden_NH.device}, weight={weight_VH.device} and token_ids={token_ids_N.device} are not on one "
            "device; move them to one."
        )


def chunk_rows(inputs: HeadInputs) -> Iterator[slice]:
    """Yield the rows of consecutive chunks, whose lengths differ by at most one.

    Example:
        >>> inputs = check_head_inputs(torch.ones(300, 1), torch.ones(70_000, 1), torch.arange(300), 1.0)
        >>> list(chunk_rows(inputs))
        [slice(0, 100, None), slice(100, 200, None), slice(200, 300, None)]
    """
    num_tokens = inputs.hidden_NH.shape[0]
    num_chunks = math.ceil(num_tokens / _max_rows(inputs))
    for index in range(num_chunks):
        yield slice(index * num_tokens // num_chunks, (index + 1) * num_tokens // num_chunks)


def _max_rows(inputs: HeadInputs) -> int:
    return max_chunk_rows(inputs.weight_VH.shape[0], on_cpu=inputs.hidden_NH.device.type == "cpu")


def max_chunk_rows(vocabulary: int, *, on_cpu: bool) -> int:
    """Return how many tokens a chunk holds at most.

    Args:
        vocabulary: rows of the head.
        on_cpu: whether a CPU computes.
    """
    budget = _CPU_CHUNK_BYTES if on_cpu else _DEVICE_CHUNK_BYTES
    return max(_MIN_CHUNK_ROWS, budget // (4 * max(vocabulary, 1)))


def build_workspace(inputs: HeadInputs) -> Workspace:
    """Return buffers that hold the largest chunk of these inputs."""
    rows = min(_max_rows(inputs), inputs.hidden_NH.shape[0])
    narrow_CV = torch.empty(
        rows, inputs.weight_VH.shape[0], dtype=inputs.hidden_NH.dtype, device=inputs.hidden_NH.device
    )
    wide = wide_dtype(narrow_CV.dtype)
    wide_CV = narrow_CV if wide == narrow_CV.dtype else torch.empty_like(narrow_CV, dtype=wide)
    return Workspace(narrow_CV=narrow_CV, wide_CV=wide_CV)


def build_head_gradients(inputs: HeadInputs, *, needs_hidden: bool, needs_weight: bool) -> HeadGradients:
    """Return memory for the gradients that are needed."""
    weight_VH = inputs.weight_VH.detach()
    return HeadGradients(
        hidden_NH=torch.empty_like(inputs.hidden_NH.detach()) if needs_hidden else None,
        weight_VH=torch.zeros_like(weight_VH, dtype=wide_dtype(weight_VH.dtype)) if needs_weight else None,
    )


def fill_logits(inputs: HeadInputs, workspace: Workspace, rows: slice) -> Tensor:
    """Return hidden @ weight.T / temperature for these rows, in the wide dtype; the memory is the workspace's."""
    hidden_CH = inputs.hidden_NH[rows]
    narrow_CV = workspace.narrow_CV[: hidden_CH.shape[0]]
    # beta=0: what stands in the workspace is not read.
    narrow_CV.addmm_(hidden_CH, inputs.weight_VH.t(), beta=0, alpha=1.0 / inputs.temperature)
    if workspace.wide_CV is workspace.narrow_CV:
        return narrow_CV
    return workspace.wide_CV[: hidden_CH.shape[0]].copy_(narrow_CV)


def exponentiate_(logits_CV: Tensor, token_ids_C: Tensor, *, with_entropy: bool) -> ChunkStatistics:
    """Replace the logits by exp(logit - largest logit) and return what the softmax needs besides.

    On a CPU `torch.logsumexp` has a tenth of the speed of these in-place passes, and it copies the logits.
    """
    chosen_C = logits_CV.gather(1, token_ids_C[:, None]).squeeze(1)
    largest_C, sums_C = torch.empty_like(chosen_C), torch.empty_like(chosen_C)
    weighted_C = torch.empty_like(chosen_C if with_entropy else chosen_C[:0])
    for rows in _blocks(logits_CV):
        block_RV = logits_CV[rows]
        torch.amax(block_RV, dim=1, out=largest_C[rows])
        block_RV.sub_(largest_C[rows, None])
        if with_entropy:
            shifted_RV = block_RV.clone()
            torch.sum(shifted_RV.mul_(block_RV.exp_()), dim=1, out=weighted_C[rows])
        else:
            block_RV.exp_()
        torch.sum(block_RV, dim=1, out=sums_C[rows])
    log_sums_C = sums_C.log()
    return ChunkStatistics(
        logprobs_C=(chosen_C - largest_C) - log_sums_C,  # two small numbers: more exact than chosen - logsumexp
        sums_C=sums_C,
        logsumexp_C=largest_C + log_sums_C,
        entropy_C=log_sums_C - weighted_C / sums_C if with_entropy else weighted_C,
    )


def softmax_(logits_CV: Tensor, logsumexp_C: Tensor) -> Tensor:
    """Replace the logits by probabilities, given the logarithm of the sum of their exponentials, and return them."""
    for rows in _blocks(logits_CV):
        logits_CV[rows].sub_(logsumexp_C[rows, None]).exp_()
    return logits_CV


def _blocks(matrix_CV: Tensor) -> Iterator[slice]:
    num_rows, row_bytes = matrix_CV.shape[0], matrix_CV.shape[1] * matrix_CV.element_size()
    step = max(1, _CPU_BLOCK_BYTES // max(row_bytes, 1)) if matrix_CV.device.type == "cpu" else max(num_rows, 1)
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def logit_gradient_(
    exponentials_CV: Tensor,
    *,
    sums_C: Tensor,
    token_ids_C: Tensor,
    grad_logprobs_C: Tensor,
    entropy_C: Tensor,
    grad_entropy_C: Tensor | None,
) -> Tensor:
    """Replace e = exp(logit - shift) by the gradient of a loss with respect to the logits, up to a factor per row.

    The factor is returned, so that the products which follow apply it to H columns and not to V. With p = e / sum, g
    the gradient of the loss with respect to the logprob and k that with respect to the entropy S, the gradient is

        g * (one_hot - p) - k * p * (log p + S).

    Args:
        exponentials_CV: exp(logit - shift) for any shift per row.
        sums_C: the sums of its rows.
        token_ids_C: the chosen tokens.
        grad_logprobs_C: g.
        entropy_C: S; not read without `grad_entropy_C`.
        grad_entropy_C: k, or None where the entropy takes no part in the loss.

    Returns:
        The factor per row, (C,).
    """
    chosen_C1 = token_ids_C[:, None]
    if grad_entropy_C is None:
        exponentials_CV.scatter_(1, chosen_C1, exponentials_CV.gather(1, chosen_C1) - sums_C[:, None])
        return -grad_logprobs_C / sums_C
    constant_C = grad_logprobs_C + grad_entropy_C * (entropy_C - sums_C.log())
    for rows in _blocks(exponentials_CV):
        block_RV = exponentials_CV[rows]
        e_log_e_RV = torch.xlogy(block_RV, block_RV).mul_(grad_entropy_C[rows, None])  # 0 where e has underflown to 0
        block_RV.mul_(constant_C[rows, None]).add_(e_log_e_RV)
    chosen_gradient_C1 = exponentials_CV.gather(1, chosen_C1) - (grad_logprobs_C * sums_C)[:, None]
    exponentials_CV.scatter_(1, chosen_C1, chosen_gradient_C1)
    return -1.0 / sums_C


def refuse_second_derivative() -> None:
    """Refuse a backward pass that is itself to be differentiated; torch enables gradients inside of no other.

    Raises:
        UnsupportedError: in a backward with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "create_graph=True asks for a second derivative, which the chunked head lacks; use torch.log_softmax."
        )


def add_head_gradients(
    inputs: HeadInputs,
    workspace: Workspace,
    gradients: HeadGradients,
    rows: slice,
    *,
    gradient_CV: Tensor,
    sums_C: Tensor,
    factor_C: Tensor,
) -> None:
    """Write the gradient of the hidden states of a chunk and add the chunk's part of the gradient of the head.

    Args:
        inputs: what the head was applied to.
        workspace: where `gradient_CV` lies.
        gradients: where the results go.
        rows: the chunk.
        gradient_CV: what `logit_gradient_` left, without its factor.
        sums_C: the sums that it was called with.
        factor_C: the factor that it returned.
    """
    operand_CV, scale_C1 = gradient_CV, (factor_C / inputs.temperature)[:, None]
    if workspace.wide_CV is not workspace.narrow_CV:
        # A sum may exceed the largest float16, so it is divided out before the gradient is made narrow.
        operand_CV = torch.div(gradient_CV, sums_C[:, None], out=workspace.narrow_CV[: gradient_CV.shape[0]])
        scale_C1 = scale_C1 * sums_C[:, None]
    if gradients.hidden_NH is not None:
        _multiply(operand_CV, inputs.weight_VH.detach(), gradients.hidden_NH[rows]).mul_(scale_C1)
    if gradients.weight_VH is not None:
        scaled_CH = (inputs.hidden_NH[rows] * scale_C1).to(operand_CV.dtype)
        if gradients.weight_VH.dtype == operand_CV.dtype:
            gradients.weight_VH.addmm_(operand_CV.t(), scaled_CH)
        else:
            gradients.weight_VH.add_(torch.mm(operand_CV.t(), scaled_CH))


def _multiply(left_CV: Tensor, right_VH: Tensor, result_CH: Tensor) -> Tensor:
    """Write left @ right into the result, which is small beside both, and return it."""
    operator = linear_operator(left_CV, right_VH.t())
    if operator is None:
        return torch.mm(left_CV, right_VH, out=result_CH)
    return result_CH.copy_(operator(left_CV, right_VH.t(), None, "none", [], ""))
