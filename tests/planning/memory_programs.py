"""What the tests of memory run on every rank: two micro-batches, and a count of the bytes that this rank holds."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightrft.config import ModelConfig
from lightrft.models.build import build_model_and_tokenizer
from lightrft.testing.subject import Rank

# 15 rows of the vocabulary and 9 heads' rows are numbers that two ranks do not divide
MODEL = ModelConfig(hidden_size=24, intermediate_size=37, num_layers=2, num_heads=2, alphabet="0123456789+=")


@attrs.frozen(kw_only=True)
class Case:
    """A model; `frozen` are parts of names of parameters that ask for no gradient."""

    frozen: tuple[str, ...] = ()
    is_tied: bool = True
    zero_stage: int = 0


@attrs.frozen(kw_only=True)
class Held:
    """Bytes of this rank."""

    parameters: int
    gradients: int
    optimizer: int


def freeze(model: nn.Module, frozen: Iterable[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))


def held(rank: Rank, case: Case) -> Held:
    """Train a window of two micro-batches; gradients are counted before the step, and state after it."""
    strategy = rank.build(attrs.evolve(rank.config, train_batch_size=2 * rank.world_size))
    strategy.setup_distributed()
    model, _ = build_model_and_tokenizer(attrs.evolve(MODEL, tie_embeddings=case.is_tied), seed=0)
    freeze(model, case.frozen)
    actor, _, _, _ = strategy.prepare_models_and_optimizers(model, None, None, None, None, 2)
    for is_last in (False, True):
        loss = actor.model(input_ids=torch.tensor([[1, 2, 3]])).logits.float().square().mean()
        strategy.backward(loss, actor.model, actor.optimizer, is_boundary=is_last)
        gradients = bytes_of(one.grad for one in strategy.unwrap_model(actor.model).parameters())
        strategy.optimizer_step(actor.optimizer, actor.model, actor.scheduler, is_boundary=is_last)
    return Held(
        parameters=bytes_of(strategy.unwrap_model(actor.model).parameters()),
        gradients=gradients,
        optimizer=bytes_of(value for state in actor.optimizer.state.values() for value in state.values()),
    )


@attrs.frozen(kw_only=True)
class HeldByZero:
    """Bytes of this rank inside of DeepSpeed."""

    parameters: int
    optimizer: int
    stepped_copy: int
    gradient_buffer: int


def held_by_zero(rank: Rank, case: Case) -> HeldByZero:
    """Train a window of one micro-batch, and count what the engine has."""
    strategy = rank.build(attrs.evolve(rank.config, train_batch_size=rank.world_size, zero_stage=case.zero_stage))
    strategy.setup_distributed()
    model, _ = build_model_and_tokenizer(MODEL, seed=0)
    freeze(model, case.frozen)
    actor, _, _, _ = strategy.prepare_models_and_optimizers(model, None, None, None, None, 2)
    loss = actor.model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().mean()
    strategy.backward(loss, actor.model, actor.optimizer, is_boundary=True)
    strategy.optimizer_step(actor.optimizer, actor.model, actor.scheduler, is_boundary=True)
    zero = actor.model.engine.optimizer
    own = [getattr(one, "ds_tensor", one) for one in strategy.unwrap_model(actor.model).parameters()]
    return HeldByZero(
        parameters=bytes_of(own),
        optimizer=bytes_of(value for state in actor.optimizer.state.values() for value in state.values()),
        stepped_copy=bytes_of(getattr(zero, "single_partition_of_fp32_groups", [])),
        gradient_buffer=bytes_of([getattr(zero, "grad_partitions_flat_buffer", None)]),
    )


def bytes_of(values: Iterable[object]) -> int:
    total = 0
    for value in values:
        if isinstance(value, DTensor):
            total += value.to_local().nbytes
        elif isinstance(value, Tensor):
            total += value.nbytes
    return total
