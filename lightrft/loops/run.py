"""What the phases of a run share: its parts, its checkpoints, the end of a step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from lightrft.config.root import Config
from lightrft.data.sampler import ResumableSampler
from lightrft.errors import CheckpointError, InterruptedRunError
from lightrft.loops.interrupt import ShouldStop
from lightrft.loops.parts import Parts
from lightrft.loops.ranks import gather_texts
from lightrft.loops.state import RunState, state_from_json, state_to_json
from lightrft.strategy.protocols.strategy import StrategyProtocol
from lightrft.strategy.protocols.training import Trainable
from lightrft.tracking.tracker import Tracker

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from lightrft.config.sections import RunConfig
    from lightrft.strategy.protocols.checkpointing import BackgroundSaves, Json
    from lightrft.tracking.progress import Clock

__all__ = [
    "LastSave",
    "Run",
    "build_actor",
    "checkpoint_dir",
    "end_step",
    "is_evaluation_due",
    "learners_of",
    "resume_from",
    "row_of",
    "stop_if_asked",
]


@attrs.define(kw_only=True, eq=False)
class LastSave:
    """The newest checkpoint of a run: a handle, which each one changes.

    Attributes:
        step: its step; None before the first.
        seconds: when it was written or, before the first, when the run began, by the run's clock.
    """

    step: int | None
    seconds: float


@attrs.frozen(kw_only=True, eq=False)
class Run:
    """What every phase needs and none changes.

    Attributes:
        strategy: how the model is trained on this machine's processes.
        config: the run.
        parts: model, problems and reward.
        tracker: where rows of metrics go; only rank 0 has one that keeps them.
        should_stop: asked at each step boundary, and between the batches of a rollout.
        clock: never goes back.
        last_save: the newest checkpoint.
        background: writes checkpoints while steps go on; None writes them in between.
    """

    strategy: StrategyProtocol
    config: Config
    parts: Parts
    tracker: Tracker
    should_stop: ShouldStop
    clock: Clock
    last_save: LastSave
    background: BackgroundSaves | None = None


def checkpoint_dir(config: Config) -> Path:
    """Return where a run keeps its checkpoints.

    Args:
        config: the run's configuration.
    """
    return Path(config.run.dir) / "checkpoints"


def build_actor(run: Run, model: nn.Module, *, learning_rate: float, max_steps: int) -> Trainable:
    """Return a model with an optimizer and a schedule for one phase.

    Args:
        run: the run.
        model: plain; it belongs to the actor from now on.
        learning_rate: peak learning rate of the phase.
        max_steps: its optimizer steps.
    """
    args = attrs.evolve(run.config.strategy, actor_learning_rate=learning_rate)
    actor, _, _, _ = run.strategy.prepare_models_and_optimizers(model, None, None, None, args, max(1, max_steps))
    return actor


def resume_from(run: Run, state_of: Mapping[str, nn.Module | Trainable], sampler: ResumableSampler) -> RunState:
    """Restore models, optimizers and sampler from the newest checkpoint, and return where the run was.

    Args:
        run: the run.
        state_of: what the checkpoint holds, by name.
        sampler: moved to where it was.

    Raises:
        CheckpointError: the checkpoint is damaged, or not of this run.
    """
    state = state_from_json(run.strategy.load_ckpt(state_of, checkpoint_dir(run.config)).client_state)
    if state.sampler is not None:
        sampler.load_state_dict(state.sampler)
    return state


def end_step(run: Run, state_of: Mapping[str, nn.Module | Trainable], state: RunState) -> RunState:
    """Write a checkpoint when one is due, stop when any rank was asked to, and else return the state.

    Args:
        run: the run.
        state_of: what a checkpoint holds, by name.
        state: where the run is.

    Raises:
        InterruptedRunError: the run was asked to stop; its checkpoint is written.
    """
    stop_if_asked(run, state_of, state)
    if _is_due(run, state):
        _save(run, state_of, state)
    return state


def stop_if_asked(run: Run, state_of: Mapping[str, nn.Module | Trainable], state: RunState) -> None:
    """Write a checkpoint and stop if any rank was asked to; all ranks call it together.

    Between two batches of a rollout, too: nothing has been learnt from it, so where the run was before it, is where the
    run is, and whoever goes on from there makes the same rollout.

    Args:
        run: the run.
        state_of: what a checkpoint holds, by name.
        state: where the run is.

    Raises:
        InterruptedRunError: the run was asked to stop; its checkpoint is written.
    """
    asked = run.should_stop()
    stop = next(iter(gather_texts(run.strategy, [asked] if asked else [])), None)
    if stop is None:
        return
    if learners := learners_of(run, state_of):
        run.strategy.reload(*learners)  # a rollout may be under way
    failure = _failure_of_last(run)
    _save(run, state_of, state)
    if run.background is not None:
        run.background.wait()
    raise InterruptedRunError(
        f"{stop}: stopped after step {state.step} with a checkpoint in {checkpoint_dir(run.config)}; "
        f"run the same command to go on.{failure}"
    )


def learners_of(run: Run, state_of: Mapping[str, nn.Module | Trainable]) -> list[nn.Module | Optimizer]:
    """Return the models and optimizers that wait in main memory while an engine generates; none if all stay.

    Args:
        run: the run.
        state_of: what a checkpoint holds, by name.
    """
    if not run.config.run.offload_while_generating:
        return []
    handles = [(one.model, one.optimizer) if isinstance(one, Trainable) else (one,) for one in state_of.values()]
    return [handle for each in handles for handle in each]


def _failure_of_last(run: Run) -> str:
    """Return in words why the last save in the background failed, so that it keeps no other from being tried.

    Such a save may have been committed, and have failed in what came after that: what is there tells.
    """
    try:
        if run.background is not None:
            run.background.wait()
    except CheckpointError as error:
        run.last_save.step = run.strategy.latest_ckpt(checkpoint_dir(run.config))
        return f" Before that, {error}"
    return ""


def is_evaluation_due(config: RunConfig, state: RunState) -> bool:
    """Return whether the model has to be evaluated where the run is: it is the time, and was not done.

    Args:
        config: how long the run is, and how often it evaluates.
        state: where the run is, in reinforcement.
    """
    done = state.step - config.warmup_steps
    is_end = done in {0, config.num_steps}
    is_time = is_end or (config.evaluate_every > 0 and done % config.evaluate_every == 0)
    return is_time and state.evaluated != state.step


def _is_due(run: Run, state: RunState) -> bool:
    config = run.config.checkpoint
    is_last = state.step in {run.config.run.warmup_steps, run.config.run.warmup_steps + run.config.run.num_steps}
    is_multiple = any(every and state.step % every == 0 for every in (config.save_every, config.keep_every))
    is_rated = config.keep_best > 0 and state.evaluated == state.step
    return is_last or is_multiple or is_rated or _is_time(run)


def _is_time(run: Run) -> bool:
    if not run.config.checkpoint.save_minutes:
        return False
    minutes = (run.clock() - run.last_save.seconds) / 60
    # clocks of ranks differ by what they have waited for one another, so that of rank 0 counts
    return run.strategy.broadcast(minutes >= run.config.checkpoint.save_minutes)


def _save(run: Run, state_of: Mapping[str, nn.Module | Trainable], state: RunState) -> None:
    if run.last_save.step == state.step:
        return
    config = run.config.checkpoint
    run.strategy.save_ckpt(
        state_of,
        checkpoint_dir(run.config),
        step=state.step,
        client_state=state_to_json(state),
        max_num=config.max_num,
        max_mem=config.max_mem,
        keep_every=config.keep_every,
        keep_best=config.keep_best,
        metric=state.accuracy if state.evaluated == state.step else None,
        background=run.background,
    )
    run.last_save.step, run.last_save.seconds = state.step, run.clock()


def row_of(state: RunState, kind: str, values: Mapping[str, Json]) -> dict[str, Json]:
    """Return a row for the tracker.

    Args:
        state: where the run is.
        kind: what the row is about: "warmup", "step" or "evaluation".
        values: the rest of the row.
    """
    return {"step": state.step, "kind": kind, **values}
