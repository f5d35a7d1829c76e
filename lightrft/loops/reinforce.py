"""One step of reinforcement: collect, learn, sync, and what is logged about it.

Shapes: B completions of a rollout.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import attrs

from lightrft.algorithms.advantages import ADVANTAGES
from lightrft.algorithms.filtering import informative_groups
from lightrft.data.prompts import Problem
from lightrft.data.sampler import ResumableSampler
from lightrft.loops.ahead import made_ahead
from lightrft.loops.collect import Scored, collect, request_of, sampling_params, score_made, shape_rewards
from lightrft.loops.evaluate import evaluate
from lightrft.loops.learn import Learned, learn
from lightrft.loops.memory_cycle import generating
from lightrft.loops.run import Run, build_actor, learners_of, resume_from, row_of, stop_if_asked
from lightrft.loops.state import RunState
from lightrft.strategy.protocols.training import Trainable
from lightrft.tracking.peaks import peak_values, watch_peak

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lightrft.strategy.protocols.checkpointing import Json
    from lightrft.strategy.protocols.rollout import EngineHandle, SamplingParams

__all__ = ["Learner", "evaluate_and_log", "reinforce", "start_learner", "state_of"]

_SAMPLES_SHOWN = 16
"""Held-out completions that an evaluation logs as text: enough to see how the model answers, small on disk."""

_SEED_STRIDE = 1_000_003
"""A prime that keeps the sampling seeds of one run's steps apart from those of runs with neighbouring seeds."""


@attrs.frozen(kw_only=True, eq=False)
class Learner:
    """The handles of reinforcement.

    Attributes:
        actor: the policy with its optimizer and schedule.
        reference: the policy before reinforcement, frozen; None without `kl_coef`.
        engine: makes the completions.
        sampler: draws the problems.
    """

    actor: Trainable
    reference: nn.Module | None
    engine: EngineHandle
    sampler: ResumableSampler


def state_of(learner: Learner) -> dict[str, nn.Module | Trainable]:
    """Return what a checkpoint holds, by name.

    Args:
        learner: the handles of reinforcement.
    """
    return _named(learner.actor, learner.reference)


def start_learner(run: Run, *, resume: bool) -> tuple[Learner, RunState]:
    """Return the handles of reinforcement and where it is, from the newest checkpoint or from the model as it is.

    Args:
        run: the run.
        resume: whether the newest checkpoint is one of this phase.
    """
    config, strategy, parts = run.config, run.strategy, run.parts
    updates = config.algorithm.prompts_per_step * config.algorithm.num_samples // config.strategy.train_batch_size
    reference = None
    if config.algorithm.kl_coef:  # copied while the model is plain
        reference = strategy.prepare_reward_model(copy.deepcopy(parts.model))
    actor = build_actor(
        run,
        parts.model,
        learning_rate=config.strategy.actor_learning_rate,
        max_steps=config.run.num_steps * config.algorithm.num_epochs * updates,
    )
    sampler = ResumableSampler(size=len(parts.train), seed=config.strategy.seed)
    state = RunState(step=config.run.warmup_steps)
    if resume:
        state = resume_from(run, _named(actor, reference), sampler)
    engine = strategy.setup_inference_engine(config.engine, actor=actor.model, tokenizer=parts.tokenizer)
    engine.weight_version = state.weight_version  # a new engine counts from 0
    return Learner(actor=actor, reference=reference, engine=engine, sampler=sampler), state


def reinforce(run: Run, learner: Learner, state: RunState) -> RunState:
    """Take one step: collect, learn, sync, log; return where the run is then.

    Args:
        run: the run.
        learner: changed in place.
        state: where the run is.

    Raises:
        InterruptedRunError: the run was asked to stop in the rollout; the checkpoint of the step before is written.
    """
    config, strategy = run.config, run.strategy
    started = time.perf_counter()
    with watch_peak() as collecting, generating(strategy, learner.engine, *learners_of(run, state_of(learner))):
        scored = state.ahead or _collect(run, learner, state)
    collected = time.perf_counter()
    staleness = learner.engine.weight_version - min(one.weight_version for one in scored.completions)
    with _next_rollout(run, learner, state) as next_rollout:
        with watch_peak() as learning:
            rewards_B, statistics = shape_rewards(
                scored, state.rewards, algorithm=config.algorithm, max_new_tokens=config.engine.max_new_tokens
            )
            learned = _learn(run, learner, scored, rewards_B)
        finished = time.perf_counter()
        ahead = next_rollout()
    awaited = time.perf_counter()
    with watch_peak() as syncing:
        strategy.wakeup_inference_engine(learner.engine)
        if learned is not None:
            strategy.update_engine_weights(learner.engine, learner.actor.model)
    synced = time.perf_counter()
    state = attrs.evolve(
        state,
        step=state.step + 1,
        sampler=learner.sampler.state_dict(),
        rewards=statistics,
        weight_version=learner.engine.weight_version,
        ahead=ahead,
    )
    num_tokens = sum(len(completion.token_ids) for completion in scored.completions)
    metrics = {**_rollout_values(scored, num_tokens), "staleness": staleness, **_learned_values(learned)}
    run.tracker.log("metrics", row_of(state, "step", metrics))
    timings: dict[str, Json] = {
        "collect_seconds": collected - started,
        "learn_seconds": finished - collected,
        "wait_seconds": awaited - finished,
        "sync_seconds": synced - awaited,
        "seconds": synced - started,
        "tokens_per_second": num_tokens / (synced - started),
        **peak_values(collect=collecting, learn=learning, sync=syncing),
    }
    run.tracker.log("timings", row_of(state, "step", timings))
    return state


def evaluate_and_log(run: Run, learner: Learner, state: RunState) -> RunState:
    """Return the state with the held-out accuracy of the engine's weights, which is logged with some completions.

    Args:
        run: the run.
        learner: its engine is woken.
        state: where the run is.

    Raises:
        InterruptedRunError: the run was asked to stop; its checkpoint, before the evaluation, is written.
    """

    def between_batches() -> None:
        stop_if_asked(run, state_of(learner), state)

    with generating(run.strategy, learner.engine, *learners_of(run, state_of(learner))):
        result = evaluate(
            run.strategy,
            learner.engine,
            run.parts.heldout,
            tokenizer=run.parts.tokenizer,
            reward=run.parts.reward,
            config=run.config.engine,
            between_batches=between_batches,
        )
    values: dict[str, Json] = {"accuracy": result.accuracy, "reward": result.reward}
    run.tracker.log("metrics", row_of(state, "evaluation", values))
    shown = zip(result.scored.problems, result.scored.texts, result.scored.rewards_B.tolist(), strict=True)
    for _, (problem, text, reward) in zip(range(_SAMPLES_SHOWN), shown, strict=False):
        sample: dict[str, Json] = {
            "prompt": problem.question,
            "completion": text,
            "answer": problem.answer,
            "reward": reward,
        }
        run.tracker.log("samples", row_of(state, "evaluation", sample))
    is_first = state.step == run.config.run.warmup_steps
    before = result.accuracy if is_first else state.accuracy_before
    return attrs.evolve(state, accuracy_before=before, accuracy=result.accuracy, evaluated=state.step)


def _named(actor: Trainable, reference: nn.Module | None) -> dict[str, nn.Module | Trainable]:
    return {"actor": actor} if reference is None else {"actor": actor, "reference": reference}


class _NextRollout(Protocol):
    def __call__(self) -> Scored | None: ...


@contextmanager
def _next_rollout(run: Run, learner: Learner, state: RunState) -> Generator[_NextRollout]:
    """Make the rollout of the next step while the block goes on, if rollouts are made ahead; yield what waits for it.

    The engine has the weights of before this step until it has been waited for.
    """
    step, parts = state.step + 1, run.parts
    if not run.config.algorithm.max_staleness or step == run.config.run.warmup_steps + run.config.run.num_steps:
        yield _nothing
        return
    request = request_of(
        run.strategy,
        _problems(run, learner),
        tokenizer=parts.tokenizer,
        sampling=_sampling(run, step),
        batch_size=run.config.engine.batch_size,
    )
    with made_ahead(run.strategy, learner.engine, request) as wait:

        def scored() -> Scored:
            return score_made(run.strategy, request, wait(), tokenizer=parts.tokenizer, reward=parts.reward)

        yield scored


def _nothing() -> None:
    """Return None: the next step makes its rollout itself."""


def _problems(run: Run, learner: Learner) -> list[Problem]:
    return [run.parts.train[index] for index in learner.sampler.take(run.config.algorithm.prompts_per_step)]


def _sampling(run: Run, step: int) -> SamplingParams:
    """Return how the rollout is drawn that the run learns from when `step` steps are done."""
    config = run.config
    return sampling_params(
        config.engine,
        run.parts.tokenizer,
        num_samples=config.algorithm.num_samples,
        seed=(config.strategy.seed * _SEED_STRIDE + step) % 2**63,  # the seeds that there are
    )


def _collect(run: Run, learner: Learner, state: RunState) -> Scored:
    def between_batches() -> None:
        stop_if_asked(run, state_of(learner), state)

    return collect(
        run.strategy,
        learner.engine,
        _problems(run, learner),
        tokenizer=run.parts.tokenizer,
        reward=run.parts.reward,
        sampling=_sampling(run, state.step),
        batch_size=run.config.engine.batch_size,
        between_batches=between_batches,
    )


def _learn(run: Run, learner: Learner, scored: Scored, rewards_B: torch.Tensor) -> Learned | None:
    """Learn from the rollout; None when dynamic sampling leaves nothing to learn from."""
    config = run.config
    algorithm = config.algorithm
    advantages_B = ADVANTAGES[algorithm.advantage](rewards_B, group_size=algorithm.num_samples)
    keep = list(range(len(scored.completions)))
    if algorithm.dynamic_sampling:
        informative_B = informative_groups(rewards_B, group_size=algorithm.num_samples)
        keep = [index for index in keep if informative_B[index]]
    if not keep:
        return None
    return learn(
        run.strategy,
        learner.actor,
        [scored.completions[index] for index in keep],
        advantages_B[keep],
        algorithm=algorithm,
        temperature=config.engine.temperature,
        max_new_tokens=config.engine.max_new_tokens,
        train_batch_size=config.strategy.train_batch_size,
        micro_train_batch_size=config.strategy.micro_train_batch_size,
        reference=learner.reference,
    )


def _rollout_values(scored: Scored, num_tokens: int) -> dict[str, Json]:
    completions = scored.completions
    return {
        "reward": scored.rewards_B.mean().item(),
        "reward_std": scored.rewards_B.std(correction=0).item(),
        "completion_tokens": num_tokens,
        "completion_length": num_tokens / len(completions),
        "truncated": sum(completion.finish_reason == "length" for completion in completions) / len(completions),
    }


def _learned_values(learned: Learned | None) -> dict[str, Json]:
    if learned is None:
        return {"skipped": "every group of the rollout has equal rewards"}
    last = learned.steps[-1]
    reasons: Sequence[str] = [step.skipped_reason for step in learned.steps if step.skipped_reason]
    return {
        "loss": learned.loss,
        "kl": learned.kl,
        "entropy": learned.entropy,
        "clipped": learned.clipped,
        "logprob_difference": learned.logprob_difference,
        "grad_norm": last.grad_norm,
        "learning_rate": last.learning_rate,
        "skipped": reasons[0] if reasons else None,
    }
