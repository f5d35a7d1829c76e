"""What the laws about a strategy's engine rest on."""

from __future__ import annotations

import math
from typing import Literal

import hypothesis
import pytest
import torch

from lightrft.config import EngineConfig
from lightrft.testing.cases.policies import VOCABULARY, PolicyCase
from lightrft.testing.law import Harness
from lightrft.testing.laws import rollout
from lightrft.testing.laws.rollout import _decisive, _evened, _sharpened
from lightrft.testing.ranks.simulated import run_simulated_ranks
from lightrft.testing.replicated import build_simulated
from lightrft.testing.subject import subject_of


@pytest.mark.parametrize("architecture", ["qwen3", "small"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_did_not_arrive_show_in_any_two_tokens(
    architecture: Literal["qwen3", "small"], tied: bool
) -> None:
    """The old policy is even; under the new one hardly a token has the same logprob, so no probe is fooled twice."""
    tokens = torch.arange(VOCABULARY)[:, None]
    num_near = 0
    for seed in range(20):
        case = PolicyCase(architecture=architecture, tied=tied, seed=seed)
        for model, wanted in ((_evened(case), True), (_sharpened(case), False)):
            output = model(tokens)
            logprobs = torch.log_softmax(getattr(output, "logits", output)[:, 0].double(), dim=-1)
            near = (logprobs + math.log(VOCABULARY)).abs() < 1e-3
            assert near.all() or not wanted
            num_near += 0 if wanted else int(near.sum())
    assert num_near <= 20 * VOCABULARY**2 // 500


@pytest.mark.parametrize("seed", range(3))
def test_draws_do_not_depend_on_the_split_over_two_ranks(seed: int) -> None:
    """The scripted engine draws nothing; with one that does, two ranks give what one gives."""
    pytest.importorskip("transformers")
    subject = subject_of(build_simulated, "strategy", engine=EngineConfig(type="hf"))
    settings = hypothesis.settings(
        max_examples=10,
        database=None,
        deadline=None,
    )
    (law,) = [law for law in rollout.LAWS if law.id == "rollout.generate"]
    law.check(
        Harness(
            subject=subject,
            run=run_simulated_ranks(subject, 2),
            world_size=2,
            settings=settings,
            seed=seed,
            example=None,
        )
    )


@pytest.mark.parametrize("architecture", ["qwen3", "small"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_tensor_that_decides_is_there_under_all_of_its_names(
    architecture: Literal["qwen3", "small"], *, tied: bool
) -> None:
    """The head is one, and where it is tied the embedding is found with it."""
    found = _decisive(PolicyCase(architecture=architecture, tied=tied))
    heads = [names for names in found if any("head" in name for name in names)]
    assert [len(names) for names in heads] == [1 + tied]
    assert all(any("emb" in name for name in names) for names in heads) == tied
