"""Actor and critic trained together by PPO with generalised advantage estimation, on one process or several.

The task is small enough to watch: the prompt is a digit, and the reward is the share of the completion's tokens that
are that digit. Actor and critic are small transformers with random weights, and leaving the first policy costs a
little. The curve is the same however many processes there are, and whatever shards them, until rounding moves the draw
of a token, some twenty steps later:

    python examples/ppo_critic.py
    torchrun --standalone --nproc-per-node 2 examples/ppo_critic.py --strategy fsdp2
    torchrun --standalone --nproc-per-node 2 examples/ppo_critic.py --strategy deepspeed --zero_stage 3

Shapes: B completions of a micro-batch, T positions, V vocabulary size.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import attrs
import torch
from torch import Tensor, nn

from lightrft.algorithms.advantages import gae
from lightrft.algorithms.kl import k1, k3
from lightrft.algorithms.losses import ppo_clip, value_loss
from lightrft.algorithms.masking import masked_mean, masked_sum
from lightrft.config import EngineConfig, ModelConfig
from lightrft.data.padding import TokenBatch, pad_completions
from lightrft.loops.checks import check_shares
from lightrft.loops.ranks import shares
from lightrft.loops.train_step import train_step
from lightrft.models.build import build_model_and_tokenizer
from lightrft.strategy import Prompt, SamplingParams, Strategy, Trainable, get_strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightrft.models.tokenizer import ModelTokenizer
    from lightrft.strategy.protocols import Completion, EngineHandle, World

DIGITS = "0123456789"
MODEL = ModelConfig(hidden_size=32, num_layers=1, num_heads=2, max_length=16, initializer_range=0.1, alphabet=DIGITS)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments: some are settings of a strategy, the others are this script's own.

    Args:
        argv: what was written; None takes the command line.
    """
    parser = argparse.ArgumentParser(description="Train an actor and a critic by PPO.")
    parser.add_argument("--strategy", default="single")
    parser.add_argument("--zero_stage", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--max_norm", type=float, default=1.0)
    parser.add_argument("--actor_learning_rate", type=float, default=1e-2)
    parser.add_argument("--critic_learning_rate", type=float, default=1e-2)
    parser.add_argument("--train_batch_size", type=int, default=64, help="completions of a step, on all ranks")
    parser.add_argument("--micro_train_batch_size", type=int, default=16)
    parser.add_argument("--num_steps", type=int, default=40)
    parser.add_argument("--num_epochs", type=int, default=2, help="optimizer steps on one rollout")
    parser.add_argument("--max_new_tokens", type=int, default=4)
    parser.add_argument("--kl_coef", type=float, default=0.001)
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--lam", type=float, default=0.95)
    parser.add_argument("--clip", type=float, default=0.2)
    return parser.parse_args(argv)


class Critic(nn.Module):
    """Says at each position what reward is still to come."""

    def __init__(self, policy: PreTrainedModel) -> None:
        """Take the layers of a policy, and a head that expects nothing before it has learnt."""
        super().__init__()
        self.backbone = policy.base_model
        self.head = nn.Linear(MODEL.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """Return the values (B, T).

        Args:
            input_ids_BT: (B, T) int64, padded on the right.
        """
        hidden_BTH = self.backbone(input_ids=input_ids_BT, attention_mask=None, use_cache=False).last_hidden_state
        values_BT1: Tensor = self.head(hidden_BTH)
        return values_BT1.sum(dim=-1)  # of one number, and no view of another tensor, which fully_shard warns of


@attrs.frozen(kw_only=True, eq=False)
class Models:
    """What takes part.

    Attributes:
        actor: the policy.
        critic: says what the policy may expect.
        reference: the policy before it learnt, frozen.
    """

    actor: Trainable
    critic: Trainable
    reference: nn.Module


@attrs.frozen(kw_only=True, eq=False)
class Experience:
    """A micro-batch of completions, and what was thought of them before anybody learnt from them.

    Attributes:
        tokens: the sequences.
        rewards_B: of the task.
        logprobs_BT: of the actor.
        kl_BT: divergence of the actor from the reference.
        values_BT: of the critic.
        advantages_BT: how much better a token was than expected.
        returns_BT: what the critic should have said.
    """

    tokens: TokenBatch
    rewards_B: Tensor
    logprobs_BT: Tensor
    kl_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor


def train(strategy: Strategy, args: argparse.Namespace) -> list[dict[str, float]]:
    """Return the curve: reward, value loss and divergence of every step.

    Args:
        strategy: any.
        args: what `parse_args` returns.
    """
    world = strategy.setup_distributed(timeout=None)
    check_shares(args.train_batch_size, args.micro_train_batch_size, world.world_size)
    with strategy.init_model_context():
        policy, tokenizer = build_model_and_tokenizer(MODEL, seed=args.seed)
        valued, _ = build_model_and_tokenizer(MODEL, seed=args.seed + 1)
    max_steps = args.num_steps * args.num_epochs
    actor, critic, _, reference = strategy.prepare_models_and_optimizers(
        policy, Critic(valued), None, copy.deepcopy(policy), args, max_steps
    )
    models = Models(actor=actor, critic=cast("Trainable", critic), reference=cast("nn.Module", reference))
    curve: list[dict[str, float]] = []
    with strategy.setup_inference_engine(EngineConfig(), actor=actor.model, tokenizer=tokenizer) as engine:
        for step in range(args.num_steps):
            completions = generate(strategy, engine, tokenizer, world, args, step)
            experiences = look_back(strategy, models, completions, world, args)
            for _ in range(args.num_epochs):
                learn(strategy, models, experiences, args)
            strategy.update_engine_weights(engine, actor.model)
            curve.append(summary(strategy, experiences))
            line = ", ".join(f"{name} {value:.6f}" for name, value in curve[-1].items())
            strategy.print(f"step {step + 1}: {line}")
    return curve


def generate(
    strategy: Strategy,
    engine: EngineHandle,
    tokenizer: ModelTokenizer,
    world: World,
    args: argparse.Namespace,
    step: int,
) -> list[Completion]:
    """Return the completions of this rank's share of the step's prompts.

    Args:
        strategy: any.
        engine: holds the actor's weights.
        tokenizer: of the actor.
        world: which share is this rank's.
        args: what `parse_args` returns.
        step: number of the step.
    """
    seed = args.seed * 1_000_003 + step
    digits = random.Random(seed).choices(DIGITS, k=args.train_batch_size)  # noqa: S311 (the same on all ranks)
    prompts = [Prompt(token_ids=tuple(tokenizer.encode(digit))) for digit in digits]
    mine = shares(len(prompts), world.world_size)[world.rank]
    sampling = SamplingParams(
        max_new_tokens=args.max_new_tokens, stop_token_ids=(cast("int", tokenizer.eos_token_id),), seed=seed
    )
    return strategy.gather_and_generate(engine, prompts[mine.start : mine.stop], sampling)


def look_back(
    strategy: Strategy, models: Models, completions: Sequence[Completion], world: World, args: argparse.Namespace
) -> list[Experience]:
    """Return the completions in micro-batches, with advantages of mean 0 and variance 1 over all ranks.

    Args:
        strategy: any.
        models: asked, and not changed.
        completions: of this rank.
        world: where the models are.
        args: what `parse_args` returns.
    """
    size = args.micro_train_batch_size
    starts = range(0, len(completions), size)
    experiences = [experience_of(models, completions[start : start + size], world.device, args) for start in starts]
    mean, std = mean_and_std(strategy, experiences)
    return [attrs.evolve(one, advantages_BT=(one.advantages_BT - mean) / (std + 1e-6)) for one in experiences]


@torch.no_grad()
def experience_of(
    models: Models, completions: Sequence[Completion], device: str, args: argparse.Namespace
) -> Experience:
    """Return what actor, critic and reference say of completions.

    The reward stands at the last token, and the divergence from the reference costs something at every token.

    Args:
        models: asked, and not changed.
        completions: of one micro-batch.
        device: where the models are.
        args: what `parse_args` returns.
    """
    tokens = pad_completions(completions).to(device)
    earned = [one.token_ids.count(one.prompt_ids[0]) / args.max_new_tokens for one in completions]
    rewards_B = torch.tensor(earned, device=device)
    logprobs_BT = logprobs_of(models.actor.model, tokens)
    reference_BT = logprobs_of(models.reference, tokens)
    values_BT: Tensor = models.critic.model(tokens.input_ids_BT)
    rewards_BT = (-args.kl_coef * k1(logprobs_BT, reference_BT)).masked_fill(~tokens.mask_BT, 0.0)
    rewards_BT[range(len(completions)), [length - 1 for length in tokens.lengths]] += rewards_B
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, tokens.mask_BT, gamma=args.gamma, lam=args.lam)
    return Experience(
        tokens=tokens,
        rewards_B=rewards_B,
        logprobs_BT=logprobs_BT,
        kl_BT=k3(logprobs_BT, reference_BT),
        values_BT=values_BT,
        advantages_BT=advantages_BT,
        returns_BT=returns_BT,
    )


def logprobs_of(model: nn.Module, tokens: TokenBatch) -> Tensor:
    """Return the log-probability of each target (B, T).

    Args:
        model: a language model; all of it is called, so that a sharded one is whole when it is needed.
        tokens: the sequences.
    """
    logits_BTV: Tensor = model(input_ids=tokens.input_ids_BT, attention_mask=None, use_cache=False).logits
    return logits_BTV.log_softmax(dim=-1).gather(-1, tokens.targets_BT[..., None]).squeeze(-1)


def mean_and_std(strategy: Strategy, experiences: Sequence[Experience]) -> tuple[float, float]:
    """Return mean and standard deviation of the advantages of all tokens of all ranks.

    Args:
        strategy: any.
        experiences: of this rank.
    """
    advantages_N = torch.cat([one.advantages_BT[one.tokens.mask_BT] for one in experiences]).double()
    sums = strategy.all_reduce(
        {"count": advantages_N.numel(), "first": advantages_N.sum(), "second": advantages_N.square().sum()}, "sum"
    )
    mean = float(sums["first"] / sums["count"])
    variance = float(sums["second"] / sums["count"]) - mean**2
    return mean, max(0.0, variance) ** 0.5  # rounding may leave less than nothing


def learn(strategy: Strategy, models: Models, experiences: Sequence[Experience], args: argparse.Namespace) -> None:
    """Take one step with the actor and one with the critic, each over all tokens of all ranks.

    Args:
        strategy: any.
        models: actor and critic are changed in place.
        experiences: of this rank.
        args: what `parse_args` returns.
    """

    def policy_loss(model: nn.Module, seen: Experience) -> Tensor:
        logprobs_BT = logprobs_of(model, seen.tokens)
        loss_BT = ppo_clip(logprobs_BT, seen.logprobs_BT, seen.advantages_BT, clip_low=args.clip, clip_high=args.clip)
        return masked_mean(loss_BT, seen.tokens.mask_BT)

    def critic_loss(model: nn.Module, seen: Experience) -> Tensor:
        values_BT: Tensor = model(seen.tokens.input_ids_BT)
        loss_BT = value_loss(values_BT, seen.values_BT, seen.returns_BT, clip=args.clip)
        return masked_mean(loss_BT, seen.tokens.mask_BT)

    train_step(strategy, models.actor, experiences, policy_loss, weight_fn=num_tokens)
    train_step(strategy, models.critic, experiences, critic_loss, weight_fn=num_tokens)


def num_tokens(experience: Experience) -> float:
    """Return the number of tokens of completions.

    Args:
        experience: a micro-batch.
    """
    return float(experience.tokens.mask_BT.sum())


def summary(strategy: Strategy, experiences: Sequence[Experience]) -> dict[str, float]:
    """Return reward, value loss and divergence of the rollout of all ranks, as they were before the step.

    Args:
        strategy: any.
        experiences: of this rank.
    """
    sums = {"completions": 0.0, "tokens": 0.0, "reward": 0.0, "value_loss": 0.0, "kl": 0.0}
    for one in experiences:
        errors_BT = value_loss(one.values_BT, one.values_BT, one.returns_BT)
        sums["completions"] += len(one.rewards_B)
        sums["tokens"] += num_tokens(one)
        sums["reward"] += one.rewards_B.sum().item()
        sums["value_loss"] += masked_sum(errors_BT, one.tokens.mask_BT).item()
        sums["kl"] += masked_sum(one.kl_BT, one.tokens.mask_BT).item()
    total = strategy.all_reduce(sums, "sum")
    return {
        "reward": total["reward"] / total["completions"],
        "value_loss": total["value_loss"] / total["tokens"],
        "kl": total["kl"] / total["tokens"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and leave the other processes in good order whatever happens.

    Args:
        argv: what was written; None takes the command line.
    """
    args = parse_args(argv)
    strategy = get_strategy(args)
    try:
        train(strategy, args)
    finally:
        strategy.teardown()


if __name__ == "__main__":
    main()
