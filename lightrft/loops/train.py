"""The outer loop: warm up, then collect, learn, sync, evaluate; resumable at every step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from lightrft.config.root import Config
from lightrft.errors import CheckpointError, ConfigError
from lightrft.loops.ahead import check_draws
from lightrft.loops.checks import check_settings, check_world
from lightrft.loops.interrupt import ShouldStop, never_stop
from lightrft.loops.parts import Parts
from lightrft.loops.reinforce import Learner, evaluate_and_log, reinforce, start_learner, state_of
from lightrft.loops.run import LastSave, Run, checkpoint_dir, end_step, is_evaluation_due
from lightrft.loops.state import RunState
from lightrft.loops.warmup import warm_up
from lightrft.models.forward import check_head
from lightrft.strategy.protocols.strategy import StrategyProtocol
from lightrft.tracking.tracker import Tracker, no_tracker

if TYPE_CHECKING:
    from lightrft.strategy.protocols.checkpointing import BackgroundSaves
    from lightrft.tracking.progress import Clock

__all__ = ["Summary", "train"]


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


def train(
    strategy: StrategyProtocol,
    config: Config,
    parts: Parts,
    *,
    tracker: Tracker | None = None,
    should_stop: ShouldStop = never_stop,
    clock: Clock = time.monotonic,
    background: BackgroundSaves | None = None,
) -> Summary:
    """Run a configuration to its end, from its newest checkpoint if it has one.

    A run that was killed at any instant and started again logs the same metrics, bit for bit, as one that was not.

    Args:
        strategy: how the model is trained on this machine's processes.
        config: the run.
        parts: model, problems and reward that `config` names; the model is changed in place.
        tracker: where rank 0's rows of metrics go, which are about all ranks; None keeps none.
        should_stop: asked at each step boundary, and between the batches of rollouts and evaluations; all ranks stop if
            one is asked to.
        clock: tells when a checkpoint is due by time; it never goes back.
        background: writes checkpoints while steps go on, the last of which is committed when this returns or the run
            is stopped; None writes them in between.

    Raises:
        ConfigError: settings that do not fit together, or the number of ranks.
        UnsupportedError: a model whose logits are not those that the losses are formed from, or one that draws at
            random while a rollout is made ahead.
        CheckpointError: the directory holds the finished model of another run, or a checkpoint cannot be written.
        InterruptedRunError: the run was asked to stop; its checkpoint is written.
    """
    check_settings(config)
    _check_parts(strategy, config, parts)
    world = strategy.setup_distributed()
    check_world(config, world.world_size)
    kept = tracker if tracker is not None and world.rank == 0 else no_tracker()
    done = strategy.latest_ckpt(checkpoint_dir(config))
    run = Run(
        strategy=strategy,
        config=config,
        parts=parts,
        tracker=kept,
        should_stop=should_stop,
        clock=clock,
        last_save=LastSave(step=done, seconds=clock()),
        background=background,
    )
    warmup_steps = config.run.warmup_steps
    run.tracker.resume(-1 if done is None else done)
    if warmup_steps and (done is None or done < warmup_steps):
        warm_up(run, resume=done is not None)
    learner, state = start_learner(run, resume=done is not None and done >= warmup_steps)
    with learner.engine:
        if is_evaluation_due(config.run, state):  # it was stopped in it, and may have gone through it since
            run.tracker.resume(state.step, is_evaluated=False)
        state = _end(run, learner, state)
        while state.step < warmup_steps + config.run.num_steps:
            state = _end(run, learner, reinforce(run, learner, state))
    _export(run, learner)
    if background is not None:
        background.wait()
    return Summary(step=state.step, accuracy_before=state.accuracy_before or 0.0, accuracy_after=state.accuracy or 0.0)


def _check_parts(strategy: StrategyProtocol, config: Config, parts: Parts) -> None:
    if config.run.warmup_size > len(parts.train):
        raise ConfigError(
            f"run.warmup_size={config.run.warmup_size} is more than the {len(parts.train)} training problems; "
            f"use {len(parts.train)} or less."
        )
    check_head(strategy.unwrap_model(parts.model))
    if config.algorithm.max_staleness:
        check_draws(strategy.unwrap_model(parts.model))


def _end(run: Run, learner: Learner, state: RunState) -> RunState:
    if is_evaluation_due(run.config.run, state):
        state = evaluate_and_log(run, learner, state)
    return end_step(run, state_of(learner), state)


def _export(run: Run, learner: Learner) -> None:
    """Write the finished model in the Hugging Face layout, once."""
    strategy, actor = run.strategy, learner.actor.model
    target = Path(run.config.run.dir) / "model"
    if not strategy.broadcast(target.exists()):  # rank 0's word: it may be writing already when others look
        strategy.save_model(actor, target, tokenizer=run.parts.tokenizer)
        return
    trained = {name: tensor.cpu().clone() for name, tensor in strategy.named_tensors(actor)}
    strategy.load_model(actor, target)  # the run is over, so nobody misses the actor
    is_same = [trained[name].equal(tensor.cpu()) for name, tensor in strategy.named_tensors(actor)]
    if not all(is_same):
        raise CheckpointError(f"{target} holds another model than this run's; move it away and run the same again.")
