"""The doctor tries things out on this very machine."""

from __future__ import annotations

import pytest

from lightrft.cli.checks import CHECKS, Check
from lightrft.cli.doctor import examine
from lightrft.errors import MissingPackageError


def test_this_machine_is_well(cli) -> None:
    """On the machine of the tests every check passes: step, checkpoint round trip, engine, collective."""
    outcome = cli("doctor")
    rows = {line.split()[0]: line.split()[1] for line in outcome.out.splitlines()[1:]}
    assert rows == dict.fromkeys([check.name for check in CHECKS], "ok")
    assert (outcome.code, outcome.err) == (0, "")


def _absent() -> str:
    raise MissingPackageError("x is not installed")


def _broken() -> str:
    raise RuntimeError("it\nbroke")


def _well() -> str:
    return "fine"


def test_what_is_absent_is_no_failure_and_what_fails_stops_nothing() -> None:
    """A missing optional package is absent; an exception of any kind is a failure; the rest is still tried."""
    checks = [Check(name="a", look=_broken), Check(name="b", look=_absent), Check(name="c", look=_well)]
    rows, num_failed = examine(checks)
    assert rows == [
        ("a", "failed", "RuntimeError: it broke"),
        ("b", "absent", "x is not installed"),
        ("c", "ok", "fine"),
    ]
    assert num_failed == 1


def test_a_failure_is_the_exit_code(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """One failed check makes the exit code 1 and is counted under the table."""
    monkeypatch.setattr("lightrft.cli.checks.CHECKS", (Check(name="a", look=_broken), Check(name="c", look=_well)))
    outcome = cli("doctor")
    assert outcome.code == 1
    assert outcome.out.endswith("1 of 2 checks failed.\n")


def test_packages_that_are_missing_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optional package that is missing is absent, a required one is a failure."""
    monkeypatch.setattr("importlib.metadata.version", _not_found)
    rows, num_failed = examine([check for check in CHECKS if check.name in {"rich", "reasoning-gym"}])
    assert [row[:2] for row in rows] == [("rich", "failed"), ("reasoning-gym", "absent")]
    assert num_failed == 1


def _not_found(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)
