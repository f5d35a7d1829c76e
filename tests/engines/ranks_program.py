"""What a rank of `test_ranks` does: generate, train and sync, beside the other rank."""

from __future__ import annotations

import attrs
import torch

from lightrft.strategy import Prompt, SamplingParams
from lightrft.testing.cases.policies import PolicyCase, build_policy
from lightrft.testing.subject import Rank

PROMPTS = ((1, 2, 3), (4,), (5, 6))
FIRST_OF_RANK = (0, 2, 3)
SAMPLING = SamplingParams(temperature=0.8, max_new_tokens=6, n=2, seed=3)
CASE = PolicyCase(tied=True, num_layers=2, seed=1)


@attrs.frozen(kw_only=True)
class Seen:
    """What one rank saw: tokens of its prompts before and after training, and what each sync found, in nats."""

    made: list[tuple[int, ...]]
    later: list[tuple[int, ...]]
    differences: list[float]


def run(rank: Rank, num_rounds: int) -> Seen:
    """Train on this rank's samples, and sync after each step of the optimizer."""
    strategy = rank.build(attrs.evolve(rank.config, micro_train_batch_size=1, train_batch_size=rank.world_size))
    strategy.setup_distributed()
    model = build_policy(CASE)
    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=1e-2), None))
    mine = [Prompt(token_ids=ids) for ids in PROMPTS[FIRST_OF_RANK[rank.rank] : FIRST_OF_RANK[rank.rank + 1]]]
    differences: list[float] = []
    with strategy.setup_inference_engine(rank.engine, actor=model) as engine:
        made = strategy.gather_and_generate(engine, mine, SAMPLING)
        for step in range(num_rounds):
            ids = torch.randint(0, 13, (1, 12), generator=torch.Generator().manual_seed(2 * step + rank.rank))
            strategy.backward(model(input_ids=ids, labels=ids).loss, model, optimizer)
            strategy.optimizer_step(optimizer, model, None)
            differences.append(strategy.update_engine_weights(engine, model).max_logprob_difference)
        later = strategy.gather_and_generate(engine, mine, SAMPLING)
    strategy.barrier()  # the trainer's group outlives the engine
    return Seen(
        made=[completion.token_ids for completion in made],
        later=[completion.token_ids for completion in later],
        differences=differences,
    )
