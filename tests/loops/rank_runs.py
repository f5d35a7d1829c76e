"""A tiny run as a program for ranks, in this process or in processes of their own."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import attrs
import torch
from runs import parts_of, tiny_config

from lightrft.config.root import Config
from lightrft.errors import InterruptedRunError
from lightrft.loops.parts import Parts
from lightrft.loops.train import train
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.strategy.record import Strategy
from lightrft.testing.subject import Rank
from lightrft.tracking.files import build_file_tracker
from lightrft.tracking.tracker import Channel, Tracker, no_tracker


@attrs.frozen(kw_only=True)
class RunCase:
    """A run: its directory, what it changes of the tiny one, and where it is asked to stop."""

    directory: str
    algorithm: str = "{}"
    strategy: str = "{}"
    engine: str = "{}"
    is_partial: bool = False
    is_noisy: bool = False
    stop_at: int = 0
    stop_rank: int = 0


@attrs.frozen(kw_only=True)
class RunSeen:
    """How it ended on one rank."""

    stopped: str
    step: int
    accuracy: float
    num_rows: int


def config_of(case: RunCase) -> Config:
    """Return the configuration of a case; its problems lie beside its directory."""
    config = tiny_config(Path(case.directory).parent, **json.loads(case.algorithm))
    strategy = attrs.evolve(config.strategy, **json.loads(case.strategy))
    return attrs.evolve(
        config,
        strategy=strategy,
        engine=attrs.evolve(config.engine, **json.loads(case.engine)),
        run=attrs.evolve(config.run, dir=case.directory),
        checkpoint=attrs.evolve(config.checkpoint, save_every=0),
    )


def parts_like(case: RunCase, config: Config) -> Parts:
    """Return the parts, whose reward looks at some of the problems alone, and draws, if the case says so."""
    parts = parts_of(config)

    def partial(prompt: str, completion: str, answer: str, /) -> float:
        noise = 0.1 * (random.random() + torch.rand(()).item()) if case.is_noisy else 0.0  # noqa: S311 (no secret)
        return parts.reward(prompt, completion, answer) + noise if int(prompt[0]) < 2 else 0.5

    return attrs.evolve(parts, reward=partial) if case.is_partial else parts


def run_with(strategy: Strategy, case: RunCase, *, rank: int) -> RunSeen:
    """Run a case to its end or its stop, with rows in files; every rank brings a tracker."""
    config = config_of(case)
    rows = 0
    files = build_file_tracker(config.run.dir) if rank == 0 else no_tracker()

    def log(channel: Channel, row: Mapping[str, Json]) -> None:
        nonlocal rows
        rows += 1
        files.log(channel, row)

    asked = 0

    def should_stop() -> str | None:
        nonlocal asked
        asked += 1
        return "SIGTERM" if asked == case.stop_at and rank == case.stop_rank else None

    tracker: Tracker = attrs.evolve(files, log=log)
    try:
        summary = train(strategy, config, parts_like(case, config), tracker=tracker, should_stop=should_stop)
    except InterruptedRunError as error:
        return RunSeen(stopped=str(error), step=0, accuracy=0.0, num_rows=rows)
    finally:
        tracker.close()
    return RunSeen(stopped="", step=summary.step, accuracy=summary.accuracy_after, num_rows=rows)


def run_on_rank(rank: Rank, case: RunCase) -> RunSeen:
    """Run a case on one of several ranks."""
    return run_with(rank.build(config_of(case).strategy), case, rank=rank.rank)
