"""`lightrft conformance`: whether a strategy or an engine obeys its laws."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightrft.cli.command import Command
from lightrft.cli.failures import EXIT_FAILED, EXIT_OK
from lightrft.cli.terminal import say, table
from lightrft.config import EngineConfig, load_config
from lightrft.errors import ConfigError, nearest

if TYPE_CHECKING:
    from lightrft.testing.conformance.hold import OnFinding
    from lightrft.testing.conformance.report import Finding, Report
    from lightrft.testing.law import Law
    from lightrft.testing.subject import Subject, SubjectKind

__all__ = ["COMMAND"]

_KINDS = ("strategy", "engine")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=_KINDS, help="what TARGET builds, where its annotations do not say it")
    parser.add_argument("--engine", metavar="KEY", help="the engine that a strategy is tested with (default scripted)")
    parser.add_argument("--laws", nargs="+", action="extend", metavar="PATTERN", help='such as "step.*" (default: all)')
    parser.add_argument("--world-size", nargs="+", type=int, default=[1], metavar="N", help="numbers of ranks (1)")
    parser.add_argument("--ranks", choices=("processes", "simulated"), help="where ranks run; one runs here by default")
    parser.add_argument("--max-examples", type=int, default=30, metavar="N", help="examples of each law (default 30)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the examples (default 0)")
    parser.add_argument("--example", metavar="JSON", help="look at this one case, which a broken law gave")
    parser.add_argument("--report", metavar="FILE", help="write an HTML page, too")
    parser.add_argument("--list", action="store_true", help="list the laws of strategies and of engines, and exit")
    parser.epilog = (
        "Modules of the current directory can be imported. "
        "Exit codes: 0 no law is broken, 1 a law is broken, 2 wrong input or nothing to hold, 130 interrupted."
    )


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    # heavy imports after all that can be refused without them
    from lightrft.testing.conformance.settings import check_settings, require_hypothesis

    targets = [word for word in words if "=" not in word]
    if args.list:
        require_hypothesis()
        say(*_list_of_laws())
        return EXIT_OK
    if len(targets) != 1:
        given = f"{len(targets)} targets are" if targets else "no target is"
        raise ConfigError(f"{given} given; name one: lightrft conformance TARGET.")
    check_settings(world_sizes=args.world_size, max_examples=args.max_examples, seed=args.seed, option="--")
    args.world_size = list(dict.fromkeys(args.world_size))
    output = None if args.report is None else _writable(args.report)
    require_hypothesis()
    here = str(Path.cwd())
    if here not in sys.path:  # as for `python -m`: what lies where the user stands can be imported
        sys.path.insert(0, here)
    from hypothesis.configuration import set_hypothesis_home_dir

    from lightrft.cli.preflight import set_threads
    from lightrft.testing.conformance.hold import require_something_held
    from lightrft.testing.conformance.target import kind_of_target
    from lightrft.testing.laws.registry import choose_laws

    kind: SubjectKind = args.kind or kind_of_target(targets[0])
    patterns: Sequence[str] = args.laws or ()
    laws = choose_laws(kind, [pattern for pattern in patterns if "=" not in pattern])
    # settings that stand behind --laws came with it
    settings = [word for word in (*words, *patterns) if "=" in word]
    subject = _subject(targets[0], kind, settings, engine=args.engine)
    if args.example is not None and len(laws) != 1:
        raise ConfigError(f"--example is of one law and {len(laws)} are chosen; name the law with --laws.")
    set_threads(1)  # tensors of laws are small
    with tempfile.TemporaryDirectory() as directory:
        set_hypothesis_home_dir(directory)  # or else it would keep things where the user stands
        require_something_held(subject, laws, args.world_size, option="--")
        report = _report(subject, laws, args)
    say(*_conclusion(report))
    if output is not None:
        from lightrft.testing.conformance.page import write_page

        say(f"report: {write_page(report, output)}")
    return EXIT_FAILED if any(finding.outcome == "broken" for finding in report.findings) else EXIT_OK


def _report(subject: Subject, laws: Sequence[Law], args: argparse.Namespace) -> Report:
    from lightrft.testing.conformance.hold import hold

    try:
        return hold(
            subject,
            laws,
            world_sizes=args.world_size,
            max_examples=args.max_examples,
            seed=args.seed,
            example=args.example,
            ranks=args.ranks,
            on_finding=_build_show(laws, args.world_size),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; what was held so far stands above.") from None


def _list_of_laws() -> list[str]:
    from lightrft.testing.laws.registry import ENGINE_LAWS, STRATEGY_LAWS

    strategies = table(
        ("law of strategies", "what it says"), [(law.id, law.statement) for law in STRATEGY_LAWS.values()]
    )
    engines = table(("law of engines", "what it says"), [(law.id, law.statement) for law in ENGINE_LAWS.values()])
    return [*strategies, "", *engines]


def _subject(target: str, kind: SubjectKind, settings: Sequence[str], *, engine: str | None) -> Subject:
    from lightrft.strategy.registry import registered_engines
    from lightrft.testing.subject import subject_of

    for setting in settings:
        name, _, value = setting.partition("=")
        if name == ("strategy" if kind == "strategy" else "type"):
            raise ConfigError(
                f"{name}={value!r} would choose the {kind}, and {target!r} is held to its laws; leave it out."
            )
    config = load_config(None, [f"{kind}.{setting}" for setting in settings])
    if kind == "engine":
        if engine is not None:
            raise ConfigError(
                f"--engine={engine!r} is for a strategy, and {target!r} is an engine; leave --engine out."
            )
        return subject_of(target, kind, engine=config.engine)
    if engine is not None and engine not in registered_engines():
        raise ConfigError(f"--engine={engine!r} is not registered; {nearest(engine, registered_engines())}.")
    chosen = EngineConfig(type=engine or "scripted")
    return subject_of(target, kind, config=config.strategy, engine=chosen)


def _writable(name: str) -> Path:
    from lightrft.testing.conformance.page import check_writable

    try:
        check_writable(Path(name))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"--report={name!r} cannot be written ({reason}); name a file, in a directory that exists."
        ) from error
    return Path(name)


def _build_show(laws: Sequence[Law], world_sizes: Sequence[int]) -> OnFinding:
    """Return what prints a row of the table as soon as its law was held; the header comes with the first."""
    width = max(len(law.id) for law in laws)
    has_ranks = len(world_sizes) > 1 or world_sizes[0] > 1

    def line(law: str, ranks: object, outcome: str, seconds: str, statement: str) -> str:
        shown = f"{ranks:>5}  " if has_ranks else ""
        return f"{law:<{width}}  {shown}{outcome:<11}  {seconds:>7}  {statement}"

    def show(finding: Finding) -> None:
        reason = f" ({finding.message})" if finding.outcome == "not claimed" else ""
        seconds = "" if finding.outcome == "not claimed" else f"{finding.seconds:.2f}"
        row = line(finding.law, finding.world_size, finding.outcome, seconds, f"{finding.statement}{reason}")
        say(*map(_cut, (*header, row)))
        header.clear()

    header = [line("law", "ranks", "outcome", "seconds", "what it says")]
    return show


def _cut(line: str) -> str:
    """Return a line as wide as the terminal; a broken law is told in full below the table."""
    width = shutil.get_terminal_size().columns
    return line if len(line) <= width or not sys.stdout.isatty() else f"{line[: width - 3]}..."


def _conclusion(report: Report) -> list[str]:
    from lightrft.testing.conformance.report import failure_lines

    broken = [finding for finding in report.findings if finding.outcome == "broken"]
    counts = [
        f"{sum(finding.outcome == outcome for finding in report.findings)} {outcome}"
        for outcome in ("holds", "broken", "not claimed")
    ]
    seconds = sum(finding.seconds for finding in report.findings)
    summary = f"{report.kind} {report.subject}: {', '.join(counts)}, in {seconds:.1f} s."
    return [*(line for finding in broken for line in ("", *failure_lines(finding))), "", summary]


COMMAND = Command(
    name="conformance",
    words="TARGET [key=value ...]",
    summary="hold a strategy or an engine, by its key or as package.module:build, to its laws",
    add_arguments=_add_arguments,
    run=_run,
)
"""`lightrft conformance`."""
