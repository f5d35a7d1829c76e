"""Holds a strategy or an engine to its laws, one after the other, and says what came of each."""

from __future__ import annotations

import shlex
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol, TypeAlias

import attrs
import hypothesis
from hypothesis import HealthCheck, Phase

from lightrft.errors import ConfigError
from lightrft.strategy.protocols import Capabilities
from lightrft.testing.conformance.failure import describe_failure
from lightrft.testing.conformance.report import Finding, Outcome, Report
from lightrft.testing.conformance.settings import check_settings
from lightrft.testing.conformance.target import claims_of, target_words
from lightrft.testing.law import Harness, Law
from lightrft.testing.ranks.watchdog import StuckError
from lightrft.testing.subject import RunOnRanks, Subject

__all__ = [
    "DEFAULT_NUM_EXAMPLES",
    "OnFinding",
    "RanksKind",
    "draw_settings",
    "hold",
    "hold_law",
    "require_something_held",
    "run_on",
    "says_something",
]

DEFAULT_NUM_EXAMPLES = 30
"""Examples of each law, so that all laws of all our strategies and engines take a few minutes."""

RanksKind: TypeAlias = Literal["here", "simulated", "processes"]
"""Where ranks run: one in this process, several in this process, or each in a process of its own."""


_TIMED = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example)
"""Checks of hypothesis that depend on the speed of the machine, or on luck."""


class OnFinding(Protocol):
    """Is told of each finding at once, for those who wait."""

    def __call__(self, finding: Finding, /) -> None:
        """Show it.

        Args:
            finding: the newest.
        """
        ...


def hold(
    subject: Subject,
    laws: Sequence[Law],
    *,
    world_sizes: Sequence[int] = (1,),
    max_examples: int = DEFAULT_NUM_EXAMPLES,
    seed: int = 0,
    example: str | None = None,
    ranks: RanksKind | None = None,
    on_finding: OnFinding | None = None,
) -> Report:
    """Return what came of holding a subject to laws; a broken one does not keep the others from being held.

    Args:
        subject: the strategy or engine.
        laws: what it is held to.
        world_sizes: numbers of ranks, one after the other.
        max_examples: bound on the examples of each law.
        seed: of the examples; equal seeds draw equal ones.
        example: JSON of the one case to look at, which a broken law gave; only for one law.
        ranks: where they run; None runs one rank here, and several as processes, as an engine's always do.
        on_finding: is told of each finding at once; None tells nobody.

    Raises:
        ConfigError: the settings make no sense together, the example is none of the law, or nothing can be built.
        LightRFTError: the subject says itself why it cannot be built here.

    Example:
        >>> from lightrft.testing.laws.registry import choose_laws
        >>> from lightrft.testing.subject import subject_of
        >>> laws = choose_laws("strategy", ["step.clipping"])
        >>> [finding.outcome for finding in hold(subject_of("single", "strategy"), laws, max_examples=2).findings]
        ['holds']
    """
    _check_example(laws, example)
    check_settings(world_sizes=world_sizes, max_examples=max_examples, seed=seed, ranks=ranks)
    claims = claims_of(subject)
    findings: list[Finding] = []
    for world_size in dict.fromkeys(world_sizes):
        with run_on(subject, ranks, world_size) as run:
            harness = Harness(
                subject=subject,
                run=run,
                world_size=world_size,
                settings=draw_settings(max_examples),
                seed=seed,
                example=example,
            )
            for finding in _findings(laws, harness, claims, ranks):
                findings.append(finding)
                if on_finding is not None:
                    on_finding(finding)
    return Report(
        subject=subject.name, kind=subject.kind, seed=seed, max_examples=max_examples, findings=tuple(findings)
    )


def draw_settings(max_examples: int) -> hypothesis.settings:
    """Return the settings under which laws draw: no database, no deadline, nothing that depends on the machine.

    Args:
        max_examples: bound on the examples of a law.
    """
    return hypothesis.settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=_TIMED,
        phases=(Phase.generate, Phase.shrink),
    )


def says_something(law: Law, world_size: int) -> bool:
    """Return whether a law is about this many ranks.

    Args:
        law: the law.
        world_size: number of ranks.
    """
    return law.worlds == "every" or (law.worlds == "one") == (world_size == 1)


def hold_law(law: Law, harness: Harness, *, claims: Capabilities, ranks: RanksKind | None = None) -> Finding:
    """Return what came of one law.

    Args:
        law: the law.
        harness: what it is held against.
        claims: what the subject claims.
        ranks: where the user wants them to run, for the command that shows a failure again.

    Raises:
        ConfigError: the harness has an example, and it is none of this law.
    """
    missing = _missing(law, harness.world_size, claims)
    if missing:
        reason = " and ".join(f"{name!r} is not claimed" for name in missing)
        return _finding(law, harness, "not claimed", seconds=0.0, message=reason)
    start = time.perf_counter()
    try:
        law.check(harness)
    except (Exception, SystemExit, StuckError) as error:  # what a user's backend raises can be anything
        if harness.example is not None and isinstance(error, ConfigError) and str(error).startswith("example="):
            raise
        failure = describe_failure(error)
        finding = _finding(law, harness, "broken", seconds=time.perf_counter() - start, message=failure.message)
        example = failure.example or harness.example
        return attrs.evolve(finding, example=example, command=_command(law, harness, example, ranks))
    return _finding(law, harness, "holds", seconds=time.perf_counter() - start)


def require_something_held(
    subject: Subject, laws: Sequence[Law], world_sizes: Sequence[int], *, option: str = ""
) -> None:
    """Return if at least one law would be held; a run without any would look like success.

    Args:
        subject: the strategy or engine.
        laws: what it would be held to.
        world_sizes: numbers of ranks.
        option: how the options of these settings begin; see `check_settings`.

    Raises:
        ConfigError: none would, and why.
        LightRFTError: as `hold` where the subject cannot be built.
    """
    claims = claims_of(subject)
    missing = [_missing(law, size, claims) for size in world_sizes for law in laws if _is_told(law, size, claims)]
    if not all(missing):
        return
    lacks = [frozenset(each) for each in missing]
    # what keeps all of them from being held, if one thing does
    names = sorted(frozenset[str]().union(*lacks[:1]).intersection(*lacks) or frozenset[str]().union(*lacks))
    sizes = f"{option}world{'-' if option else '_'}size"
    given = f"{sizes}={' '.join(map(str, world_sizes))}"
    reason = f"{' and '.join(map(repr, names))} is not claimed by {subject.name}"
    if not names:
        raise ConfigError(f"{given} holds no law: those that are chosen are about other numbers; choose another one.")
    if "ranks" in names and max(world_sizes) > 1:
        raise ConfigError(f"{given} holds no law: {reason}; claim it, or leave {sizes} out.")
    raise ConfigError(f"{option}laws={laws[0].id!r} is not held: {reason}; claim it, or choose other laws.")


@contextmanager
def run_on(subject: Subject, ranks: RanksKind | None, world_size: int) -> Generator[RunOnRanks]:
    """Yield what runs programs on ranks; afterwards no rank is left.

    Args:
        subject: what is held to the laws.
        ranks: where they run; None runs one rank here, and several as processes.
        world_size: how many there are.

    Raises:
        ConfigError: an engine is to run on simulated ranks.
    """
    chosen = ranks or ("here" if world_size == 1 else "processes")
    if chosen == "here":
        from lightrft.testing.ranks.here import run_here

        yield run_here(subject)
    elif chosen == "simulated":
        if subject.kind == "engine":
            raise ConfigError(
                f"ranks='simulated' is for strategies whose collectives are simulated, and {subject.name!r} is an "
                "engine; use 'processes'."
            )
        from lightrft.testing.ranks.simulated import run_simulated_ranks

        yield run_simulated_ranks(subject, world_size)
    else:
        from lightrft.testing.ranks.processes import processes

        with processes(subject, world_size) as run:
            yield run


def _findings(
    laws: Sequence[Law], harness: Harness, claims: Capabilities, ranks: RanksKind | None
) -> Generator[Finding]:
    for law in laws:
        if _is_told(law, harness.world_size, claims):
            yield hold_law(law, harness, claims=claims, ranks=ranks)


def _is_told(law: Law, world_size: int, claims: Capabilities) -> bool:
    # a law of several ranks is told to be out of reach even where there is only one
    return says_something(law, world_size) or (law.worlds == "several" and "ranks" not in claims)


def _missing(law: Law, world_size: int, claims: Capabilities) -> list[str]:
    several: Capabilities = frozenset({"ranks"}) if world_size > 1 or law.worlds == "several" else frozenset()
    return sorted((law.requires | several) - claims)


def _finding(law: Law, harness: Harness, outcome: Outcome, *, seconds: float, message: str = "") -> Finding:
    return Finding(
        law=law.id,
        statement=law.statement,
        world_size=harness.world_size,
        outcome=outcome,
        seconds=seconds,
        message=message,
    )


def _command(law: Law, harness: Harness, example: str | None, ranks: RanksKind | None) -> str:
    drawn = ["--seed", str(harness.seed), "--max-examples", str(harness.settings.max_examples)]
    words = [
        *target_words(harness.subject),
        *("--laws", law.id),
        *(["--world-size", str(harness.world_size)] if harness.world_size > 1 else []),
        *(["--ranks", ranks] if ranks is not None else []),
        *(drawn if example is None else ["--example", example]),
    ]
    return f"lightrft conformance {shlex.join(words)}"


def _check_example(laws: Sequence[Law], example: str | None) -> None:
    if example is not None and len(laws) != 1:
        raise ConfigError(f"example={example[:40]!r} is of one law and {len(laws)} are chosen; name the law.")
