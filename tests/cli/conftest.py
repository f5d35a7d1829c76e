"""The folder of the command line's tests is importable, so that they share `cli_runs`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from lightrft.cli import main

sys.path.insert(0, str(Path(__file__).parent))

from cli_runs import REPOSITORY, Cli, EditRewards, Launch, Outcome, make_workplace


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """The current directory, which holds a small run's configuration, problems and rewards."""
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    yield tmp_path
    sys.modules.pop("rewards", None)


@pytest.fixture
def edit_rewards(workplace: Path) -> EditRewards:
    """Replaces the text of the user's module; the next run in this process reads it anew."""

    def edit(text: str) -> None:
        (workplace / "rewards.py").write_text(text)
        sys.modules.pop("rewards", None)

    return edit


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command in this process."""

    def run(*argv: str) -> Outcome:
        capsys.readouterr()
        code = main(argv)
        out, err = capsys.readouterr()
        return Outcome(code=code, out=out, err=err)

    return run


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Runs a command in a process of its own."""

    def run(*argv: str, cwd: Path, signal_at: str = "") -> Outcome:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "SIGNAL_AT": signal_at}
        done = subprocess.run(  # noqa: S603 (our own interpreter)
            [sys.executable, "-m", "lightrft", *argv],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        return Outcome(code=done.returncode, out=done.stdout, err=done.stderr)

    return run
