"""The small models of laws."""

from __future__ import annotations

import random

import attrs
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


@given(model_cases(exact=False))
def test_buffers_follow_from_the_seed_and_are_never_zero(case: ModelCase) -> None:
    """A buffer that was lost or not restored shows; logits see the offset, and its quarters are exact."""
    model, other = build_model(case), build_model(attrs.evolve(case, seed=case.seed + 1))
    buffers = dict(model.named_buffers())
    assert {name: (one.dtype, one.shape) for name, one in buffers.items()} == {
        "steps": (torch.int64, ()),
        "offset": (torch.float32, (2,)),
    }
    assert buffers.keys() <= model.state_dict().keys()
    assert all(bool((one != 0).all()) for one in buffers.values())
    assert any(not torch.equal(one, buffers[name]) for name, one in other.named_buffers())
    assert torch.equal((model.offset * 4).round(), model.offset * 4)
    ids = torch.tensor([[0]])
    before = model(ids)
    model.offset.add_(0.25)
    assert torch.allclose(model(ids), before + 0.5)


@given(model_cases(exact=False), st.sampled_from([0, -1]))
def test_a_broken_model_has_one_gradient_that_is_not_a_number(case: ModelCase, broken: int) -> None:
    """The logits stay, and the gradient of one parameter alone is not finite."""
    model, ids = build_model(case), torch.tensor([[0, 1]])
    logits = model(ids, broken)
    assert torch.equal(logits, model(ids))
    (logits * torch.arange(case.vocabulary)).sum().backward()
    gradients = [one.grad for one in model.parameters() if one.requires_grad and one.numel() and one.grad is not None]
    is_finite = [bool(one.isfinite().all()) for one in gradients]
    assert is_finite.count(False) == 1
    assert not is_finite[broken]


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
