"""What the laws of engines do besides holding: replay an example, refuse one, and tell what they see."""

from __future__ import annotations

import hypothesis
import pytest
import torch

from lightrft.config import EngineConfig
from lightrft.errors import ConfigError, LawError
from lightrft.strategy.protocols import Completion, SamplingParams
from lightrft.testing.cases.policies import VOCABULARY, PolicyCase, build_policy, policy_for
from lightrft.testing.law import Harness
from lightrft.testing.laws import engine
from lightrft.testing.laws.engine.sampling import _deviation, _wanted_shares
from lightrft.testing.ranks.here import run_here
from lightrft.testing.reference.completions import (
    Refusal,
    refusal,
    require_greedy,
    require_logprobs,
    require_refusal,
    require_same_draws,
    require_same_greedy,
)
from lightrft.testing.subject import subject_of


def _harness(example: str | None) -> Harness:
    subject = subject_of("hf", "engine")
    settings = hypothesis.settings(max_examples=1, database=None, deadline=None)
    return Harness(subject=subject, run=run_here(subject), world_size=1, settings=settings, seed=0, example=example)


def _completion(tokens: tuple[int, ...], logprobs: tuple[float, ...] | None = None, index: int = 0) -> Completion:
    return Completion(
        prompt_ids=(1, 2),
        token_ids=tokens,
        logprobs=logprobs or (-1.0,) * len(tokens),
        finish_reason="length",
        weight_version=0,
        sample_index=index,
    )


def test_policies_have_the_vocabulary_and_equal_cases_give_equal_bits() -> None:
    """Both architectures give logits for `VOCABULARY` tokens, and a case is all that the weights depend on."""
    for architecture in ("qwen3", "small"):
        case = PolicyCase(architecture=architecture, tied=True, seed=3)
        one, other = build_policy(case), build_policy(case)
        output = one(torch.tensor([[0, VOCABULARY - 1]]))
        assert getattr(output, "logits", output).shape == (1, 2, VOCABULARY)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_strategy_is_tried_without_transformers() -> None:
    """The engine "scripted" runs the model that needs no package; every other engine one of transformers."""
    assert policy_for(EngineConfig(type="scripted"), PolicyCase()).architecture == "small"
    assert policy_for(EngineConfig(type="hf"), PolicyCase()).architecture == "qwen3"


def test_logprobs_of_the_trainer_pass_and_others_are_shown_beside_them() -> None:
    """A logprob that is off by twice the bound fails, and the trainer's stands in the message."""
    model = build_policy(PolicyCase())
    logits = model(torch.tensor([[1, 2, 5]])).logits[0, 1:].double()
    right = torch.log_softmax(logits / 0.5, dim=-1)[[0], [5]]
    require_logprobs([_completion((5,), tuple(right.tolist()))], model, temperature=0.5)
    with pytest.raises(LawError, match=str(round(right.item(), 6))):
        require_logprobs([_completion((5,), tuple((right + 2e-4).tolist()))], model, temperature=0.5)
    with pytest.raises(LawError, match="within"):
        require_logprobs([_completion((5,), (float("nan"),))], model, temperature=0.5)


def test_greedy_is_the_largest_logit_and_a_banned_stop_token_does_not_count() -> None:
    """The second-largest logit is greedy exactly if the largest is a stop token before `min_new_tokens`."""
    model = build_policy(PolicyCase())
    best, second = model(torch.tensor([[1, 2]])).logits[0, -1].topk(2).indices.tolist()
    sampling = SamplingParams(temperature=0.0, max_new_tokens=1, stop_token_ids=(best,))
    require_greedy([_completion((best,))], model, sampling)
    with pytest.raises(LawError, match="largest logits"):
        require_greedy([_completion((second,))], model, sampling)
    banned = SamplingParams(temperature=0.0, max_new_tokens=1, min_new_tokens=1, stop_token_ids=(best,))
    require_greedy([_completion((second,))], model, banned)


def test_greedy_completions_may_part_at_a_tie_alone() -> None:
    """Tokens with equal logits are interchangeable; what follows a tie is not compared; all else is."""
    tied = build_policy(PolicyCase(architecture="small"))
    with torch.no_grad():
        tied.get_parameter("head.weight").zero_()  # all tokens have the logit 0
    require_same_greedy([_completion((1, 2))], [_completion((3, 4))], tied)
    with pytest.raises(LawError, match="must be"):
        require_same_greedy([_completion((1, 2))], [_completion((3, 4))], build_policy(PolicyCase()))
    with pytest.raises(LawError, match="must be"):
        require_same_greedy([_completion((1,))], [_completion((1, 2))], tied)


def test_a_draw_falls_on_the_other_side_of_a_border_once() -> None:
    """A completion that differs is forgiven if none differs with any of three other seeds."""
    wanted = [_completion((1,)), _completion((2,))]
    other = [_completion((9,)), wanted[1]]
    asked: list[int] = []

    def agreeing(seed: int) -> tuple[list[Completion], list[Completion]]:
        asked.append(seed)
        return wanted, wanted

    def differing_at_last(seed: int) -> tuple[list[Completion], list[Completion]]:
        return (other if seed == 10 else wanted), wanted

    require_same_draws(wanted, wanted, why="rule", again=agreeing, seed=7)
    assert not asked
    require_same_draws(other, wanted, why="rule", again=agreeing, seed=7)
    assert asked == [8, 9, 10]
    with pytest.raises(LawError, match=r"rule: with seed=7 .* seed=10 1 of 2"):
        require_same_draws(other, wanted, why="rule", again=differing_at_last, seed=7)


def test_refusals_are_known_by_type_and_by_what_they_name() -> None:
    """No error, an error of another type and one that names too little each fail in words."""
    seen = refusal(int, "x")
    assert seen is not None
    assert "ValueError" in seen.kinds
    assert refusal(int, "1") is None
    require_refusal(seen, ValueError, of="int", naming=("'x'",))
    with pytest.raises(LawError, match="int went through and must raise ValueError"):
        require_refusal(None, ValueError, of="int")
    with pytest.raises(LawError, match="must raise ConfigError"):
        require_refusal(seen, ConfigError, of="int")
    with pytest.raises(LawError, match="must name base 11"):
        require_refusal(seen, ValueError, of="int", naming=("base 11",))
    assert isinstance(seen, Refusal)


def test_shares_of_the_draw_leave_out_what_the_parameters_leave_out() -> None:
    """top_k, top_p and min_new_tokens each give the shares that are computed by hand here."""
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15] + [0.005] * (VOCABULARY - 3), dtype=torch.float64))
    plain = SamplingParams(temperature=1.0, max_new_tokens=1)
    cases = {
        plain: [0.5, 0.3, 0.15],
        SamplingParams(max_new_tokens=1, top_k=2): [0.625, 0.375, 0.0],
        SamplingParams(max_new_tokens=1, top_p=0.6): [0.625, 0.375, 0.0],
        SamplingParams(max_new_tokens=1, top_k=2, top_p=0.6): [1.0, 0.0, 0.0],  # of what top_k leaves
        SamplingParams(max_new_tokens=1, min_new_tokens=1, stop_token_ids=(0,)): [0.0, 0.6, 0.3],
    }
    for sampling, wanted in cases.items():
        shares = _wanted_shares(logits, sampling)
        assert shares is not None
        assert shares[:3].tolist() == pytest.approx(wanted)


def test_rounding_at_a_border_leaves_the_shares_open() -> None:
    """Where the least likely token that stays is as likely as the first that goes, nothing is demanded."""
    even = torch.zeros(VOCABULARY, dtype=torch.float64)
    assert _wanted_shares(even, SamplingParams(max_new_tokens=1, top_k=3)) is None
    thirds = torch.log(torch.tensor([0.4, 0.3, 0.2] + [0.01] * (VOCABULARY - 3), dtype=torch.float64))
    assert _wanted_shares(thirds, SamplingParams(max_new_tokens=1, top_p=0.7)) is None


def test_the_bound_on_a_count_holds_for_binomial_counts_and_is_not_idle() -> None:
    """Of 100,000 counts none is outside of the bound, and the bound is less than twelve standard deviations."""
    rng = torch.Generator().manual_seed(0)
    counts = torch.binomial(torch.full((100_000,), 1000.0), torch.tensor(0.2), generator=rng)
    assert (counts - 200).abs().max() < _deviation(1000, 0.2) < 12 * (1000 * 0.2 * 0.8) ** 0.5


def test_an_example_of_a_law_can_be_looked_at_again() -> None:
    """The JSON of a case runs that case alone."""
    example = '{"prompts": [[0], [1, 2]], "place": 1, "surplus": 0}'
    (law,) = [law for law in engine.LAWS if law.id == "engine.refusals"]
    law.check(_harness(example))
    with pytest.raises(ConfigError, match="example="):
        law.check(_harness('{"prompts": 3}'))
