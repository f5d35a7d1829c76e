"""Learning from a rollout, compared with the same mathematics written out in plain torch with full logits.

Shapes: B completions, T positions, V vocabulary.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightrft.config.sections import AlgorithmConfig, ModelConfig
from lightrft.errors import ConfigError
from lightrft.loops.learn import Learned, learn
from lightrft.models.build import build_model
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy import get_strategy
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.rollout import Completion

NUM, LIMIT, TEMPERATURE = 6, 5, 0.7


def model_of(seed: int) -> nn.Module:
    config = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, max_length=32, alphabet="abcdef")
    return build_model(config, build_character_tokenizer("abcdef"), seed=seed)


def rollout() -> tuple[list[Completion], Tensor]:
    """Ragged completions with engine logprobs that are a little off, and advantages of both signs."""
    generator = torch.Generator().manual_seed(0)
    completions = []
    for index in range(NUM):
        prompt, length = torch.randint(2, 8, (2 + index % 3,), generator=generator), 1 + index % LIMIT
        tokens = torch.randint(2, 8, (length,), generator=generator)
        logprobs = -1.5 - torch.rand(length, generator=generator)
        completions.append(
            Completion(
                prompt_ids=tuple(prompt.tolist()),
                token_ids=tuple(tokens.tolist()),
                logprobs=tuple(logprobs.tolist()),
                finish_reason="stop",
                weight_version=0,
                sample_index=index,
            )
        )
    return completions, torch.randn(NUM, generator=generator)


def run(algorithm: AlgorithmConfig, *, micro: int, batch: int = NUM) -> tuple[nn.Module, Learned]:
    config = StrategyConfig(strategy="single", max_norm=0.0, actor_learning_rate=0.05, lr_scheduler="constant")
    strategy = get_strategy(config)
    actor, _, _, reference = strategy.prepare_models_and_optimizers(model_of(1), None, None, model_of(2))
    completions, advantages_B = rollout()
    learned = learn(
        strategy,
        actor,
        completions,
        advantages_B,
        algorithm=algorithm,
        temperature=TEMPERATURE,
        max_new_tokens=LIMIT,
        train_batch_size=batch,
        micro_train_batch_size=micro,
        reference=reference if algorithm.kl_coef else None,
    )
    return actor.model, learned


def logprobs_of(model: nn.Module, completion: Completion) -> tuple[Tensor, Tensor]:
    """Logprobs of a completion's tokens and entropies, from the full logits of one sequence."""
    ids = torch.tensor([completion.prompt_ids + completion.token_ids])
    logits = model(input_ids=ids[:, :-1]).logits[0, -len(completion.token_ids) :] / TEMPERATURE
    table = torch.log_softmax(logits, dim=-1)
    return table[torch.arange(len(table)), torch.tensor(completion.token_ids)], -(table.exp() * table).sum(-1)


def written_out(algorithm: AlgorithmConfig) -> dict[str, Tensor]:
    """The gradient of the whole loss at the first step, where the ratio to the policy itself is 1."""
    model, reference = model_of(1), model_of(2)
    completions, advantages_B = rollout()
    total_tokens = sum(len(completion.token_ids) for completion in completions)
    loss = torch.zeros(())
    for completion, advantage in zip(completions, advantages_B, strict=True):
        logprobs, entropy = logprobs_of(model, completion)
        ratio = (logprobs - logprobs.detach()).exp()
        if algorithm.loss == "gspo":
            ratio = (logprobs - logprobs.detach()).mean().exp().expand_as(logprobs)
        token = -advantage * (logprobs if algorithm.loss == "cispo" else ratio)
        if algorithm.importance_correction == "truncate":
            weight = (logprobs.detach() - torch.tensor(completion.logprobs)).exp()
            token = token * weight.clamp(max=algorithm.importance_cap)
        if algorithm.kl_coef:
            with torch.no_grad():
                other, _ = logprobs_of(reference, completion)
            distance = other - logprobs
            token = token + algorithm.kl_coef * (distance.exp() - 1 - distance)
        token = token - algorithm.entropy_coef * entropy
        if algorithm.aggregation == "token":
            loss = loss + token.sum() / total_tokens
        elif algorithm.aggregation == "sequence":
            loss = loss + token.mean() / NUM
        else:
            loss = loss + token.sum() / (NUM * LIMIT)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


ALGORITHMS = {
    "ppo_clip, token": AlgorithmConfig(),
    "ppo_clip, sequence, kl, entropy": AlgorithmConfig(aggregation="sequence", kl_coef=0.3, entropy_coef=0.1),
    "cispo, constant, correction": AlgorithmConfig(
        loss="cispo", aggregation="constant", importance_correction="truncate", importance_cap=1.5
    ),
    "gspo, sequence, kl, entropy": AlgorithmConfig(loss="gspo", aggregation="sequence", kl_coef=0.3, entropy_coef=0.1),
    "dual clip, token, correction": AlgorithmConfig(dual_clip=3.0, importance_correction="truncate"),
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("micro", [1, 3, NUM])
def test_the_first_step_is_adamw_on_the_gradient_written_out(name: str, micro: int) -> None:
    """Whatever the loss and the micro-batches, the step equals torch's AdamW on the gradient from full logits."""
    algorithm = ALGORITHMS[name]
    model, learned = run(algorithm, micro=micro)
    expected = model_of(1)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.05, betas=(0.9, 0.95), weight_decay=0.0)
    gradients = written_out(algorithm)
    for parameter_name, parameter in expected.named_parameters():
        parameter.grad = gradients[parameter_name]
    optimizer.step()
    # AdamW's first step is the sign of the gradient where it is large against eps=1e-8; float32 sums in another order
    # move gradients by about 1e-8, so the parameters are held to 2 % of one step of 0.05 and the norm to 1e-4.
    for (parameter_name, parameter), (_, wanted) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, wanted, rtol=0, atol=1e-3, msg=parameter_name)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    (step,) = learned.steps
    assert step.stepped
    assert step.grad_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("loss", ["ppo_clip", "cispo", "gspo"])
def test_later_steps_do_not_depend_on_the_micro_batches(loss: str) -> None:
    """Two epochs of three steps, off-policy from the second on: any micro-batch size gives the same model."""
    algorithm = AlgorithmConfig(loss=loss, num_epochs=2, clip_low=0.02, clip_high=0.02, aggregation="sequence")
    first, seen = run(algorithm, micro=2, batch=2)
    second, also_seen = run(algorithm, micro=1, batch=2)
    assert len(seen.steps) == len(also_seen.steps) == 6
    assert seen.clipped > 0
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=2e-3)
    for name in ("loss", "kl", "entropy", "clipped", "logprob_difference"):
        assert getattr(seen, name) == pytest.approx(getattr(also_seen, name), rel=1e-2, abs=1e-4)


def test_a_second_epoch_of_a_small_part_of_a_batch_is_off_policy() -> None:
    """Two completions of a batch of six: the second epoch's ratio is to the policy of the first, and is clipped."""
    strategy = get_strategy(StrategyConfig(strategy="single", actor_learning_rate=0.05, lr_scheduler="constant"))
    actor, *_ = strategy.prepare_models_and_optimizers(model_of(1), None, None, None)
    completions, advantages_B = rollout()
    learned = learn(
        strategy,
        actor,
        completions[:2],
        advantages_B[:2],
        algorithm=AlgorithmConfig(num_epochs=2, clip_low=1e-3, clip_high=1e-3),
        temperature=TEMPERATURE,
        max_new_tokens=LIMIT,
        train_batch_size=NUM,
        micro_train_batch_size=1,
    )
    assert len(learned.steps) == 2
    assert learned.clipped > 0


def test_a_batch_that_is_not_whole_micro_batches_is_refused() -> None:
    """Micro-batches that do not fill the batch would make its steps larger than asked for."""
    with pytest.raises(ConfigError, match=r"train_batch_size=6 is not divisible by micro_train_batch_size\(4\); use 4"):
        run(AlgorithmConfig(), micro=4, batch=6)


def test_what_is_reported_is_what_the_model_says() -> None:
    """Entropy is minus the mean logprob, kl the mean k3, the difference the largest one to the engine's logprobs."""
    algorithm = AlgorithmConfig(kl_coef=0.5)
    _, learned = run(algorithm, micro=3)
    completions, _ = rollout()
    with torch.no_grad():
        logprobs = torch.cat([logprobs_of(model_of(1), completion)[0] for completion in completions])
        reference = torch.cat([logprobs_of(model_of(2), completion)[0] for completion in completions])
    engine = torch.tensor([value for completion in completions for value in completion.logprobs])
    distance = reference - logprobs
    assert learned.entropy == pytest.approx(-logprobs.mean().item(), rel=1e-5)
    assert learned.kl == pytest.approx((distance.exp() - 1 - distance).mean().item(), rel=1e-4)
    assert learned.logprob_difference == pytest.approx((logprobs - engine).abs().max().item(), rel=1e-5)
    assert learned.clipped == 0.0


def test_advantages_of_zero_move_nothing_but_noise() -> None:
    """Without advantage, divergence and entropy the gradient is zero and AdamW leaves every parameter where it was."""
    strategy = get_strategy(StrategyConfig(strategy="single", actor_learning_rate=0.05))
    model = model_of(1)
    before = copy.deepcopy(model.state_dict())
    actor, *_ = strategy.prepare_models_and_optimizers(model, None, None, None)
    completions, advantages_B = rollout()
    learned = learn(
        strategy,
        actor,
        completions,
        torch.zeros_like(advantages_B),
        algorithm=AlgorithmConfig(),
        temperature=TEMPERATURE,
        max_new_tokens=LIMIT,
        train_batch_size=NUM,
        micro_train_batch_size=2,
    )
    assert learned.steps[0].grad_norm == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in actor.model.state_dict().items())
