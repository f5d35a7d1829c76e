"""The package with a user's strategy: its own tests, and its entry point as an installed package has it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lightrft.strategy import StrategyConfig, get_strategy, registered_strategies
from lightrft.testing.laws.registry import STRATEGY_LAWS

PACKAGE = Path(__file__).parents[2] / "examples" / "custom_strategy"


def test_its_own_tests_and_its_laws_pass() -> None:
    """In a process of its own pytest passes the package's tests, and every law of strategies of one rank."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "lightrft.testing.plugin"]
    environment = {
        "PYTHONPATH": f"{PACKAGE / 'src'}:{PACKAGE.parents[1]}",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # the plugin is named, whether it is installed or not
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command.append("--lightrft-max-examples=3")
    done = subprocess.run(command, cwd=PACKAGE, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 (our own)
    assert done.returncode == 0, done.stdout + done.stderr
    laws = [law for law in STRATEGY_LAWS.values() if law.worlds != "several"]
    num_unclaimed = sum("images" in law.requires for law in laws)
    assert f"{len(laws) - num_unclaimed + 3} passed, {num_unclaimed} skipped" in done.stdout


def test_its_entry_point_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, it is listed and chosen by its name, beside our own strategies."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "lightrft_lion-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["lightrft.strategies"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[lightrft.strategies]", *lines]))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(PACKAGE / "src"))
    assert {"lion", "single"} <= registered_strategies().keys()
    strategy = get_strategy(StrategyConfig(strategy="lion"))
    assert strategy.create_optimizer.__name__ == "create_lion"
