"""Bringing the trainer's weights into the engines of all ranks: all of them have the new ones, or none generates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightrft.backends.plain_model import is_spread
from lightrft.errors import EngineCrashError, WeightSyncError
from lightrft.failures import together
from lightrft.strategy.protocols.rollout import SyncReport
from lightrft.weight_sync import Answered, Probe, judge_logits, make_probe, probe_logits, transfer_weights

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lightrft.strategy.protocols.collectives import Collectives
    from lightrft.strategy.protocols.rollout import EngineHandle, StreamWeights

__all__ = ["sync_engines"]


def sync_engines(
    collectives: Collectives, engine: EngineHandle, actor: nn.Module, *, weights: StreamWeights, bf16: bool
) -> SyncReport:
    """Return what was written into this rank's engine, after the engines of all ranks have the weights, verified.

    A sync in which a process of an engine was lost is made again by all ranks, once.

    Args:
        collectives: what the ranks do together.
        engine: this rank's, awake or torn.
        actor: the prepared model.
        weights: streams its tensors.
        bf16: whether it computes in bfloat16 whatever its parameters are.

    Raises:
        WeightSyncError: on all ranks, where a tensor was refused or is missing, or the probe disagrees, on one of them.
        Exception: likewise what else an engine raised. Every engine that was awake is torn then. What ends the forward
            pass of a sharded model is raised on the rank where it does, and the process group is of no use any more.
    """
    engine.weights = weights
    # an engine that failed alone has committed less often
    version = engine.weight_version = collectives.all_reduce(engine.weight_version, "max")
    try:
        return _sync_once(collectives, engine, actor, weights=weights, bf16=bf16)
    except EngineCrashError:
        engine.weight_version = version  # it may have been lost after the commit, on this rank or another one
        return _sync_once(collectives, engine, actor, weights=weights, bf16=bf16)


def _sync_once(
    collectives: Collectives, engine: EngineHandle, actor: nn.Module, *, weights: StreamWeights, bf16: bool
) -> SyncReport:
    def transfer() -> tuple[tuple[int, int], list[Answered]]:
        return transfer_weights(weights(), engine), make_probe(engine, actor)

    def compute() -> list[torch.Tensor]:
        return probe_logits(answered, actor)

    def verify() -> Probe:
        found = judge_logits(answered, logits, actor, bf16=bf16)
        if not found.agrees:
            raise WeightSyncError(
                f"weight_version={engine.weight_version} does not hold the trainer's weights: a logprob is "
                f"{found.difference:.3g} nats from the trainer's (bound {found.bound:.3g}); sync again."
            )
        return found

    try:
        # the forward of a sharded model is a matter of all ranks, so none begins it before all have completions
        (num_tensors, num_bytes), answered = together(collectives, transfer)
        # who cannot go on in the middle of it must not meet the others elsewhere, as they still are in it
        logits = compute() if is_spread(actor) else together(collectives, compute)
        found = together(collectives, verify)
    except BaseException:
        if engine.status in {"awake", "updating"}:
            engine.engine.abort(engine)  # what nobody could verify must not generate
        raise
    return SyncReport(
        weight_version=engine.weight_version,
        num_tensors=num_tensors,
        num_bytes=num_bytes,
        max_logprob_difference=found.difference,
    )
