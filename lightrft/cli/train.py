"""`lightrft train`: a run from its configuration to its end, resumed if it has a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from lightrft.cli.command import Command
from lightrft.cli.failures import EXIT_OK
from lightrft.cli.run_dir import bind_config, open_run_dir
from lightrft.cli.terminal import command_line, say
from lightrft.config import Config, apply_overrides, load_config, to_toml
from lightrft.config.redaction import HIDDEN, redact
from lightrft.errors import CheckpointError, ConfigError, InterruptedRunError

if TYPE_CHECKING:
    from lightrft.loops.interrupt import ShouldStop
    from lightrft.loops.parts import Parts
    from lightrft.loops.train import Summary
    from lightrft.strategy.protocols.collectives import World
    from lightrft.strategy.record import Strategy
    from lightrft.tracking.tracker import Tracker

__all__ = ["COMMAND"]


@attrs.frozen(kw_only=True)
class _Options:
    """What the command line says.

    Attributes:
        path: the configuration file.
        overrides: settings that replace its own.
        is_quiet: whether progress is left out.
        is_checked: whether every call is held to the laws.
        words: what the command was given, but for options that only change what it prints.
    """

    path: str | None
    overrides: tuple[str, ...]
    is_quiet: bool
    is_checked: bool
    words: tuple[str, ...]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strategy", metavar="KEY", help="the same as strategy.strategy=KEY")
    parser.add_argument("--engine", metavar="KEY", help="the same as engine.type=KEY")
    parser.add_argument("--print-config", action="store_true", help="print every setting as TOML and end")
    parser.add_argument("--checked", action="store_true", help="hold every call of the strategy to the laws; slower")
    parser.add_argument("--quiet", action="store_true", help="print no progress")


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    options = _options(args, words)
    if options.path is None and not args.print_config:
        raise ConfigError("no configuration is given; name a TOML file: lightrft train run.toml.")
    config = load_config(options.path, options.overrides)
    if args.print_config:
        say(to_toml(config).removesuffix("\n"))
        return EXIT_OK
    from lightrft.loops.interrupt import stop_on_signals

    # from here on a signal is remembered, so that it ends the run at a step boundary even if it comes while torch loads
    with open_run_dir(config.run.dir) as directory, stop_on_signals() as should_stop:
        _train(config, options, directory, should_stop)
    return EXIT_OK


def _options(args: argparse.Namespace, words: Sequence[str]) -> _Options:
    given = {"strategy.strategy": args.strategy, "engine.type": args.engine}
    flags = [f"{name}={json.dumps(key, ensure_ascii=False)}" for name, key in given.items() if key is not None]
    paths = [word for word in words if "=" not in word]
    if len(paths) > 1:
        raise ConfigError(f"config={paths[1]!r} is a second configuration file; name one, and settings as key=value.")
    return _Options(
        path=paths[0] if paths else None,
        overrides=(*(word for word in words if "=" in word), *flags),
        is_quiet=args.quiet,
        is_checked=args.checked,
        words=(*words, *_again(args)),
    )


def _without_secret(word: str) -> str:
    name, equals, _ = word.partition("=")
    if not equals:
        return word
    setting = apply_overrides({}, [word])
    return word if redact(setting) == setting else f"{name}={HIDDEN}"


def _again(args: argparse.Namespace) -> list[str]:
    given = {"--strategy": args.strategy, "--engine": args.engine}
    keys = [word for option, key in given.items() if key is not None for word in (option, key)]
    return [*keys, *(["--checked"] if args.checked else [])]


def _train(config: Config, options: _Options, directory: Path, should_stop: ShouldStop) -> None:
    # heavy imports after all that can be refused without them
    from lightrft.cli.preflight import check_problems, set_threads
    from lightrft.loops.parts import build_parts
    from lightrft.loops.run import checkpoint_dir
    from lightrft.loops.train import train
    from lightrft.strategy import get_strategy
    from lightrft.strategy.registry import find_engine
    from lightrft.testing.checked import checked

    set_threads(config.run.threads)
    strategy = checked(get_strategy(config)) if options.is_checked else get_strategy(config)
    find_engine(config.engine.type)  # said now, and not after the warm-up
    done = strategy.latest_ckpt(checkpoint_dir(config))
    bind_config(directory, config, is_resumed=done is not None)
    parts = build_parts(config)
    check_problems(parts, config)
    tracker = _build_tracker(config, is_quiet=options.is_quiet)
    try:
        _announce(config, parts, strategy.setup_distributed(), done)
        with _reassuring(strategy, checkpoint_dir(config)):
            summary = train(strategy, config, parts, tracker=tracker, should_stop=should_stop)
            tracker.close()
            _conclude(summary, directory, options)
    finally:
        tracker.close()
        strategy.teardown()


def _build_tracker(config: Config, *, is_quiet: bool) -> Tracker:
    from lightrft.cli.progress import build_dispensable
    from lightrft.tracking.files import build_file_tracker
    from lightrft.tracking.progress import build_progress_tracker
    from lightrft.tracking.tracker import combine

    files = build_file_tracker(config.run.dir)
    if is_quiet:
        return files
    progress = build_progress_tracker(
        warmup_steps=config.run.warmup_steps, num_steps=config.run.num_steps, file=sys.stdout
    )
    return combine(files, build_dispensable(progress))


def _announce(config: Config, parts: Parts, world: World, done: int | None) -> None:
    import torch

    from lightrft.strategy.build import chosen_key

    num_parameters = sum(parameter.numel() for parameter in parts.model.parameters())
    warmup, total = config.run.warmup_steps, config.run.warmup_steps + config.run.num_steps
    phases = f"{total} steps" + (f", {warmup} of them warm-up" if warmup else "")
    begins = f"new run of {phases}" if done is None else f"resumed from step {done} of {phases}"
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
    say(
        f"strategy  {chosen_key(config.strategy)} on {world.device} ({threads})",
        f"engine    {config.engine.type}",
        f"model     {config.model.path or config.model.architecture}, {num_parameters:,} parameters",
        f"problems  {len(parts.train):,} to learn from, {len(parts.heldout):,} held out",
        f"run       {config.run.dir}: {begins}",
    )


@contextmanager
def _reassuring(strategy: Strategy, directory: Path) -> Generator[None]:
    """Add to an error of the run what is left of it."""
    try:
        yield
    except InterruptedRunError:
        raise
    except BaseException as error:
        _add_what_is_left(error, strategy, directory)
        raise


def _add_what_is_left(error: BaseException, strategy: Strategy, directory: Path) -> None:
    from lightrft.backends.checkpointing.layout import checkpoint_path

    done = strategy.latest_ckpt(directory)
    if done is None:
        return
    newest = checkpoint_path(directory, done)
    if isinstance(error, CheckpointError) and str(newest) in str(error):
        error.add_note(f"To go on from the one before it, remove {newest}.")
    else:
        error.add_note(f"The last checkpoint, of step {done} in {directory}, is intact.")


def _conclude(summary: Summary, directory: Path, options: _Options) -> None:
    from lightrft.tracking.report import write_report

    before, after = summary.accuracy_before, summary.accuracy_after
    gain = 100 * (after - before)
    report = write_report(directory, directory / "report.html")
    say(
        f"accuracy  {before:.1%} before reinforcement, {after:.1%} after ({gain:+.1f} points, held-out problems)",
        f"report    {report}",
        f"model     {directory / 'model'}",
        f"resume    {command_line('train', *map(_without_secret, options.words))}",
        f"evaluate  {command_line('evaluate', str(directory))}",
    )


COMMAND = Command(
    name="train",
    words="CONFIG [section.key=value ...]",
    summary="run a configuration, from its newest checkpoint if it has one",
    add_arguments=_add_arguments,
    run=_run,
)
"""`lightrft train`."""
