"""Supervised warm-up: the answers of training problems as completions to imitate.

Shapes: B problems, T positions, N positions that predict a token of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from lightrft.algorithms.fused_loss import fused_policy_loss
from lightrft.data.padding import pad_completions
from lightrft.data.prompts import Problem
from lightrft.errors import DataError
from lightrft.models.forward import hidden_states_and_head
from lightrft.models.tokenizer import encode_text
from lightrft.strategy.protocols.rollout import Completion, Tokenizer
from lightrft.strategy.protocols.training import StepResult, Trainable, Training

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["answers_as_completions", "imitate"]


def answers_as_completions(problems: Sequence[Problem], tokenizer: Tokenizer) -> list[Completion]:
    """Return each problem's answer as a completion that ends with the end token.

    Args:
        problems: problems with answers.
        tokenizer: between text and tokens.

    Raises:
        DataError: an answer is empty, or holds a character that the tokenizer does not know.
    """
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    completions: list[Completion] = []
    for problem in problems:
        if not problem.answer:
            raise DataError(f"question={problem.question!r} has no answer to imitate; set run.warmup_steps=0.")
        token_ids = (*encode_text(tokenizer, problem.answer, where=problem.question), *end)
        completions.append(
            Completion(
                prompt_ids=tuple(encode_text(tokenizer, problem.question, where=problem.question)),
                token_ids=token_ids,
                logprobs=(0.0,) * len(token_ids),
                finish_reason="stop",
                weight_version=0,
                sample_index=0,
            )
        )
    return completions


def imitate(
    training: Training, trainable: Trainable, completions: Sequence[Completion], *, micro_batch_size: int
) -> tuple[StepResult, float]:
    """Take one optimizer step on the mean negative logprob of the completions' tokens; return its result and the loss.

    Args:
        training: the strategy's training functions.
        trainable: the policy; changed in place.
        completions: what to imitate.
        micro_batch_size: completions of one forward and backward.
    """
    model, optimizer, scheduler = trainable
    device = next(model.parameters()).device
    parts = [completions[start : start + micro_batch_size] for start in range(0, len(completions), micro_batch_size)]
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    loss_sum = torch.zeros((), device=device)
    for index, part in enumerate(parts):
        batch = pad_completions(part).to(device)
        hidden_BTH, weight_VH = hidden_states_and_head(model, batch.input_ids_BT)
        hidden_NH = hidden_BTH[batch.mask_BT]
        shares_N = torch.full((len(hidden_NH),), 1.0 / num_tokens, device=device)
        weight_VH = weight_VH.to(hidden_NH.dtype)
        loss = fused_policy_loss(hidden_NH, weight_VH, batch.targets_N, _token_loss, {"shares": shares_N}).loss
        training.backward(loss, model, optimizer, weight=1.0)
        loss_sum += loss.detach()
        if index + 1 < len(parts):
            training.optimizer_step(optimizer, model, scheduler, is_boundary=False)
    return training.optimizer_step(optimizer, model, scheduler, is_boundary=True), loss_sum.item()


def _token_loss(logprobs_C: Tensor, per_token_C: Mapping[str, Tensor], /) -> Tensor:
    return -logprobs_C * per_token_C["shares"]
