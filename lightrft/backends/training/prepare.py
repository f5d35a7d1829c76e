"""How `prepare` and its relatives take their arguments apart, the same for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, overload

from torch import nn

from lightrft.backends.training.schedule import build_schedule
from lightrft.backends.training.window import open_window
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.training import (
    CreateOptimizer,
    Prepare,
    Prepared,
    PrepareModelsAndOptimizers,
    PrepareRewardModel,
    Trainable,
    Triple,
)

__all__ = [
    "PlaceModel",
    "PlaceTrainable",
    "build_prepare",
    "build_prepare_models_and_optimizers",
    "build_prepare_reward_model",
]


class PlaceModel(Protocol):
    """Readies one model for a backend."""

    def __call__(self, model: nn.Module, /) -> nn.Module:
        """Return the model placed, sharded or wrapped; one that is ready stays as it is.

        Args:
            model: plain or prepared.
        """
        ...


class PlaceTrainable(Protocol):
    """Readies one model with what trains it."""

    def __call__(self, trainable: Trainable, /) -> Trainable:
        """Return model, optimizer and schedule, ready; what is ready stays as it is.

        Args:
            trainable: plain or prepared.
        """
        ...


def build_prepare(place_model: PlaceModel, place_trainable: PlaceTrainable) -> Prepare:
    """Return `prepare`, which hands every argument to one of the two functions.

    Args:
        place_model: readies a model.
        place_trainable: readies a triple.
    """

    def prepare_one(given: nn.Module | Triple, *, is_rlhf: bool) -> Prepared:
        if isinstance(given, nn.Module):
            return place_model(_frozen(given) if is_rlhf else given)
        trainable = place_trainable(Trainable(*given))
        open_window(trainable.optimizer)
        return trainable

    @overload
    def prepare(model: nn.Module, /, *, is_rlhf: bool = False) -> nn.Module: ...
    @overload
    def prepare(triple: Triple, /, *, is_rlhf: bool = False) -> Trainable: ...
    @overload
    def prepare(
        first: nn.Module | Triple, second: nn.Module | Triple, /, *rest: nn.Module | Triple, is_rlhf: bool = False
    ) -> list[Prepared]: ...
    def prepare(*models_or_triples: nn.Module | Triple, is_rlhf: bool = False) -> Prepared | list[Prepared]:
        prepared = [prepare_one(given, is_rlhf=is_rlhf) for given in models_or_triples]
        return prepared[0] if len(prepared) == 1 else prepared

    return prepare


def build_prepare_reward_model(place_model: PlaceModel) -> PrepareRewardModel:
    """Return `prepare_reward_model`.

    Args:
        place_model: readies a model.
    """

    def prepare_reward_model(model: nn.Module) -> nn.Module:
        return place_model(_frozen(model))

    return prepare_reward_model


def build_prepare_models_and_optimizers(
    config: StrategyConfig, *, create_optimizer: CreateOptimizer, prepare: Prepare
) -> PrepareModelsAndOptimizers:
    """Return `prepare_models_and_optimizers`.

    Args:
        config: settings of the optimizers, unless a call brings its own.
        create_optimizer: the backend's.
        prepare: the backend's.
    """

    def trainable(model: nn.Module, settings: StrategyConfig, lr: float, max_steps: int) -> Trainable:
        optimizer = create_optimizer(model, lr=lr, betas=settings.adam_betas, weight_decay=settings.l2)
        scheduler = build_schedule(
            optimizer,
            settings.lr_scheduler,
            num_steps=max_steps,
            warmup_ratio=settings.lr_warmup_ratio,
            min_ratio=settings.min_lr_ratio,
        )
        return prepare((model, optimizer, scheduler))

    def prepare_models_and_optimizers(
        actor: nn.Module,
        critic: nn.Module | None,
        reward_models: nn.Module | Sequence[nn.Module] | None,
        initial_model: nn.Module | None,
        args: object = None,
        max_steps: int = 1,
    ) -> tuple[Trainable, Trainable | None, list[nn.Module], nn.Module | None]:
        settings = config if args is None else StrategyConfig.from_args(args)
        return (
            trainable(actor, settings, settings.actor_learning_rate, max_steps),
            None if critic is None else trainable(critic, settings, settings.critic_learning_rate, max_steps),
            [prepare(model, is_rlhf=True) for model in _listed(reward_models)],
            None if initial_model is None else prepare(initial_model, is_rlhf=True),
        )

    return prepare_models_and_optimizers


def _listed(reward_models: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    if reward_models is None:
        return []
    if isinstance(reward_models, nn.Module):  # an nn.Sequential is one model, although it has a length
        return [reward_models]
    return list(reward_models)


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(requires_grad=False).eval()
