"""The strategy "single" with the optimizer Lion."""

from __future__ import annotations

import attrs
from torch import nn
from torch.optim import Optimizer

from lightrft.backends.training.prepare import build_prepare_models_and_optimizers
from lightrft.errors import ConfigError
from lightrft.strategy import STRATEGIES, Strategy, StrategyConfig
from lion_strategy.optimizer import Lion

__all__ = ["build_lion", "create_lion"]


def build_lion(config: StrategyConfig) -> Strategy:
    """Return "single" with the two functions replaced that make optimizers.

    Args:
        config: the settings of "single".
    """
    single = STRATEGIES["single"](config)
    return attrs.evolve(
        single,
        create_optimizer=create_lion,
        prepare_models_and_optimizers=build_prepare_models_and_optimizers(
            config, create_optimizer=create_lion, prepare=single.prepare
        ),
    )


def create_lion(
    model: nn.Module,
    *,
    lr: float = 1e-5,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> Optimizer:
    """Return Lion over the parameters that ask for gradients; `CreateOptimizer` states its laws.

    Args:
        model: the model, not yet prepared.
        lr: peak learning rate; a third to a tenth of what AdamW takes.
        betas: coefficients of the direction and of the average.
        weight_decay: decay of matrices.
        eps: Lion divides by nothing, so only the default is taken.

    Raises:
        ConfigError: `eps` was set, or no parameter asks for gradients.
    """
    if eps != 1e-8:
        raise ConfigError(f"eps={eps!r} has no meaning for Lion, which divides by nothing; leave it out.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(f"model={type(model).__name__} has no parameter that asks for gradients; unfreeze some.")
    groups: list[dict[str, object]] = [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return Lion([group for group in groups if group["params"]], lr=lr, betas=betas)
