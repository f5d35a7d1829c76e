"""The law of the optimizer's arithmetic, whatever is computed around it."""

from __future__ import annotations

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from lightrft.testing.cases.models import ModelCase, build_model, model_cases
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.reference.comparison import require_close
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

_SIZES = (1.0, 0.25, 0.5)
"""Of the gradients, by step: they fall and rise, so that an average of squares differs from its largest value."""

_DEFAULTS = ((0.9, 0.95), 1e-8)
"""Betas and eps of `CreateOptimizer`."""


@attrs.frozen(kw_only=True)
class _OptimizerCase:
    """A model, what an optimizer of it is asked for, and the seed of the gradients that it is given.

    Attributes:
        model: the model.
        lr: learning rate.
        weight_decay: of matrices.
        options: betas, and eps beside gradients of about 1; None asks for neither, which is `_DEFAULTS`.
        seed: of the gradients.
    """

    model: ModelCase
    lr: float
    weight_decay: float
    options: tuple[tuple[float, float], float] | None
    seed: int


def _optimizer_cases(world_size: int) -> SearchStrategy[_OptimizerCase]:
    del world_size
    return st.builds(
        _OptimizerCase,
        model=model_cases(),
        lr=st.sampled_from([0.125, 0.0625]),
        weight_decay=st.sampled_from([0.0, 0.25]),
        options=st.sampled_from([((0.5, 0.75), 0.25), None, ((0.0, 0.9), 1e-8)]),
        seed=st.integers(0, 100),
    )


def _gradients(case: _OptimizerCase) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(case.seed)
    trained = [(name, weight) for name, weight in build_model(case.model).named_parameters() if weight.requires_grad]
    return [
        {name: size * torch.randn(weight.shape, generator=generator) for name, weight in trained} for size in _SIZES
    ]


def _step_plain(rank: Rank, case: _OptimizerCase) -> dict[str, Tensor]:
    """Step a plain model, so that no backward pass plays a part."""
    create, model = rank.build(rank.config).create_optimizer, build_model(case.model)
    if case.options is None:
        optimizer = create(model, lr=case.lr, weight_decay=case.weight_decay)
    else:
        betas, eps = case.options
        optimizer = create(model, lr=case.lr, betas=betas, weight_decay=case.weight_decay, eps=eps)
    for gradients in _gradients(case):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.get(name)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _adamw(case: _OptimizerCase) -> dict[str, Tensor]:
    """Return the parameters as the paper's equations make them, in float64."""
    gradients, found = _gradients(case), dict[str, Tensor]()
    for name, parameter in build_model(case.model).named_parameters():
        weight = parameter.detach().double()
        if name in gradients[0]:
            decay = case.weight_decay if parameter.dim() >= 2 else 0.0
            weight = _adamw_weight(case, weight, [step[name].double() for step in gradients], decay)
        found[name] = weight
    return found


def _adamw_weight(case: _OptimizerCase, weight: Tensor, gradients: list[Tensor], decay: float) -> Tensor:
    (first_beta, second_beta), eps = case.options or _DEFAULTS
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        mean = first_beta * mean + (1 - first_beta) * gradient
        square = second_beta * square + (1 - second_beta) * gradient * gradient
        size = (square / (1 - second_beta**step)).sqrt() + eps
        weight = weight * (1 - case.lr * decay) - case.lr * mean / (1 - first_beta**step) / size
    return weight


def _optimizer_holds(harness: Harness, case: _OptimizerCase) -> None:
    must = _adamw(case)
    # a few roundings of numbers of the size of the weights and of the steps, none of which is beyond 2 * lr
    tolerances = {name: 1e-6 * (weight.abs() + 2 * len(_SIZES) * case.lr) for name, weight in must.items()}
    for rank, seen in enumerate(harness.run(_step_plain, case)):
        require_close(seen, must, tolerances, f"rank {rank}, after {len(_SIZES)} steps of given gradients")


LAWS: tuple[Law, ...] = (
    Law(
        id="training.adamw",
        statement="The optimizer of create_optimizer makes AdamW's steps, with the rate, betas, decay and eps that it "
        "was asked for, and leaves what asks for no gradient alone.",
        check=for_all(_optimizer_cases, _optimizer_holds),
    ),
)
"""The law."""
