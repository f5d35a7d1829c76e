"""`lightrft train`: a run from its configuration to its end, resumed if it has a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from lightrft.backends.launch import rank_of_launch, world_size_of_launch
from lightrft.cli.command import Command
from lightrft.cli.failures import EXIT_OK
from lightrft.cli.importing import importing
from lightrft.cli.run_dir import bind_config, open_run_dir
from lightrft.cli.terminal import command_line, say
from lightrft.cli.voice import one_voice, quieten_torch
from lightrft.config import Config, apply_overrides, load_config, to_toml
from lightrft.config.redaction import HIDDEN, redact
from lightrft.errors import CheckpointError, ConfigError, InterruptedRunError
from lightrft.loops.interrupt import ShouldStop, stop_on_signals

if TYPE_CHECKING:
    from lightrft.loops.parts import Parts
    from lightrft.loops.train import Summary
    from lightrft.strategy.protocols.collectives import World
    from lightrft.strategy.record import Strategy
    from lightrft.tracking.tracker import Tracker

__all__ = ["COMMAND"]

_SHORT_FORMS: Mapping[str, str] = {
    "--strategy": "strategy.strategy",
    "--engine": "engine.type",
    "--save-every": "checkpoint.save_every",
    "--save-minutes": "checkpoint.save_minutes",
}
"""Options that stand for a setting."""


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
    parser.add_argument("--save-every", metavar="N", type=int, help="the same as checkpoint.save_every=N")
    parser.add_argument("--save-minutes", metavar="M", type=float, help="the same as checkpoint.save_minutes=M")
    parser.add_argument(
        "--nproc", metavar="N", type=int, default=1, help="start N processes of this machine, one a rank"
    )
    parser.add_argument("--print-config", action="store_true", help="print every setting as TOML and end")
    parser.add_argument("--checked", action="store_true", help="hold every call of the strategy to the laws; slower")
    parser.add_argument("--quiet", action="store_true", help="print no progress")


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    # a strategy is torn down last: what this rank has to say must be said before others see that it is gone; a signal
    # is remembered from the start, so that it ends the run at a step boundary even if it comes while torch loads
    with ExitStack() as at_end, stop_on_signals() as by_signal, one_voice():
        options = _options(args, words)
        if options.path is None and not args.print_config:
            raise ConfigError("no configuration is given; name a TOML file: lightrft train run.toml.")
        config = load_config(options.path, options.overrides)
        if args.print_config:
            say(to_toml(config).removesuffix("\n"))
            return EXIT_OK
        if _starts_ranks(args.nproc):
            return _run_ranks(config, options, args, by_signal)
        quieten_torch(is_debug=args.debug)
        from lightrft.cli.processes import stop_with_parent

        # rank 0 holds the directory for all
        held = open_run_dir(config.run.dir) if rank_of_launch() == 0 else nullcontext(Path(config.run.dir))
        with held as directory, stop_with_parent() as by_parent:

            def should_stop() -> str | None:
                return by_signal() or by_parent()

            _train(config, options, directory, should_stop, at_end)
    return EXIT_OK


def _starts_ranks(num_ranks: int) -> bool:
    from lightrft.cli.processes import is_rank_of_parent

    if num_ranks < 1:
        raise ConfigError(f"--nproc={num_ranks} is no number of processes; use 1 or more.")
    if is_rank_of_parent():
        return False
    world_size = world_size_of_launch()
    if num_ranks > 1 and world_size > 1:
        raise ConfigError(
            f"--nproc={num_ranks} is at odds with a launcher that has started {world_size} processes; "
            "leave it out, or start without torchrun and srun."
        )
    return num_ranks > 1


def _run_ranks(config: Config, options: _Options, args: argparse.Namespace, should_stop: ShouldStop) -> int:
    with importing():
        from lightrft.cli.processes import run_ranks
        from lightrft.planning.run import check_ranks

    check_ranks(config, args.nproc)  # said before anything is started
    flags = [*(["--quiet"] if args.quiet else []), *(["--debug"] if args.debug else [])]
    return run_ranks(args.nproc, ["train", *options.words, *flags], should_stop)


def _short(args: argparse.Namespace) -> list[tuple[str, object]]:
    """Return the short forms that were given."""
    values = vars(args)
    given = [(option, values[option.removeprefix("--").replace("-", "_")]) for option in _SHORT_FORMS]
    return [(option, value) for option, value in given if value is not None]


def _options(args: argparse.Namespace, words: Sequence[str]) -> _Options:
    flags = [f"{_SHORT_FORMS[option]}={json.dumps(value, ensure_ascii=False)}" for option, value in _short(args)]
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
    keys = [word for option, value in _short(args) for word in (option, str(value))]
    nproc = [] if args.nproc == 1 else ["--nproc", str(args.nproc)]
    return [*keys, *nproc, *(["--checked"] if args.checked else [])]


def _train(config: Config, options: _Options, directory: Path, should_stop: ShouldStop, at_end: ExitStack) -> None:
    # heavy imports after all that can be refused without them
    with importing():
        from lightrft.cli.agreement import check_ranks_agree
        from lightrft.cli.preflight import check_problems, set_threads
        from lightrft.loops.parts import build_parts
        from lightrft.loops.run import checkpoint_dir
        from lightrft.loops.train import train
        from lightrft.planning.run import check_ranks
        from lightrft.strategy import background_saves, get_strategy
        from lightrft.testing.checked import checked
        from lightrft.tracking.tracker import no_tracker

        set_threads(config.run.threads)
        check_ranks(config, world_size_of_launch())  # said now, and not after the warm-up
        strategy = checked(get_strategy(config)) if options.is_checked else get_strategy(config)
    at_end.callback(strategy.teardown)
    world = strategy.setup_distributed()
    if world.world_size > 1:
        check_ranks_agree(strategy, config)
    is_rank_0 = world.rank == 0
    done = strategy.latest_ckpt(checkpoint_dir(config))
    if is_rank_0:
        bind_config(directory, config, is_resumed=done is not None)
    with importing():  # of the model's library
        parts = build_parts(config)
    check_problems(parts, config)
    tracker = _build_tracker(config, is_quiet=options.is_quiet) if is_rank_0 else no_tracker()
    at_end.callback(tracker.close)
    if is_rank_0:
        _announce(config, parts, world, done)
    in_background = background_saves(strategy) if config.checkpoint.save_in_background else nullcontext()
    with _reassuring(strategy, checkpoint_dir(config)), in_background as background:
        summary = train(strategy, config, parts, tracker=tracker, should_stop=should_stop, background=background)
        tracker.close()
        if is_rank_0:
            _conclude(summary, directory, options, world)


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

    from lightrft.cli.decisions import decisions
    from lightrft.strategy.build import chosen_key

    num_parameters = sum(parameter.numel() for parameter in parts.model.parameters())
    warmup, total = config.run.warmup_steps, config.run.warmup_steps + config.run.num_steps
    phases = f"{total} steps" + (f", {warmup} of them warm-up" if warmup else "")
    begins = f"new run of {phases}" if done is None else f"resumed from step {done} of {phases}"
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
    say(
        f"strategy  {chosen_key(config.strategy)} on {world.device} ({threads})",
        *(f"{name:<10}{decision}" for name, decision in decisions(config.strategy, world)),
        f"engine    {config.engine.type}",
        f"model     {config.model.path or config.model.architecture}, {num_parameters:,} parameters",
        f"memory    {_memory(config, parts, world)}",
        f"problems  {len(parts.train):,} to learn from, {len(parts.heldout):,} held out",
        f"run       {config.run.dir}: {begins}",
    )


def _memory(config: Config, parts: Parts, world: World) -> str:
    from lightrft.planning.line import summary_of
    from lightrft.planning.run import longest_prompt, memory_of_run

    device = world.device.partition(":")[0]
    lines = memory_of_run(
        config,
        parts.model,
        world_size=world.world_size,
        on_cpu=device == "cpu",
        prompt_tokens=longest_prompt(parts.train, parts.tokenizer),
    )
    return f"{summary_of(lines, device)} a rank; lightrft plan shows its parts"


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


def _conclude(summary: Summary, directory: Path, options: _Options, world: World) -> None:
    from lightrft.tracking.report import write_report

    before, after = summary.accuracy_before, summary.accuracy_after
    gain = 100 * (after - before)
    report = write_report(directory, directory / "report.html")
    say(
        f"accuracy  {before:.1%} before reinforcement, {after:.1%} after ({gain:+.1f} points, held-out problems)",
        f"report    {report}",
        f"model     {directory / 'model'}",
        f"resume    {_command_to_resume(options, world)}",
        f"evaluate  {command_line('evaluate', str(directory))}",
    )


def _command_to_resume(options: _Options, world: World) -> str:
    own = command_line("train", *map(_without_secret, options.words))
    # what a launcher was told, it alone knows
    return own if world.world_size == 1 or "--nproc" in options.words else f"{own} (on {world.world_size} ranks)"


COMMAND = Command(
    name="train",
    words="CONFIG [section.key=value ...]",
    summary="run a configuration, from its newest checkpoint if it has one",
    add_arguments=_add_arguments,
    run=_run,
)
"""`lightrft train`."""
