"""Tiny runs that the loop's tests share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from lightrft.config.root import Config
from lightrft.config.sections import (
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RunConfig,
)
from lightrft.loops.parts import Parts, build_parts
from lightrft.strategy.config import StrategyConfig

LINES = "".join(f'{{"prompt": "{a}+{b}=", "answer": "{a + b}"}}\n' for a in range(8) for b in range(8))


def tiny_config(folder: Path, **algorithm: object) -> Config:
    """Return a run of 3 warm-up steps and 4 of reinforcement on sums of digits."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sums.jsonl"
    if not path.exists():  # ranks share it
        path.write_text(LINES)
    settings: dict[str, object] = {"num_samples": 4, "prompts_per_step": 4, **algorithm}
    return Config(
        strategy=StrategyConfig(
            strategy="single",
            train_batch_size=8,
            micro_train_batch_size=4,
            actor_learning_rate=3e-3,
            seed=5,
        ),
        engine=EngineConfig(max_new_tokens=3),
        algorithm=AlgorithmConfig(**settings),  # type: ignore[arg-type]
        data=DataConfig(path=str(path), heldout_size=8),
        model=ModelConfig(hidden_size=16, num_layers=1, num_heads=2, max_length=16, alphabet="0123456789+=- "),
        checkpoint=CheckpointConfig(save_every=1, max_num=100),
        run=RunConfig(dir=str(folder / "run"), num_steps=4, warmup_steps=3, warmup_batch_size=8, evaluate_every=2),
    )


def parts_of(config: Config) -> Parts:
    """Return the parts with a reward that varies over completions even before anything is learnt."""

    def reward(prompt: str, completion: str, answer: str, /) -> float:
        del prompt
        return float(completion == answer) + 0.1 * len(set(completion) & set(answer)) + 0.01 * len(completion)

    return attrs.evolve(build_parts(config), reward=reward)


def in_dir(config: Config, folder: Path) -> Config:
    """Return the same run in another directory."""
    return attrs.evolve(config, run=attrs.evolve(config.run, dir=str(folder)))


def without(rows: Sequence[dict[str, object]], *keys: str) -> list[dict[str, object]]:
    """Return rows without some keys."""
    return [{key: value for key, value in row.items() if key not in keys} for row in rows]


def run_to_death(program: Callable[[], object]) -> None:
    """Run a program in a forked child, which must end by the SIGKILL that it sends to itself."""
    child = os.fork()
    if child == 0:
        gc.disable()  # what is collected here may wait for threads that only the parent has
        try:
            program()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
