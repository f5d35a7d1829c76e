"""`python -m lightrft`."""

from __future__ import annotations

import subprocess
import sys

from lightrft import __version__


def test_the_package_runs_as_the_command() -> None:
    """`python -m lightrft --version` prints the version and ends with 0."""
    done = subprocess.run([sys.executable, "-m", "lightrft", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"lightrft {__version__}\n", "")
