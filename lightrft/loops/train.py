"""The outer loop: warm up, then collect, learn, sync, evaluate; resumable at every step."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from lightrft.algorithms.advantages import ADVANTAGES
from lightrft.algorithms.filtering import informative_groups
from lightrft.config.root import Config
from lightrft.data.sampler import ResumableSampler
from lightrft.errors import ConfigError, InterruptedRunError
from lightrft.loops.collect import Scored, collect, sampling_params, shape_rewards
from lightrft.loops.evaluate import evaluate
from lightrft.loops.interrupt import ShouldStop, never_stop
from lightrft.loops.learn import Learned, learn
from lightrft.loops.parts import Parts
from lightrft.loops.state import RunState, state_from_json, state_to_json
from lightrft.loops.warmup import answers_as_completions, imitate
from lightrft.strategy.protocols.strategy import StrategyProtocol
from lightrft.strategy.protocols.training import Trainable
from lightrft.tracking.tracker import Tracker, no_tracker

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lightrft.strategy.protocols.checkpointing import Json
    from lightrft.strategy.protocols.rollout import EngineHandle

__all__ = ["Summary", "checkpoint_dir", "train"]

_SAMPLES_SHOWN = 16
"""Held-out completions that an evaluation logs as text: enough to see how the model answers, small on disk."""

_WARMUP_CHECK_EVERY = 5
_WARMUP_CHECK_SIZE = 256
"""How often and on how many training problems the warm-up looks whether it may end: the share is known to about 3
points, for the cost of one or two steps."""

_SEED_STRIDE = 1_000_003
"""A prime that keeps the sampling seeds of one run's steps apart from those of runs with neighbouring seeds."""


@attrs.frozen(kw_only=True)
class Summary:
    """How a run ended.

    Attributes:
        step: steps that are done, warm-up steps included.
        accuracy_before: held-out accuracy before reinforcement, from 0 to 1.
        accuracy_after: held-out accuracy at the end.
    """

    step: int
    accuracy_before: float
    accuracy_after: float


@attrs.frozen(kw_only=True, eq=False)
class _Run:
    """What every function below needs and none changes."""

    strategy: StrategyProtocol
    config: Config
    parts: Parts
    tracker: Tracker
    should_stop: ShouldStop


@attrs.frozen(kw_only=True, eq=False)
class _Learner:
    """The handles of reinforcement."""

    actor: Trainable
    reference: nn.Module | None
    engine: EngineHandle
    sampler: ResumableSampler


def checkpoint_dir(config: Config) -> Path:
    """Return where a run keeps its checkpoints.

    Args:
        config: the run's configuration.
    """
    return Path(config.run.dir) / "checkpoints"


def train(
    strategy: StrategyProtocol,
    config: Config,
    parts: Parts,
    *,
    tracker: Tracker | None = None,
    should_stop: ShouldStop = never_stop,
) -> Summary:
    """Run a configuration to its end, from its newest checkpoint if it has one.

    A run that was killed at any instant and started again logs the same metrics, bit for bit, as one that was not.

    Args:
        strategy: how the model is trained on this machine's processes.
        config: the run.
        parts: model, problems and reward that `config` names; the model is changed in place.
        tracker: where rows of metrics go; None keeps none.
        should_stop: asked at each step boundary.

    Raises:
        ConfigError: settings that do not fit together.
        InterruptedRunError: the run was asked to stop; its checkpoint is written.
    """
    _check(config, parts)
    run = _Run(strategy=strategy, config=config, parts=parts, tracker=tracker or no_tracker(), should_stop=should_stop)
    strategy.setup_distributed()
    done = strategy.latest_ckpt(checkpoint_dir(config))
    run.tracker.resume(-1 if done is None else done)
    warmup_steps = config.run.warmup_steps
    if warmup_steps and (done is None or done < warmup_steps):
        _warm_up(run, resume=done is not None)
    learner, state = _start_learner(run, resume=done is not None and done >= warmup_steps)
    with learner.engine:
        if state.accuracy_before is None:
            state = _evaluate(run, learner, state)
            state = _boundary(run, _checkpointable(learner), attrs.evolve(state, accuracy_before=state.accuracy))
        while state.step < warmup_steps + config.run.num_steps:
            state = _boundary(run, _checkpointable(learner), _reinforce(run, learner, state))
    _export(run, learner)
    return Summary(step=state.step, accuracy_before=state.accuracy_before or 0.0, accuracy_after=state.accuracy or 0.0)


def _check(config: Config, parts: Parts) -> None:
    algorithm, strategy = config.algorithm, config.strategy
    samples = algorithm.prompts_per_step * algorithm.num_samples
    if samples % strategy.train_batch_size:
        raise ConfigError(
            f"train_batch_size={strategy.train_batch_size} does not divide prompts_per_step("
            f"{algorithm.prompts_per_step}) * num_samples({algorithm.num_samples}) = {samples}; use {samples} or a "
            "divisor of it."
        )
    if config.run.warmup_size > len(parts.train):
        raise ConfigError(
            f"run.warmup_size={config.run.warmup_size} is more than the {len(parts.train)} training problems; "
            f"use {len(parts.train)} or less."
        )


def _boundary(run: _Run, state_of: Mapping[str, nn.Module | Trainable], state: RunState) -> RunState:
    """End a step: write a checkpoint when one is due, and stop when asked to."""
    config = run.config
    stop = run.should_stop()
    is_last = state.step in {config.run.warmup_steps, config.run.warmup_steps + config.run.num_steps}
    every = config.checkpoint.save_every
    if stop or is_last or (every and state.step % every == 0):
        run.strategy.save_ckpt(
            state_of,
            checkpoint_dir(config),
            step=state.step,
            client_state=state_to_json(state),
            max_num=config.checkpoint.max_num,
        )
    if stop:
        raise InterruptedRunError(
            f"{stop}: stopped after step {state.step} with a checkpoint in {checkpoint_dir(config)}; "
            "run the same command to go on."
        )
    return state


def _actor(run: _Run, *, learning_rate: float, max_steps: int) -> Trainable:
    args = attrs.evolve(run.config.strategy, actor_learning_rate=learning_rate)
    actor, _, _, _ = run.strategy.prepare_models_and_optimizers(
        run.parts.model, None, None, None, args, max(1, max_steps)
    )
    return actor


def _warm_up(run: _Run, *, resume: bool) -> None:
    """Train the model on answers; the checkpoint of the last step is left to the start of reinforcement."""
    settings, parts = run.config.run, run.parts
    actor = _actor(run, learning_rate=settings.warmup_learning_rate, max_steps=settings.warmup_steps)
    examples = answers_as_completions(parts.train[: settings.warmup_size or None], parts.tokenizer)
    sampler = ResumableSampler(size=len(examples), seed=run.config.strategy.seed)
    state = RunState()
    if resume:
        state = state_from_json(run.strategy.load_ckpt({"actor": actor}, checkpoint_dir(run.config)).client_state)
        _restore(sampler, state)
    while state.step < settings.warmup_steps:
        started = time.perf_counter()
        batch = [examples[index] for index in sampler.take(settings.warmup_batch_size)]
        result, loss = imitate(run.strategy, actor, batch, micro_batch_size=settings.warmup_batch_size)
        state = attrs.evolve(state, step=state.step + 1, sampler=sampler.state_dict())
        row: dict[str, Json] = {
            "step": state.step,
            "kind": "warmup",
            "loss": loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "skipped": result.skipped_reason,
        }
        run.tracker.log("metrics", row)
        run.tracker.log("timings", {**_where(state), "seconds": time.perf_counter() - started})
        if settings.warmup_until and state.step % _WARMUP_CHECK_EVERY == 0 and _is_warm(run, actor):
            return
        if state.step < settings.warmup_steps:
            _boundary(run, {"actor": actor}, state)


def _is_warm(run: _Run, actor: Trainable) -> bool:
    """Return whether greedy completions of the last training problems solve the share that ends the warm-up."""
    parts, config = run.parts, run.config.engine
    with run.strategy.setup_inference_engine(config, actor=actor.model, tokenizer=parts.tokenizer) as engine:
        result = evaluate(
            run.strategy,
            engine,
            parts.train[-_WARMUP_CHECK_SIZE:],
            tokenizer=parts.tokenizer,
            reward=parts.reward,
            config=config,
        )
    return result.accuracy >= run.config.run.warmup_until


def _start_learner(run: _Run, *, resume: bool) -> tuple[_Learner, RunState]:
    """Return the handles of reinforcement, from the newest checkpoint or from the model as it is."""
    config, strategy, parts = run.config, run.strategy, run.parts
    updates = config.algorithm.prompts_per_step * config.algorithm.num_samples // config.strategy.train_batch_size
    actor = _actor(
        run,
        learning_rate=config.strategy.actor_learning_rate,
        max_steps=config.run.num_steps * config.algorithm.num_epochs * updates,
    )
    reference = None
    if config.algorithm.kl_coef:
        reference = strategy.prepare_reward_model(copy.deepcopy(strategy.unwrap_model(actor.model)))
    sampler = ResumableSampler(size=len(parts.train), seed=config.strategy.seed)
    state = RunState(step=config.run.warmup_steps)
    if resume:
        loaded = strategy.load_ckpt(_named(actor, reference), checkpoint_dir(config))
        state = state_from_json(loaded.client_state)
        _restore(sampler, state)
    engine = strategy.setup_inference_engine(config.engine, actor=actor.model, tokenizer=parts.tokenizer)
    return _Learner(actor=actor, reference=reference, engine=engine, sampler=sampler), state


def _restore(sampler: ResumableSampler, state: RunState) -> None:
    if state.sampler is not None:
        sampler.load_state_dict(state.sampler)


def _named(actor: Trainable, reference: nn.Module | None) -> dict[str, nn.Module | Trainable]:
    return {"actor": actor} if reference is None else {"actor": actor, "reference": reference}


def _checkpointable(learner: _Learner) -> dict[str, nn.Module | Trainable]:
    return _named(learner.actor, learner.reference)


def _reinforce(run: _Run, learner: _Learner, state: RunState) -> RunState:
    """Take one step of reinforcement: collect, learn, sync, log, and evaluate when it is due."""
    config, strategy = run.config, run.strategy
    started = time.perf_counter()
    strategy.wakeup_inference_engine(learner.engine)
    scored = _collect(run, learner, state)
    collected = time.perf_counter()
    strategy.maybe_sleep_inference_engine(learner.engine)
    rewards_B, statistics = shape_rewards(
        scored, state.rewards, algorithm=config.algorithm, max_new_tokens=config.engine.max_new_tokens
    )
    learned = _learn(run, learner, scored, rewards_B)
    finished = time.perf_counter()
    strategy.wakeup_inference_engine(learner.engine)
    if learned is not None:
        strategy.update_engine_weights(learner.engine, learner.actor.model)
    synced = time.perf_counter()
    state = attrs.evolve(state, step=state.step + 1, sampler=learner.sampler.state_dict(), rewards=statistics)
    num_tokens = sum(len(completion.token_ids) for completion in scored.completions)
    run.tracker.log("metrics", {**_where(state), **_rollout_row(scored, num_tokens), **_learned_row(learned)})
    timings: dict[str, Json] = {
        "collect_seconds": collected - started,
        "learn_seconds": finished - collected,
        "sync_seconds": synced - finished,
        "seconds": synced - started,
        "tokens_per_second": num_tokens / (synced - started),
    }
    run.tracker.log("timings", {**_where(state), **timings})
    is_last = state.step == config.run.warmup_steps + config.run.num_steps
    done = state.step - config.run.warmup_steps
    is_due = config.run.evaluate_every and done % config.run.evaluate_every == 0
    return _evaluate(run, learner, state) if is_last or is_due else state


def _collect(run: _Run, learner: _Learner, state: RunState) -> Scored:
    config, parts = run.config, run.parts
    indices = learner.sampler.take(config.algorithm.prompts_per_step)
    sampling = sampling_params(
        config.engine,
        parts.tokenizer,
        num_samples=config.algorithm.num_samples,
        seed=config.strategy.seed * _SEED_STRIDE + state.step,
    )
    return collect(
        run.strategy,
        learner.engine,
        [parts.train[index] for index in indices],
        tokenizer=parts.tokenizer,
        reward=parts.reward,
        sampling=sampling,
    )


def _learn(run: _Run, learner: _Learner, scored: Scored, rewards_B: torch.Tensor) -> Learned | None:
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


def _where(state: RunState) -> dict[str, Json]:
    return {"step": state.step, "kind": "step"}


def _rollout_row(scored: Scored, num_tokens: int) -> dict[str, Json]:
    completions = scored.completions
    return {
        "reward": scored.rewards_B.mean().item(),
        "reward_std": scored.rewards_B.std(correction=0).item(),
        "completion_tokens": num_tokens,
        "completion_length": num_tokens / len(completions),
        "truncated": sum(completion.finish_reason == "length" for completion in completions) / len(completions),
    }


def _learned_row(learned: Learned | None) -> dict[str, Json]:
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


def _evaluate(run: _Run, learner: _Learner, state: RunState) -> RunState:
    run.strategy.wakeup_inference_engine(learner.engine)
    result = evaluate(
        run.strategy,
        learner.engine,
        run.parts.heldout,
        tokenizer=run.parts.tokenizer,
        reward=run.parts.reward,
        config=run.config.engine,
    )
    row: dict[str, Json] = {
        "step": state.step,
        "kind": "evaluation",
        "accuracy": result.accuracy,
        "reward": result.reward,
    }
    run.tracker.log("metrics", row)
    shown = zip(result.scored.problems, result.scored.texts, result.scored.rewards_B.tolist(), strict=True)
    for _, (problem, text, reward) in zip(range(_SAMPLES_SHOWN), shown, strict=False):
        sample: dict[str, Json] = {
            "step": state.step,
            "kind": "evaluation",
            "prompt": problem.question,
            "completion": text,
            "answer": problem.answer,
            "reward": reward,
        }
        run.tracker.log("samples", sample)
    return attrs.evolve(state, accuracy=result.accuracy)


def _export(run: _Run, learner: _Learner) -> None:
    """Write the finished model in the Hugging Face layout, once."""
    target = Path(run.config.run.dir) / "model"
    if not target.exists():
        run.strategy.save_model(learner.actor.model, target, tokenizer=run.parts.tokenizer)
