"""What the laws of steps rest on: the reference is right, exact cases are exact, and comparisons see what differs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightrft.backends.training.schedule import rate_factor
from lightrft.errors import LawError
from lightrft.testing.cases.batches import (
    MicroBatch,
    Sample,
    Window,
    input_ids_of,
    sample_losses,
    samples_of,
    uneven_windows,
)
from lightrft.testing.cases.models import ModelCase, build_model
from lightrft.testing.cases.runs import RunCase, run_cases
from lightrft.testing.plain import from_json, to_json
from lightrft.testing.reference.comparison import require_near, require_same
from lightrft.testing.reference.training import exact_run, global_norm, rate_factors

CHEAP = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@CHEAP
@given(run_cases(world_size=2, exact=True, micro_batches=(1, 2, 4)))
def test_the_gradient_of_an_exact_case_has_no_rounding_error(case: RunCase) -> None:
    """Float32 gives the gradients of float64, at the weights that it starts from."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        model = build_model(case.model).to(dtype)
        samples = samples_of(case.windows[0])
        sample_losses(model(input_ids_of(samples)), samples, "linear").mean().backward()  # type: ignore[no-untyped-call]  # so in torch
        gradients.append([one.grad.double() for one in model.parameters() if one.grad is not None])
    narrow, wide = gradients
    assert all(torch.equal(one, other) for one, other in zip(narrow, wide, strict=True))


@CHEAP
@given(st.data(), st.integers(1, 4), st.booleans())
def test_every_rank_of_an_uneven_window_has_work_and_weights_are_shares(
    data: st.DataObject, world_size: int, exact: bool
) -> None:
    """Each rank has equally many micro-batches, one with a weight or more, and the weights of all sum to 1."""
    window = data.draw(uneven_windows(vocabulary=3, world_size=world_size, num_samples=8, exact=exact))
    assert len(set(map(len, window.ranks))) == 1
    assert all(any(batch.weight for batch in batches) for batches in window.ranks)
    assert sum(len(batch.samples) for batches in window.ranks for batch in batches if batch.weight) == 8
    weights = [batch.weight or 0.0 for batches in window.ranks for batch in batches]
    assert math.isclose(sum(weights), 1.0)


@CHEAP
@given(run_cases(world_size=2, exact=False))
def test_cases_travel_as_json(case: RunCase) -> None:
    """A case that was written and read is the same case."""
    assert from_json(to_json(case, RunCase), RunCase) == case


@given(
    kind=st.sampled_from(["constant", "cosine", "linear"]),
    num_steps=st.integers(1, 50),
    ratio=st.floats(0.0, 1.0),
    least=st.floats(0.0, 1.0),
)
def test_rates_follow_the_formula(kind: str, num_steps: int, ratio: float, least: float) -> None:
    """The list of rates agrees with the closed formula of the schedule."""
    rates = rate_factors(kind, num_steps=num_steps, warmup_ratio=ratio, min_ratio=least)
    warmup = int(ratio * num_steps)
    must = [
        rate_factor(step, kind, num_steps=num_steps, warmup_steps=warmup, min_ratio=least) for step in range(num_steps)
    ]
    assert rates == pytest.approx(must, rel=1e-12, abs=1e-12)


def test_the_loop_clips_to_the_bound() -> None:
    """With a bound below the norm and plain descent, the move is as long as rate times bound."""
    sample = Sample(input_ids=(0, 1), labels=(2, 3), coefficient=3)
    window = Window(ranks=((MicroBatch(samples=(sample,), weight=1.0),),))
    case = RunCase(model=ModelCase(seed=1), lr=0.5, max_norm=0.25, windows=(window,))

    def create_sgd(
        model: torch.nn.Module,
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> torch.optim.Optimizer:
        del betas, weight_decay, eps
        return torch.optim.SGD(model.parameters(), lr=lr)

    (step,) = exact_run(case, create_sgd)
    before = build_model(case.model)
    moved = [step.tensors[name] - parameter.detach() for name, parameter in before.named_parameters()]
    assert step.grad_norm > case.max_norm
    assert global_norm(moved) == pytest.approx(0.5 * 0.25, rel=1e-5)


@pytest.mark.parametrize(
    "seen",
    [
        {"a": torch.tensor([1.0, math.nan])},
        {"a": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"b": torch.tensor([1.0, 2.0])},
        {},
    ],
)
def test_what_is_not_the_same_is_told_apart(seen: dict[str, torch.Tensor]) -> None:
    """A value, dtype, shape or name that differs is an error."""
    with pytest.raises(LawError, match="must be"):
        require_same(seen, {"a": torch.tensor([1.0, 2.0])}, "here")


@pytest.mark.parametrize("seen", [None, math.nan, 1.2, math.inf])
def test_no_number_and_nan_are_far(seen: float | None) -> None:
    """Neither a missing number nor NaN is near anything."""
    with pytest.raises(LawError, match=r"must be 1\.0"):
        require_near("grad_norm", seen, 1.0, 0.1, "here")
