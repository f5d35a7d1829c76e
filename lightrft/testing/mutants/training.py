"""Planted bugs of models, optimizers and data around the step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from lightrft.backends.training.dataloader import build_setup_dataloader
from lightrft.backends.training.prepare import build_prepare, build_prepare_models_and_optimizers
from lightrft.backends.training.single import build_training
from lightrft.backends.training.window import mark_backward
from lightrft.config import StrategyConfig
from lightrft.strategy.protocols import MemoryReport, StepResult, Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.models import SmallModel
from lightrft.testing.mutants.mutant import Mutant, strategy_mutant
from lightrft.testing.replicated import build_simulated

__all__ = ["MUTANTS"]

_Sample = TypeVar("_Sample")


def _decay_everything(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.create_optimizer

    def create_optimizer(
        model: nn.Module,
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> Optimizer:
        optimizer = inner(model, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
        for group in optimizer.param_groups:
            group["weight_decay"] = weight_decay
        return optimizer

    return attrs.evolve(strategy, create_optimizer=create_optimizer)


def _couple_decay(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.create_optimizer

    def create_optimizer(
        model: nn.Module,
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> Optimizer:
        groups = inner(model, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps).param_groups
        chosen = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
        return torch.optim.Adam(chosen, lr=lr, betas=betas, eps=eps)

    return attrs.evolve(strategy, create_optimizer=create_optimizer)


def _accept_frozen(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.create_optimizer

    def create_optimizer(
        model: nn.Module,
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> Optimizer:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return torch.optim.AdamW(model.parameters(), lr=lr)
        return inner(model, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)

    return attrs.evolve(strategy, create_optimizer=create_optimizer)


@torch.no_grad()
def _shrink_frozen(model: nn.Module) -> None:
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.mul_(0.75)


def _decay_frozen(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.optimizer_step

    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        result = inner(optimizer, model, scheduler, is_boundary=is_boundary)
        if result.stepped:
            _shrink_frozen(model)
        return result

    return attrs.evolve(strategy, optimizer_step=optimizer_step)


def _prepared_with(
    strategy: Strategy,
    config: StrategyConfig,
    place: Callable[[nn.Module], nn.Module],
) -> Strategy:
    """Return the strategy whose `prepare` and its relative hand each model to a function first."""

    def place_trainable(trainable: Trainable) -> Trainable:
        return strategy.prepare(trainable._replace(model=place(trainable.model)))

    def place_model(model: nn.Module) -> nn.Module:
        return strategy.prepare(place(model))

    prepare = build_prepare(place_model, place_trainable)
    return attrs.evolve(
        strategy,
        prepare=prepare,
        prepare_models_and_optimizers=build_prepare_models_and_optimizers(
            config, create_optimizer=strategy.create_optimizer, prepare=prepare
        ),
    )


def _untied(model: nn.Module) -> nn.Module:
    if isinstance(model, SmallModel):
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


def _untie(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    return _prepared_with(strategy, config, _untied)


def _copy_models(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    return _prepared_with(strategy, config, copy.deepcopy)


def _evaluating(model: nn.Module) -> nn.Module:
    return model.eval()


def _leave_evaluating(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    return _prepared_with(strategy, config, _evaluating)


def _cast(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    def narrowed(model: nn.Module) -> nn.Module:
        return model.to(torch.bfloat16) if config.bf16 else model

    return _prepared_with(strategy, config, narrowed)


@torch.no_grad()
def _round(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))


def _round_weights(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    inner = strategy.optimizer_step

    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        result = inner(optimizer, model, scheduler, is_boundary=is_boundary)
        if config.bf16:
            _round(model)
        return result

    return attrs.evolve(strategy, optimizer_step=optimizer_step)


def _thaw_reference(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    def place_model(model: nn.Module) -> nn.Module:
        return strategy.prepare(model).requires_grad_()

    def place_trainable(trainable: Trainable) -> Trainable:
        return strategy.prepare(trainable)

    prepare = build_prepare(place_model, place_trainable)
    everything = build_prepare_models_and_optimizers(
        config, create_optimizer=strategy.create_optimizer, prepare=prepare
    )
    return attrs.evolve(strategy, prepare=prepare, prepare_models_and_optimizers=everything)


def _prepare_all_wrongly(
    strategy: Strategy, *, mixes_rates: bool = False, ignores_args: bool = False, starts_late: bool = False
) -> Strategy:
    inner = strategy.prepare_models_and_optimizers

    def prepare_models_and_optimizers(
        actor: nn.Module,
        critic: nn.Module | None,
        reward_models: nn.Module | Sequence[nn.Module] | None,
        initial_model: nn.Module | None,
        args: object = None,
        max_steps: int = 1,
    ) -> tuple[Trainable, Trainable | None, list[nn.Module], nn.Module | None]:
        chosen = None if ignores_args else args
        first, second, rewards, initial = inner(actor, critic, reward_models, initial_model, chosen, max_steps)
        if starts_late and first.scheduler is not None:
            first.optimizer.step()  # torch warns of a schedule that moves before its optimizer
            first.scheduler.step()
        if mixes_rates and second is not None:
            second.optimizer.param_groups[0]["lr"] = first.optimizer.param_groups[0]["lr"]
        return first, second, rewards, initial

    return attrs.evolve(strategy, prepare_models_and_optimizers=prepare_models_and_optimizers)


def _mix_rates(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    return _prepare_all_wrongly(strategy, mixes_rates=True)


def _ignore_args(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    return _prepare_all_wrongly(strategy, ignores_args=True)


def _wrap_names(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.named_tensors

    def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return ((f"module.{name}", tensor) for name, tensor in inner(model))

    return attrs.evolve(strategy, named_tensors=named_tensors)


def _name_parameters_alone(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config

    def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return iter(strategy.unwrap_model(model).named_parameters())

    return attrs.evolve(strategy, named_tensors=named_tensors)


def _average_wrongly(
    strategy: Strategy, *, is_swapped: bool = False, skips_first: bool = False, clamps: bool = False
) -> Strategy:
    inner = strategy.moving_average

    def moving_average(model: nn.Module, model_ema: nn.Module, beta: float = 0.992) -> None:
        first = next(strategy.unwrap_model(model_ema).parameters())
        kept = first.detach().clone()
        share = min(1.0, max(0.0, beta)) if clamps else beta
        inner(model, model_ema, 1.0 - share if is_swapped else share)
        if skips_first:
            first.data.copy_(kept)

    return attrs.evolve(strategy, moving_average=moving_average)


def _swap_beta(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    return _average_wrongly(strategy, is_swapped=True)


def _skip_first(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    return _average_wrongly(strategy, skips_first=True)


def _clamp_beta(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    return _average_wrongly(strategy, clamps=True)


def _same_share(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    return attrs.evolve(strategy, setup_dataloader=build_setup_dataloader(seed=config.seed, rank=0, world_size=1))


def _one_order(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    return attrs.evolve(strategy, setup_dataloader=build_setup_dataloader(seed=0, rank=0, world_size=1))


def _never_shuffle(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.setup_dataloader

    def setup_dataloader(
        dataset: Dataset[_Sample],
        batch_size: int,
        *,
        shuffle: bool = True,
        collate_fn: Callable[[list[_Sample]], object] | None = None,
        drop_last: bool = True,
    ) -> DataLoader[_Sample]:
        del shuffle
        return inner(dataset, batch_size, shuffle=False, collate_fn=collate_fn, drop_last=drop_last)

    return attrs.evolve(strategy, setup_dataloader=setup_dataloader)


def _keep_last(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.setup_dataloader

    def setup_dataloader(
        dataset: Dataset[_Sample],
        batch_size: int,
        *,
        shuffle: bool = True,
        collate_fn: Callable[[list[_Sample]], object] | None = None,
        drop_last: bool = True,
    ) -> DataLoader[_Sample]:
        inner(dataset, batch_size, shuffle=shuffle, collate_fn=collate_fn, drop_last=drop_last)
        return inner(dataset, batch_size, shuffle=shuffle, collate_fn=collate_fn, drop_last=False)

    return attrs.evolve(strategy, setup_dataloader=setup_dataloader)


def _forget_state(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.offload

    def offload(*handles: nn.Module | Optimizer) -> None:
        inner(*handles)
        for handle in handles:
            if isinstance(handle, Optimizer):
                handle.state.clear()

    return attrs.evolve(strategy, offload=offload)


def _drop_gradients(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.offload

    def offload(*handles: nn.Module | Optimizer) -> None:
        inner(*handles)
        for handle in handles:
            if isinstance(handle, nn.Module):
                handle.zero_grad()

    return attrs.evolve(strategy, offload=offload)


def _place_alone(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    return attrs.evolve(strategy, prepare=build_training(config).prepare)


def _reload_rounded(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.reload

    def reload(*handles: nn.Module | Optimizer) -> None:
        inner(*handles)
        for handle in handles:
            if isinstance(handle, nn.Module):
                _round(handle)

    return attrs.evolve(strategy, reload=reload)


def _report_kibibytes(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.report_memory

    def report_memory(label: str = "") -> MemoryReport:
        report = inner(label)
        return attrs.evolve(report, resident=report.resident // 2**10)

    return attrs.evolve(strategy, report_memory=report_memory)


def _accept_vectors(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.backward

    def backward(
        loss: Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float | None = None,
        is_boundary: bool | None = None,
    ) -> None:
        inner(loss.mean(), model, optimizer, weight=weight, is_boundary=is_boundary)

    return attrs.evolve(strategy, backward=backward)


def _pass_over_constants(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.backward

    def backward(
        loss: Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float | None = None,
        is_boundary: bool | None = None,
    ) -> None:
        if loss.requires_grad:
            inner(loss, model, optimizer, weight=weight, is_boundary=is_boundary)

    return attrs.evolve(strategy, backward=backward)


def _pass_over_weights(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.backward

    def backward(
        loss: Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float | None = None,
        is_boundary: bool | None = None,
    ) -> None:
        if weight is None or math.isfinite(weight):
            inner(loss, model, optimizer, weight=weight, is_boundary=is_boundary)

    return attrs.evolve(strategy, backward=backward)


def _mark_refused(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.backward

    def backward(
        loss: Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float | None = None,
        is_boundary: bool | None = None,
    ) -> None:
        mark_backward(optimizer)
        inner(loss, model, optimizer, weight=weight, is_boundary=is_boundary)

    return attrs.evolve(strategy, backward=backward)


def _build_in_half(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config

    @contextmanager
    def half() -> Generator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def init_model_context(*, meta_init: bool = False) -> AbstractContextManager[None]:
        del meta_init
        return half()

    return attrs.evolve(strategy, init_model_context=init_model_context)


def _late_schedule(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    return _prepare_all_wrongly(strategy, starts_late=True)


MUTANTS: tuple[Mutant, ...] = (
    strategy_mutant("training.decay.biases_decayed", "Weight decay shrinks norms and biases too.", _decay_everything),
    strategy_mutant("training.decay.decay_coupled", "Weight decay is added to the gradient.", _couple_decay),
    strategy_mutant(
        "training.refusals.frozen_accepted", "A frozen model gets an optimizer of all weights.", _accept_frozen
    ),
    strategy_mutant("training.frozen.frozen_decayed", "Frozen parameters shrink.", _decay_frozen),
    strategy_mutant("training.tied.untied", "prepare gives the head a weight of its own.", _untie),
    strategy_mutant(
        "training.prepare_models_and_optimizers.copied",
        "prepare copies the model; the optimizer has the old one.",
        _copy_models,
    ),
    strategy_mutant("training.prepare.left_evaluating", "prepare leaves models in evaluation mode.", _leave_evaluating),
    strategy_mutant("training.prepare.reference_thawed", "Reference models ask for gradients.", _thaw_reference),
    strategy_mutant(
        "training.prepare_models_and_optimizers.rates_mixed", "The critic trains at the rate of the actor.", _mix_rates
    ),
    strategy_mutant(
        "training.prepare_models_and_optimizers.args_ignored", "The args of a call play no part.", _ignore_args
    ),
    strategy_mutant("step.schedule.late_schedule", "The warm-up begins one step late.", _late_schedule),
    strategy_mutant("training.prepare.names_wrapped", "Names carry the prefix of a wrapper.", _wrap_names),
    strategy_mutant(
        "training.prepare.parameters_alone", "Buffers and second names are missing.", _name_parameters_alone
    ),
    strategy_mutant(
        "training.moving_average.beta_swapped", "beta is the share of the model, not of the average.", _swap_beta
    ),
    strategy_mutant(
        "training.moving_average.average_skips", "The first parameter of an average never moves.", _skip_first
    ),
    strategy_mutant(
        "training.moving_average.beta_clamped", "A beta that is out of range is moved into it.", _clamp_beta
    ),
    strategy_mutant(
        "training.setup_dataloader.same_share",
        "Every rank reads the same samples.",
        _same_share,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant("training.setup_dataloader.one_order", "The order does not follow from the seed.", _one_order),
    strategy_mutant("training.setup_dataloader.never_shuffled", "The order is never random.", _never_shuffle),
    strategy_mutant("training.setup_dataloader.last_kept", "A batch that is not full is not left out.", _keep_last),
    strategy_mutant("training.offload.state_forgotten", "offload loses the optimizer's state.", _forget_state),
    strategy_mutant(
        "training.offload.gradients_dropped", "offload loses what a window has accumulated.", _drop_gradients
    ),
    strategy_mutant(
        "training.prepare.not_replicated",
        "Each rank keeps its own values.",
        _place_alone,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant("training.offload.reload_rounded", "reload rounds to bfloat16.", _reload_rounded),
    strategy_mutant("training.report_memory.kibibytes", "Memory is reported in KiB.", _report_kibibytes),
    strategy_mutant(
        "training.refusals.vector_loss", "A loss with a shape is accepted, and its mean taken.", _accept_vectors
    ),
    strategy_mutant("training.refusals.constant_loss", "A loss without gradient is passed over.", _pass_over_constants),
    strategy_mutant("training.refusals.weight_passed_over", "A weight of NaN is passed over.", _pass_over_weights),
    strategy_mutant(
        "training.refusals.refused_counts", "A refused backward is one that a step may follow.", _mark_refused
    ),
    strategy_mutant("training.init_model_context.built_in_half", "Models are built in bfloat16.", _build_in_half),
    strategy_mutant("training.bf16.cast", "bf16=True casts parameters to bfloat16.", _cast),
    strategy_mutant("training.bf16.rounded", "bf16=True rounds parameters after every step.", _round_weights),
)
"""The mutants."""
