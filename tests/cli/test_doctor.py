"""The doctor tries things out on this very machine."""

from __future__ import annotations

import attrs
import pytest
import torch
from cli_runs import Cli

from lightrft.cli.checks import CHECKS, Check
from lightrft.cli.doctor import examine
from lightrft.errors import MissingPackageError
from lightrft.strategy import StepResult, Strategy, get_strategy


def test_this_machine_is_well(cli: Cli) -> None:
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


def test_a_failure_is_the_exit_code(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("name", "broken_functions", "words"),
    [
        ("collective", {"all_reduce": "no_sum"}, "the sum of 1 * 3 ones is 0.0"),
        ("training", {"optimizer_step": "no_step"}, "did not step (frozen)"),
        ("training", {"optimizer_step": "empty_step"}, "in one step"),
        ("checkpoint", {"load_ckpt": "no_load"}, "after loading and was"),
        ("engine", {"gather_and_generate": "nonsense"}, "before sleeping and"),
    ],
)
def test_a_strategy_that_does_not_do_its_work_fails(
    monkeypatch: pytest.MonkeyPatch, name: str, broken_functions: dict[str, str], words: str
) -> None:
    """Wrong sums, steps that do nothing, checkpoints that do not restore and engines that differ are found."""
    from lightrft.cli import checks

    broken = attrs.evolve(
        get_strategy({"strategy": "single"}), **{field: _BROKEN[kind] for field, kind in broken_functions.items()}
    )

    def get_broken(config: object) -> Strategy:
        del config
        return broken

    monkeypatch.setattr(checks, "get_strategy", get_broken)
    rows, num_failed = examine([check for check in CHECKS if check.name == name])
    assert num_failed == 1
    assert words in rows[0][2]


def _no_sum(data: torch.Tensor, op: str = "mean") -> torch.Tensor:
    del op
    return torch.zeros_like(data)


def _no_step(*handles: object, is_boundary: bool | None = None) -> StepResult:
    del handles, is_boundary
    return StepResult(stepped=False, grad_norm=None, learning_rate=0.0, skipped_reason="frozen")


def _no_load(*handles: object, **options: object) -> None:
    del handles, options


def _empty_step(*handles: object, is_boundary: bool | None = None) -> StepResult:
    del handles, is_boundary
    return StepResult(stepped=True, grad_norm=1.0, learning_rate=0.0, skipped_reason=None)


def _nonsense(*arguments: object) -> list[object]:
    del arguments
    return [object()]


_BROKEN = {
    "no_sum": _no_sum,
    "no_step": _no_step,
    "empty_step": _empty_step,
    "no_load": _no_load,
    "nonsense": _nonsense,
}
