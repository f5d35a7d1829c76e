"""`python -m lightrft`."""

from __future__ import annotations

import runpy
import sys

import pytest

from lightrft import __version__


def test_the_package_runs_as_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m lightrft --version` prints the version and ends with 0."""
    monkeypatch.setattr(sys, "argv", ["lightrft", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("lightrft", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"lightrft {__version__}\n"
