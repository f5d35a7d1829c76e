"""What a run must remember from step to step besides models and optimizers."""

from __future__ import annotations

from typing import cast

import attrs

from lightrft.algorithms.reward_shaping import RunningStatistics
from lightrft.errors import CheckpointError
from lightrft.loops.collect import Scored
from lightrft.loops.rollout_json import rollout_from_json, rollout_to_json
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["RunState", "state_from_json", "state_to_json"]


@attrs.frozen(kw_only=True)
class RunState:
    """Where a run is.

    Attributes:
        step: steps that are done, warm-up steps included.
        sampler: position in the training problems, as the sampler writes it; None at the start of a phase.
        rewards: running statistics of the rewards.
        accuracy_before: held-out accuracy before reinforcement; None until it was measured.
        accuracy: the newest held-out accuracy.
        evaluated: the step that it was measured after; None before the first.
        weight_version: of the engine's weights, which counts on over resumes.
        ahead: the rollout of the next step, where it was made ahead; its weights are gone, so it is saved.
    """

    step: int = 0
    sampler: dict[str, Json] | None = None
    rewards: RunningStatistics = attrs.field(factory=RunningStatistics)
    accuracy_before: float | None = None
    accuracy: float | None = None
    evaluated: int | None = None
    weight_version: int = 0
    ahead: Scored | None = None


def state_to_json(state: RunState) -> dict[str, Json]:
    """Return the state as the `client_state` of a checkpoint.

    Args:
        state: where the run is.
    """
    written = cast("dict[str, Json]", attrs.asdict(attrs.evolve(state, ahead=None)))
    return {**written, "ahead": None if state.ahead is None else rollout_to_json(state.ahead)}


def state_from_json(client_state: dict[str, Json]) -> RunState:
    """Return the state that `state_to_json` wrote.

    Args:
        client_state: what the checkpoint held.

    Raises:
        CheckpointError: it is no state of a run.
    """
    try:
        # each value has the type that `state_to_json` gave it; the digest of the checkpoint vouches for that
        given = cast("dict[str, dict[str, float]]", client_state)
        rewards = RunningStatistics(**given["rewards"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        made = cast("dict[str, Json] | None", client_state.get("ahead"))
        ahead = None if made is None else rollout_from_json(made)
        return RunState(**{**client_state, "rewards": rewards, "ahead": ahead})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    except (KeyError, TypeError, ValueError) as error:
        shown = {name: value for name, value in client_state.items() if name != "ahead"}  # which may be long
        message = f"client_state={shown!r} is not that of a run ({error}); choose another run.dir."
        raise CheckpointError(message) from error
