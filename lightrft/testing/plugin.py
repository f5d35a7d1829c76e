"""The pytest plugin: one test for each law of a strategy or an engine, from one line of configuration.

It is loaded into every run of pytest where lightrft is installed, so it imports nothing of lightrft until it is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING

import pytest
from typing_extensions import override

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from lightrft.strategy.protocols import Capabilities
    from lightrft.testing.law import Harness, Law
    from lightrft.testing.subject import Subject, SubjectKind

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_configure"]

_KINDS: tuple[SubjectKind, ...] = ("strategy", "engine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options.

    Args:
        parser: pytest's.
    """
    group = parser.getgroup("lightrft", "laws of lightrft's strategies and engines")
    for kind in _KINDS:
        text = f"{kind} to hold to its laws: a registry key, or package.module:build"
        group.addoption(f"--lightrft-{kind}", action="append", default=[], metavar="TARGET", help=text)
        parser.addini(f"lightrft_{kind}", type="linelist", help=f"{text}; when no paths are given")
    group.addoption("--lightrft-laws", action="append", default=[], metavar="PATTERN", help='such as "step.*"')
    group.addoption("--lightrft-world-size", action="append", type=int, default=[], metavar="N", help="ranks (1)")
    group.addoption("--lightrft-max-examples", type=int, default=30, metavar="N", help="examples of each law (30)")
    group.addoption("--lightrft-seed", type=int, default=0, metavar="N", help="seed of the examples (0)")


def pytest_configure(config: pytest.Config) -> None:
    """Take the targets of the configuration file if neither targets nor paths stand on the command line.

    They become options, because options are what a process of pytest-xdist is given.

    Args:
        config: pytest's.

    Raises:
        pytest.UsageError: there are targets, and an option makes no sense or hypothesis is not installed.
    """
    given = any(getattr(config.option, f"lightrft_{kind}") for kind in _KINDS)
    if not given and config.args_source is not pytest.Config.ArgsSource.ARGS:
        for kind in _KINDS:
            setattr(config.option, f"lightrft_{kind}", config.getini(f"lightrft_{kind}"))
    if any(getattr(config.option, f"lightrft_{kind}") for kind in _KINDS):
        _check_options(config.option)


def _check_options(options: argparse.Namespace) -> None:
    from lightrft.errors import ConfigError, MissingPackageError
    from lightrft.testing.conformance.settings import check_settings, require_hypothesis

    try:
        require_hypothesis()
        check_settings(
            world_sizes=options.lightrft_world_size or (1,),
            max_examples=options.lightrft_max_examples,
            seed=options.lightrft_seed,
            option="--lightrft-",
        )
    except (ConfigError, MissingPackageError) as error:
        raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose among the items
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add a test for each law and number of ranks of each target.

    Args:
        session: pytest's.
        config: pytest's.
        items: what was found in files.
    """
    for kind in _KINDS:
        for target in getattr(config.option, f"lightrft_{kind}"):
            for world_size in dict.fromkeys(config.option.lightrft_world_size or [1]):
                items.extend(session.genitems(_laws(session, target, kind, world_size)))


def _laws(session: pytest.Session, target: str, kind: SubjectKind, world_size: int) -> pytest.Collector:
    ranks = "" if world_size == 1 else f" on {world_size} ranks"
    nodeid = f"{kind} {target}{ranks}"
    return Laws.from_parent(session, name=target, nodeid=nodeid, kind=kind, world_size=world_size)


class Laws(pytest.Collector):
    """The laws of one subject on one number of ranks; pytest has collectors inherit from its own classes."""

    def __init__(self, name: str, parent: pytest.Session, nodeid: str, kind: SubjectKind, world_size: int) -> None:
        """Keep what the laws are chosen by.

        Args:
            name: the target.
            parent: pytest's.
            nodeid: how its tests are called.
            kind: what the target builds.
            world_size: number of ranks.
        """
        super().__init__(name, parent, nodeid=nodeid)
        self.kind: SubjectKind = kind
        self.world_size = world_size

    @override
    def collect(self) -> Iterator[pytest.Item]:
        if str(self.config.rootpath) not in sys.path:  # as the command does with the current directory
            sys.path.insert(0, str(self.config.rootpath))
        try:
            from lightrft.testing.conformance.hold import says_something
            from lightrft.testing.laws.registry import choose_laws

            laws = choose_laws(self.kind, self.config.option.lightrft_laws)
            _ = self.claims  # told once for the target, and not by each law, if it cannot be built
        except Exception as error:  # an engine registered by another package can raise anything
            raise self.CollectError(f"{type(error).__name__}: {error}") from error
        return (LawItem.from_parent(self, name=law.id, law=law) for law in laws if says_something(law, self.world_size))

    @cached_property
    def subject(self) -> Subject:
        """What the target names."""
        from lightrft.testing.subject import subject_of

        return subject_of(self.name, self.kind)

    @cached_property
    def claims(self) -> Capabilities:
        """What the subject claims."""
        from lightrft.testing.conformance.target import claims_of

        return claims_of(self.subject)

    @cached_property
    def harness(self) -> Harness:
        """What the laws are held against; processes of ranks live until pytest ends."""
        from lightrft.testing.conformance.hold import draw_settings, run_on
        from lightrft.testing.law import Harness

        stack = ExitStack()
        self.config.add_cleanup(stack.close)
        return Harness(
            subject=self.subject,
            run=stack.enter_context(run_on(self.subject, None, self.world_size)),
            world_size=self.world_size,
            settings=draw_settings(self.config.option.lightrft_max_examples),
            seed=self.config.option.lightrft_seed,
            example=None,
        )


class LawItem(pytest.Item):
    """One law on one number of ranks."""

    def __init__(self, name: str, parent: Laws, law: Law) -> None:
        """Keep the law.

        Args:
            name: its id.
            parent: what it is held against.
            law: the law.
        """
        super().__init__(name, parent)
        self.laws: Laws = parent
        self.law: Law = law

    @override
    def runtest(self) -> None:
        from lightrft.testing.conformance.hold import hold_law
        from lightrft.testing.conformance.report import failure_lines

        finding = hold_law(self.law, self.laws.harness, claims=self.laws.claims)
        if finding.outcome == "not claimed":
            pytest.skip(finding.message)
        if finding.outcome == "broken":
            pytest.fail("\n".join(failure_lines(finding)), pytrace=False)

    @override
    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.laws.nodeid}: {self.law.statement}"
