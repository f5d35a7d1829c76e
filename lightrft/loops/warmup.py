"""Supervised warm-up: the answers of training problems as completions to imitate.

Shapes: B problems, T positions, N positions that predict a token of an answer.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import torch

from lightrft.algorithms.fused_loss import fused_policy_loss
from lightrft.data.padding import TokenBatch, pad_completions, pad_sequences
from lightrft.data.prompts import Problem
from lightrft.data.sampler import ResumableSampler
from lightrft.errors import DataError
from lightrft.loops.evaluate import evaluate
from lightrft.loops.memory_cycle import generating
from lightrft.loops.ranks import TrainingOnRanks, num_ranks, shares
from lightrft.loops.run import Run, build_actor, end_step, learners_of, resume_from, row_of, stop_if_asked
from lightrft.loops.state import RunState
from lightrft.models.forward import HeadFunction, call_with_head
from lightrft.models.tokenizer import encode_text
from lightrft.strategy.protocols.rollout import Completion, Tokenizer
from lightrft.strategy.protocols.training import NamedTensors, StepResult, Trainable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["answers_as_completions", "imitate", "warm_up"]

_CHECK_EVERY = 5
_CHECK_SIZE = 256
"""How often and on how many training problems the warm-up looks whether it may end: the share is known to about 3
points, for the cost of one or two steps."""


def warm_up(run: Run, *, resume: bool) -> None:
    """Train the model on answers; the checkpoint of the last step is left to the start of reinforcement.

    What is trained is a copy, which a strategy may spread over ranks; the plain model is given its weights at the end.

    Args:
        run: the run; `warmup_until` ends the phase early.
        resume: whether the newest checkpoint is one of this phase.

    Raises:
        InterruptedRunError: the run was asked to stop; its checkpoint is written.
    """
    settings, parts = run.config.run, run.parts
    actor = build_actor(
        run,
        copy.deepcopy(parts.model),
        learning_rate=settings.warmup_learning_rate,
        max_steps=settings.warmup_steps,
    )
    examples = answers_as_completions(parts.train[: settings.warmup_size or None], parts.tokenizer)
    sampler = ResumableSampler(size=len(examples), seed=run.config.strategy.seed)
    state = resume_from(run, {"actor": actor}, sampler) if resume else RunState()
    while state.step < settings.warmup_steps and not _is_warm(run, actor, state):
        started = time.perf_counter()
        batch = [examples[index] for index in sampler.take(settings.warmup_batch_size)]
        result, loss = imitate(run.strategy, actor, batch, micro_batch_size=settings.warmup_batch_size)
        state = attrs.evolve(state, step=state.step + 1, sampler=sampler.state_dict())
        values: dict[str, Json] = {
            "loss": loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "skipped": result.skipped_reason,
        }
        run.tracker.log("metrics", row_of(state, "warmup", values))
        run.tracker.log("timings", row_of(state, "warmup", {"seconds": time.perf_counter() - started}))
        if state.step < settings.warmup_steps:
            end_step(run, {"actor": actor}, state)
    _bring_back(run.strategy.named_tensors, actor.model, parts.model)


@torch.no_grad()
def _bring_back(named_tensors: NamedTensors, trained: nn.Module, plain: nn.Module) -> None:
    weights = plain.state_dict()
    for name, tensor in named_tensors(trained):
        weights[name].copy_(tensor)


def _is_warm(run: Run, actor: Trainable, state: RunState) -> bool:
    """Return whether greedy completions of the last training problems solve the share that ends the warm-up."""
    parts, config, share = run.parts, run.config.engine, run.config.run.warmup_until
    if not share or not state.step or state.step % _CHECK_EVERY:
        return False

    def between_batches() -> None:
        stop_if_asked(run, {"actor": actor}, state)

    with (
        run.strategy.setup_inference_engine(config, actor=actor.model, tokenizer=parts.tokenizer) as engine,
        generating(run.strategy, engine, *learners_of(run, {"actor": actor})),
    ):
        result = evaluate(
            run.strategy,
            engine,
            parts.train[-_CHECK_SIZE:],
            tokenizer=parts.tokenizer,
            reward=parts.reward,
            config=config,
            between_batches=between_batches,
        )
    return result.accuracy >= share


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
    training: TrainingOnRanks, trainable: Trainable, completions: Sequence[Completion], *, micro_batch_size: int
) -> tuple[StepResult, float]:
    """Take one optimizer step on the mean negative logprob of the completions' tokens; return its result and the loss.

    Args:
        training: the strategy's training functions.
        trainable: the policy; changed in place.
        completions: what to imitate, the same on all ranks, each of which takes a share.
        micro_batch_size: completions of one forward and backward.
    """
    model, optimizer, scheduler = trainable
    device = next(model.parameters()).device
    parts = shares(len(completions), num_ranks(training))
    mine = parts[training.get_rank()]
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    loss_sum = torch.zeros(1, device=device)
    results: list[StepResult] = []
    # every rank makes as many steps as the one with most to do; one that has nothing left goes through a filler
    starts = range(mine.start, mine.start + max(len(part) for part in parts), micro_batch_size)
    for start in starts:
        rows = completions[start : min(start + micro_batch_size, mine.stop)]
        batch = (pad_completions(rows) if rows else pad_sequences([[0]], [[0]])).to(device)
        loss = call_with_head(model, batch.input_ids_BT, _imitation(batch, share=1.0 / num_tokens))
        is_last = start == starts[-1]
        training.backward(loss, model, optimizer, weight=1.0 if rows else 0.0, is_boundary=is_last)
        loss_sum += loss.detach() if rows else 0.0
        results.append(training.optimizer_step(optimizer, model, scheduler, is_boundary=is_last))
    return results[-1], training.all_gather(loss_sum).sum().item()


def _imitation(batch: TokenBatch, *, share: float) -> HeadFunction:
    def loss_of_head(hidden_BTH: Tensor, weight_VH: Tensor) -> Tensor:
        hidden_NH = hidden_BTH[batch.mask_BT]
        shares_N = torch.full((len(hidden_NH),), share, device=hidden_NH.device)
        return fused_policy_loss(hidden_NH, weight_VH, batch.targets_N, _token_loss, {"shares": shares_N}).loss

    return loss_of_head


def _token_loss(logprobs_C: Tensor, per_token_C: Mapping[str, Tensor], /) -> Tensor:
    return -logprobs_C * per_token_C["shares"]
