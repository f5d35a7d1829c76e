"""What an engine that is a guest may change of its host, put back."""

from __future__ import annotations

import logging
import os
import sys

import pytest

from lightrft.backends.rollout.guest import as_guest


def test_the_log_and_the_hook_of_the_host_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handlers and level of the root logger and the hook of uncaught errors are what they were, after an error too."""
    monkeypatch.setenv("LIGHTRFT_GUEST", "before")
    root = logging.getLogger()
    before = (root.handlers[:], root.level, sys.excepthook, dict(os.environ))

    def disturb() -> None:
        assert os.environ["LIGHTRFT_GUEST"] == "while it is there"
        root.addHandler(logging.NullHandler())
        root.setLevel(logging.DEBUG)
        sys.excepthook = print
        raise InterruptedError

    with pytest.raises(InterruptedError), as_guest({"LIGHTRFT_GUEST": "while it is there"}):
        disturb()
    assert (root.handlers[:], root.level, sys.excepthook, dict(os.environ)) == before
