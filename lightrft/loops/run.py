"""What the phases of a run share: its parts, its checkpoints, the end of a step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from lightrft.config.root import Config
from lightrft.data.sampler import ResumableSampler
from lightrft.errors import InterruptedRunError
from lightrft.loops.interrupt import ShouldStop
from lightrft.loops.parts import Parts
from lightrft.loops.ranks import gather_texts
from lightrft.loops.state import RunState, state_from_json, state_to_json
from lightrft.strategy.protocols.strategy import StrategyProtocol
from lightrft.strategy.protocols.training import Trainable
from lightrft.tracking.tracker import Tracker

if TYPE_CHECKING:
    from torch import nn

    from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["Run", "build_actor", "checkpoint_dir", "end_step", "resume_from", "row_of"]


@attrs.frozen(kw_only=True, eq=False)
class Run:
    """What every phase needs and none changes.

    Attributes:
        strategy: how the model is trained on this machine's processes.
        config: the run.
        parts: model, problems and reward.
        tracker: where rows of metrics go; only rank 0 has one that keeps them.
        should_stop: asked at each step boundary.
    """

    strategy: StrategyProtocol
    config: Config
    parts: Parts
    tracker: Tracker
    should_stop: ShouldStop


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
    config = run.config
    asked = run.should_stop()
    stop = next(iter(gather_texts(run.strategy, [asked] if asked else [])), None)
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


def row_of(state: RunState, kind: str, values: Mapping[str, Json]) -> dict[str, Json]:
    """Return a row for the tracker.

    Args:
        state: where the run is.
        kind: what the row is about: "warmup", "step" or "evaluation".
        values: the rest of the row.
    """
    return {"step": state.step, "kind": kind, **values}
