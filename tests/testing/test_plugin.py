"""The pytest plugin: one line of configuration, and each law is a test."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lightrft
from lightrft.testing.laws.registry import ENGINE_LAWS, STRATEGY_LAWS

pytest_plugins = ["pytester"]

ROOT = Path(lightrft.__file__).parents[1]

BACKENDS = """\
import attrs
from lightrft.strategy import STRATEGIES, Strategy, StrategyConfig


def build_renamed(config: StrategyConfig) -> Strategy:
    single = STRATEGIES["single"](config)

    def broadcast(values, src=0):
        return single.broadcast(values, src)

    return attrs.evolve(single, broadcast=broadcast)


def build_broken(config: StrategyConfig) -> Strategy:
    raise ZeroDivisionError("by nothing")


def build_nothing(config: StrategyConfig) -> Strategy:
    return None
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Give a directory with a module of the user's and a test."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the plugin is named, whether it is installed or not
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(backends=BACKENDS)
    pytester.makepyfile(test_own="def test_own():\n    pass\n")
    return pytester


def run(project: pytest.Pytester, *words: str) -> pytest.RunResult:
    """Return what pytest with the plugin gives, in a process of its own: torch cannot be imported twice in one."""
    return project.runpytest_subprocess("-p", "lightrft.testing.plugin", "--lightrft-max-examples=2", *words)


def test_one_line_of_configuration_makes_each_law_a_test(project: pytest.Pytester) -> None:
    """Every law of the target is collected beside the user's tests, and can be chosen with -k."""
    project.makeini("[pytest]\nlightrft_strategy = backends:build_renamed\nlightrft_engine = scripted\n")
    result = run(project, "--collect-only", "-q", "-k", "test_own or record.frozen or engine.record")
    num_laws = sum(law.worlds != "several" for law in [*STRATEGY_LAWS.values(), *ENGINE_LAWS.values()])
    result.stdout.fnmatch_lines(
        [
            "test_own.py::test_own",
            "strategy backends:build_renamed::record.frozen",
            "engine scripted::engine.record",
            f"3/{num_laws + 1} tests collected ({num_laws - 2} deselected) *",
        ]
    )


def test_a_broken_law_is_told_without_a_traceback(project: pytest.Pytester) -> None:
    """A failure is the sentence, what was seen, the example, and the command; another law passes."""
    result = run(project, "--lightrft-strategy", "backends:build_renamed", "--lightrft-laws", "record.[fs]*")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            f"*strategy backends:build_renamed: {STRATEGY_LAWS['record.signatures'].statement[:60]}*",
            f"record.signatures is broken on 1 rank: {STRATEGY_LAWS['record.signatures'].statement}",
            "*broadcast: parameter 1 is 'values' and must be 'data'*",
            "  example: {*}",
            "  again: lightrft conformance backends:build_renamed --laws record.signatures --example '{*}'",
            "FAILED strategy backends:build_renamed::record.signatures*",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*hypothesis/*")


def test_a_law_that_is_not_claimed_is_skipped_with_the_capability(project: pytest.Pytester) -> None:
    """On two ranks a strategy that claims no ranks skips its laws, and says so."""
    words = ("--lightrft-world-size=2", "--lightrft-laws=collectives.world", "-rs")
    result = run(project, "--lightrft-strategy=single", *words)
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["strategy single on 2 ranks s*", "SKIPPED*'ranks' is not claimed"])


def test_paths_on_the_command_line_leave_the_configured_targets_out(project: pytest.Pytester) -> None:
    """Who names a file wants that file; who names a target gets it all the same."""
    project.makeini("[pytest]\nlightrft_strategy = single\n")
    result = run(project, "test_own.py", "--lightrft-engine=scripted", "--lightrft-laws=engine.record")
    result.assert_outcomes(passed=2)
    run(project, "test_own.py").assert_outcomes(passed=1)


def test_what_cannot_be_collected_is_an_error_of_one_line(project: pytest.Pytester) -> None:
    """A target that does not exist, or a builder that raises, ends the collection with a line that says why."""
    targets = (
        "--lightrft-strategy=sngle",
        "--lightrft-engine=backends:none",
        "--lightrft-strategy=backends:build_broken",
        "--lightrft-strategy=backends:build_nothing",
    )
    result = run(project, *targets)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(
        [
            "*ERROR collecting strategy sngle*",
            "ConfigError: target='sngle' is no registered strategy; did you mean 'single'?*",
            "*ERROR collecting strategy backends:build_broken*",
            "ConfigError: target='backends:build_broken' cannot be built (ZeroDivisionError: by nothing); make it *",
            "*ERROR collecting strategy backends:build_nothing*",
            "ConfigError: target='backends:build_nothing' cannot be built (it returned None); make it *",
            "*ERROR collecting engine backends:none*",
            "ConfigError: target='backends:none' cannot be imported*",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lightrft-max-examples=0"], "ERROR: --lightrft-max-examples=0 looks at nothing; use 1 or more."),
        (["--lightrft-world-size=0"], "ERROR: --lightrft-world-size=0 is no number of ranks; use 1 or more."),
        (["-p", "without_hypothesis"], "ERROR: hypothesis is not installed and draws the examples; pip install *"),
    ],
)
def test_wrong_options_are_one_line_at_the_start(project: pytest.Pytester, words: list[str], line: str) -> None:
    """Nothing is collected when an option makes no sense, or when the package that draws is missing."""
    project.makepyfile(without_hypothesis='import importlib.util\nimportlib.util.find_spec = {"numpy": 1}.get\n')
    result = run(project, "--lightrft-strategy=single", *words)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([line])


@pytest.mark.slow
def test_processes_of_xdist_are_given_the_targets(project: pytest.Pytester) -> None:
    """With several processes the configured laws are tests of all of them, run once each."""
    project.makeini("[pytest]\nlightrft_engine = scripted\n")
    words = ("-p", "xdist", "-n", "1", "--lightrft-laws=engine.record")
    run(project, *words).assert_outcomes(passed=2)


def test_the_plugin_costs_nothing_until_it_is_asked(project: pytest.Pytester) -> None:
    """Loading it imports nothing of lightrft but itself: no torch, no hypothesis, no attrs."""
    project.makepyfile(
        test_own="""
        import sys

        def test_own():
            ours = {name for name in sys.modules if name.partition(".")[0] == "lightrft"}
            assert ours == {"lightrft", "lightrft.testing", "lightrft.testing.plugin"}
            assert not {"torch", "hypothesis", "attr"} & sys.modules.keys()
        """
    )
    run(project).assert_outcomes(passed=1)


def test_installed_it_is_found_by_pytest(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point of the package gives pytest its options."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    info = project.path / "site" / "lightrft-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightrft\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines]))
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--help", "-p", "no:cov"],
        env={**os.environ, "PYTHONPATH": f"{info.parent}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "--lightrft-strategy=TARGET" in done.stdout, done.stderr
