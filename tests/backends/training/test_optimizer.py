"""AdamW, what it leaves alone, and its schedules."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightrft.backends.training.optimizer import create_adamw
from lightrft.backends.training.schedule import build_schedule, rate_factor
from lightrft.backends.training.single import build_training
from lightrft.errors import ConfigError
from lightrft.strategy import STRATEGIES, get_strategy
from lightrft.strategy.config import SCHEDULERS, StrategyConfig


class Tied(nn.Module):
    """A tiny language model whose input and output embeddings are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(ids)))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    strategy = build_training(StrategyConfig())
    strategy.backward(loss, model, optimizer)
    assert strategy.optimizer_step(optimizer, model, None).stepped


def test_tied_parameters_are_stepped_once_and_stay_tied() -> None:
    """A tied matrix is one parameter of the optimizer; after a step both names still hold one tensor."""
    torch.manual_seed(0)
    model, reference = Tied(), Tied()
    reference.load_state_dict(model.state_dict())
    optimizer = create_adamw(model, lr=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters())) == 3
    one_step(model, optimizer, model(torch.arange(7)).square().mean())
    assert model.head.weight is model.embedding.weight
    raw = torch.optim.AdamW(reference.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    reference(torch.arange(7)).square().mean().backward()
    nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    raw.step()
    assert torch.equal(model.embedding.weight, reference.embedding.weight)


@pytest.mark.parametrize("options", [None, ((0.5, 0.75), 0.25), ((0.0, 0.9), 1e-8)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.25])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps_are_those_of_the_paper(
    strategy: str, decay: float, options: tuple[tuple[float, float], float] | None
) -> None:
    """Given gradients move a matrix and a bias as AdamW does, by the rate, betas, decay and eps that were asked for."""
    model = nn.Linear(3, 2)
    arguments = {} if options is None else {"betas": options[0], "eps": options[1]}
    optimizer = get_strategy({"strategy": strategy}).create_optimizer(model, lr=0.1, weight_decay=decay, **arguments)
    (first, second), eps = options or ((0.9, 0.95), 1e-8)
    generator = np.random.default_rng(0)
    for parameter, decayed in ((model.weight, decay), (model.bias, 0.0)):
        value, mean, square = parameter.detach().double().numpy(), 0.0, 0.0
        for step, size in enumerate((1.0, 0.25, 0.5), start=1):  # so that an average differs from a largest value
            gradient = size * generator.normal(size=tuple(parameter.shape))
            mean, square = first * mean + (1 - first) * gradient, second * square + (1 - second) * gradient**2
            root = np.sqrt(square / (1 - second**step))
            value = value * (1 - 0.1 * decayed) - 0.1 * mean / (1 - first**step) / (root + eps)
            optimizer.zero_grad()
            parameter.grad = torch.from_numpy(gradient).float()
            optimizer.step()
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_keep_their_bits_and_get_no_state() -> None:
    """Parameters that ask for no gradient are not the optimizer's, do not move and do not decay."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(requires_grad=False)
    before = model[0].weight.clone()
    optimizer = create_adamw(model, lr=0.1, weight_decay=0.5)
    one_step(model, optimizer, model(torch.ones(2, 3)).mean())
    assert torch.equal(model[0].weight, before)
    assert set(optimizer.state) == set(model[1].parameters())


def test_weight_decay_leaves_norms_and_biases_alone() -> None:
    """With a gradient of zero, decay shrinks matrices by 1 - lr * decay and leaves everything of fewer dims alone."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = create_adamw(model, lr=0.1, weight_decay=0.5)
    one_step(model, optimizer, sum(parameter.sum() * 0.0 for parameter in model.parameters()))
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name == "0.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_groups_are_never_empty() -> None:
    """A model of vectors alone, or of matrices alone, has one group."""
    vectors, matrices = nn.LayerNorm(3), nn.Linear(3, 3, bias=False)
    assert [group["weight_decay"] for group in create_adamw(vectors, weight_decay=0.1).param_groups] == [0.0]
    assert [group["weight_decay"] for group in create_adamw(matrices, weight_decay=0.1).param_groups] == [0.1]


def test_settings_reach_the_optimizer() -> None:
    """Learning rate, betas, eps and the fused kernel are those that were asked for, or those of the signature."""
    group = create_adamw(nn.Linear(2, 2), lr=0.5, betas=(0.1, 0.2), eps=1e-3).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.5, (0.1, 0.2), 1e-3, True)
    group = create_adamw(nn.Linear(2, 2)).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-5, (0.9, 0.95), 1e-8, 0.0)


def test_a_model_without_trained_parameters_is_refused() -> None:
    """An optimizer of nothing is an error that names the model."""
    with pytest.raises(ConfigError, match="model=Linear has no parameter"):
        create_adamw(nn.Linear(2, 2).requires_grad_(requires_grad=False))


@given(
    kind=st.sampled_from(SCHEDULERS),
    num_steps=st.integers(1, 200),
    warmup_ratio=st.floats(0, 1),
    min_ratio=st.floats(0, 1),
)
def test_schedules_warm_up_and_decay(kind: str, num_steps: int, warmup_ratio: float, min_ratio: float) -> None:
    """Rates rise during the warm-up and never afterwards; all are positive at first, at most the peak, and end low."""
    warmup = int(warmup_ratio * num_steps)
    rates = [
        rate_factor(step, kind, num_steps=num_steps, warmup_steps=warmup, min_ratio=min_ratio)
        for step in range(num_steps + 2)
    ]
    assert rates[0] > 0
    assert max(rates) <= 1 + 1e-12
    assert all(a < b for a, b in itertools.pairwise(rates[: warmup + 1]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[warmup:]))
    if warmup < num_steps:
        assert rates[warmup] == pytest.approx(1.0)
    if kind != "constant" and warmup < num_steps - 1:
        assert rates[num_steps - 1 :] == pytest.approx([min_ratio] * 3, abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_is_torch_s_own(kind: str) -> None:
    """Linear and cosine decay follow torch's LinearLR and CosineAnnealingLR over the same steps."""

    def rates(build: object) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        scheduler = build(optimizer)
        found = []
        for _ in range(9):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    def theirs(optimizer: torch.optim.Optimizer) -> object:
        if kind == "linear":
            return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.25, total_iters=8)
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=0.5)

    def ours(optimizer: torch.optim.Optimizer) -> object:
        return build_schedule(optimizer, kind, num_steps=9, min_ratio=0.25)

    assert rates(ours) == pytest.approx(rates(theirs), rel=1e-12)


def test_a_schedule_resumes_where_it_was() -> None:
    """A schedule's state loaded into a new one gives the rates that the first one would have given."""

    def build() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, build_schedule(optimizer, "cosine", num_steps=10, warmup_ratio=0.2)

    optimizer, scheduler = build()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    other, resumed = build()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for each, its in ((optimizer, scheduler), (other, resumed)):
        each.step()
        its.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert math.isclose(
        optimizer.param_groups[0]["lr"], rate_factor(5, "cosine", num_steps=10, warmup_steps=2, min_ratio=0)
    )


def test_unknown_schedules_and_empty_runs_are_refused() -> None:
    """An unknown name is an error with the nearest one, and a run has at least one step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        build_schedule(optimizer, "cosin", num_steps=1)
    with pytest.raises(ConfigError, match="max_steps=0"):
        build_schedule(optimizer, "linear", num_steps=0)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_warm_up_rises_by_equal_parts(kind: str) -> None:
    """Step i of a warm-up over three steps uses (i + 1) / 4 of the peak, and the step after it the peak."""
    rates = [rate_factor(step, kind, num_steps=9, warmup_steps=3, min_ratio=0.1) for step in range(4)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0], rel=1e-15)
