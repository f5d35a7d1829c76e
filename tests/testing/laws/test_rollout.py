"""What the laws about a strategy's engine rest on."""

from __future__ import annotations

import math

import pytest
import torch

from lightrft.testing.cases.policies import VOCABULARY, PolicyCase
from lightrft.testing.laws.rollout import _evened, _sharpened


@pytest.mark.parametrize("architecture", ["qwen3", "small"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_did_not_arrive_show_in_any_two_tokens(architecture: str, tied: bool) -> None:
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
