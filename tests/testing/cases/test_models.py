"""The small models of laws."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.testing.cases.models import PARTS, ModelCase, build_model, model_cases


@given(model_cases(exact=False))
def test_equal_cases_give_equal_bits_and_draw_nothing(case: ModelCase) -> None:
    """A model follows from its case alone, and building it leaves the random stream where it was."""
    stream = torch.get_rng_state()
    first, second = build_model(case).state_dict(), build_model(case).state_dict()
    assert torch.equal(torch.get_rng_state(), stream)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@given(model_cases())
def test_tied_frozen_and_odd_are_what_the_case_says(case: ModelCase) -> None:
    """A tied head is the embedding; what is frozen asks for no gradient, and what is not does."""
    model = build_model(case)
    assert (model.head.weight is model.embedding.weight) == case.tied
    assert model.odd.shape == case.odd
    asks = {
        "embedding": model.embedding.weight.requires_grad,
        "middle": model.middle.weight.requires_grad,
        "bias": model.middle.bias.requires_grad,
        "scale": model.scale.requires_grad,
        "odd": model.odd.requires_grad,
    }
    assert asks == {part: part not in case.frozen for part in PARTS}


@given(model_cases(), st.lists(st.integers(0, 1), min_size=1, max_size=8), st.randoms())
def test_gradients_are_the_same_in_any_order_of_summation(
    case: ModelCase, tokens: list[int], shuffled: random.Random
) -> None:
    """Without a norm, float32 holds every gradient exactly: summed one sample at a time, shuffled, or in float64."""

    def gradients(ids: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
        model = build_model(case).to(dtype)
        for token in ids:
            (model(torch.tensor([[token]])) * torch.arange(case.vocabulary)).sum().backward()
        return [p.grad.double() for p in model.parameters() if p.grad is not None]

    one = gradients(tokens, torch.float32)
    shuffled.shuffle(tokens)
    assert all(map(torch.equal, one, gradients(tokens, torch.float32)))
    assert all(map(torch.equal, one, gradients(tokens, torch.float64)))
