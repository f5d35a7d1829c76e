"""What a rank of `test_ranks` does: generate, train and sync, beside the other rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from guests import settings

from lightrft.strategy import Prompt, SamplingParams, StrategyConfig, Trainable, get_strategy
from lightrft.testing.cases.policies import PolicyCase, build_policy

PROMPTS = ((1, 2, 3), (4,), (5, 6))
FIRST_OF_RANK = (0, 2, 3)
SAMPLING = SamplingParams(temperature=0.8, max_new_tokens=6, n=2, seed=3)
CASE = PolicyCase(tied=True, num_layers=2, seed=1)


def run(directory: Path, kind: str) -> None:
    """Write what this rank saw into a directory."""
    strategy = get_strategy(StrategyConfig(strategy="fsdp2", micro_train_batch_size=1, train_batch_size=2))
    strategy.setup_distributed()
    rank = strategy.get_rank()
    model = build_policy(CASE)
    optimizer = strategy.create_optimizer(model, lr=1e-2)
    trainable = strategy.prepare((model, optimizer, None))
    assert isinstance(trainable, Trainable)
    model, optimizer, _ = trainable
    mine = [Prompt(token_ids=ids) for ids in PROMPTS[FIRST_OF_RANK[rank] : FIRST_OF_RANK[rank + 1]]]
    differences: list[float] = []
    with strategy.setup_inference_engine(settings(kind), actor=model) as engine:
        made = strategy.gather_and_generate(engine, mine, SAMPLING)
        for step in range(5):
            ids = torch.randint(0, 13, (1, 12), generator=torch.Generator().manual_seed(2 * step + rank))
            strategy.backward(model(input_ids=ids, labels=ids).loss, model, optimizer)
            strategy.optimizer_step(optimizer, model, None)
            differences.append(strategy.update_engine_weights(engine, model).max_logprob_difference)
        later = strategy.gather_and_generate(engine, mine, SAMPLING)
    strategy.barrier()  # the trainer's group outlives the engine
    seen = {
        "made": [completion.token_ids for completion in made],
        "later": [completion.token_ids for completion in later],
        "differences": differences,
    }
    (directory / f"rank{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    strategy.teardown()


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
