"""`lightrft evaluate`: how good the newest weights of a run are; nothing is written."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from lightrft.backends.launch import world_size_of_launch
from lightrft.cli.command import Command
from lightrft.cli.failures import EXIT_OK
from lightrft.cli.importing import importing
from lightrft.cli.run_dir import find_config
from lightrft.cli.terminal import say
from lightrft.cli.voice import one_voice, quieten_torch
from lightrft.config import Config, load_config
from lightrft.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from lightrft.loops.evaluate import Evaluation
    from lightrft.loops.parts import Parts
    from lightrft.strategy.protocols.training import Trainable
    from lightrft.strategy.record import Strategy

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=5, metavar="N", help="completions to show (default 5)")


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    # what this rank has to say must be said before others see that it is gone
    with ExitStack() as at_end, one_voice():
        paths = [word for word in words if "=" not in word]
        if len(paths) != 1:
            raise ConfigError(f"{len(paths)} directories are given; name one: lightrft evaluate RUN_DIR.")
        loaded = load_config(find_config(paths[0]), [word for word in words if "=" in word])
        config = attrs.evolve(loaded, run=attrs.evolve(loaded.run, dir=paths[0]))  # a run may have been moved
        quieten_torch(is_debug=args.debug)
        _evaluate(_without_copies(config), at_end, num_shown=max(0, args.samples))
    return EXIT_OK


def _without_copies(config: Config) -> Config:
    """Return a configuration that one process can have, if there is one: the run may have had many."""
    if world_size_of_launch() > 1:
        return config
    return attrs.evolve(config, strategy=attrs.evolve(config.strategy, fsdp_replicate=1, zero_hpz=1))


def _evaluate(config: Config, at_end: ExitStack, *, num_shown: int) -> None:
    with importing():
        from lightrft.cli.preflight import check_problems, set_threads
        from lightrft.loops.evaluate import evaluate
        from lightrft.loops.parts import build_parts
        from lightrft.strategy import get_strategy

        set_threads(config.run.threads)
        strategy = get_strategy(config)
        parts = build_parts(config)
    check_problems(parts, config)
    at_end.callback(strategy.teardown)
    world = strategy.setup_distributed()
    model, source = _restore(strategy, config, parts)
    with strategy.setup_inference_engine(config.engine, actor=model, tokenizer=parts.tokenizer) as engine:
        result = evaluate(
            strategy, engine, parts.heldout, tokenizer=parts.tokenizer, reward=parts.reward, config=config.engine
        )
    if world.rank == 0:
        _show(result, source, num_shown=num_shown)


def _restore(strategy: Strategy, config: Config, parts: Parts) -> tuple[nn.Module, str]:
    """Return the model with the newest weights, and where they are from."""
    from lightrft.loops.run import checkpoint_dir

    directory = checkpoint_dir(config)
    done = strategy.latest_ckpt(directory)
    exported = Path(config.run.dir) / "model"
    if done is None and not exported.is_dir():
        raise ConfigError(f"run_dir={config.run.dir!r} holds neither a checkpoint nor a model; train it first.")
    if done is None:
        model = strategy.prepare_reward_model(parts.model)
        strategy.load_model(model, exported)
        return model, str(exported)
    has_reference = bool(config.algorithm.kl_coef) and done >= config.run.warmup_steps
    plain = copy.deepcopy(parts.model) if has_reference else None  # now, because a prepared one may be sharded
    actor, _, _, reference = strategy.prepare_models_and_optimizers(parts.model, None, None, plain, config.strategy, 1)
    saved: dict[str, nn.Module | Trainable] = {"actor": actor}
    if reference is not None:
        saved["reference"] = reference
    loaded = strategy.load_ckpt(saved, directory)
    return actor.model, f"step {loaded.step} ({loaded.path})"


def _show(result: Evaluation, source: str, *, num_shown: int) -> None:
    scored = result.scored
    say(
        f"weights   {source}",
        f"accuracy  {result.accuracy:.1%} of {len(scored.problems):,} held-out problems",
        f"reward    {result.reward:.4f} on average",
    )
    shown = zip(scored.problems, scored.texts, scored.rewards_B.tolist(), strict=True)
    for (problem, text, reward), _ in zip(shown, range(num_shown), strict=False):
        say("", f"prompt      {problem.question!r}", f"completion  {text!r}")
        say(f"expected    {problem.answer!r}", f"reward      {reward:g}")


COMMAND = Command(
    name="evaluate",
    words="RUN_DIR [section.key=value ...]",
    summary="measure the newest weights of a run on held-out problems",
    add_arguments=_add_arguments,
    run=_run,
)
"""`lightrft evaluate`."""
