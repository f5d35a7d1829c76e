"""What several ranks have to say is said once: what all of them meet by one of them, and a cause before its effects."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from lightrft.backends.launch import rank_of_launch, world_size_of_launch
from lightrft.cli.failures import EXIT_FAILED, UnsaidError, exit_code, is_effect
from lightrft.errors import ConfigError, InterruptedRunError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["code_of_ranks", "is_first_to_say", "leave_word", "one_voice", "quieten_torch", "voice_of_rank"]

_PATIENCE = timedelta(seconds=2)
"""How long the launch's store may take to answer; it is near."""

_GRACE_SECONDS = 1.0
"""How long a rank that lost another one waits for word of the cause, which whoever failed leaves before it goes."""

_FAILED, _CODE, _WORDS = "failed", "code", "words"


@contextmanager
def one_voice() -> Generator[None]:
    """Let an error be raised on one rank alone, and on the others an `UnsaidError`, which nobody hears.

    Of several ranks that fail, the first speaks: the others met the same in words of their own, or heard of it. The
    loss of another rank is said by nobody where that rank has said what became of it. Without a launcher, or where its
    store does not answer, every error is raised.
    """
    try:
        yield
    except UnsaidError:
        raise
    except BaseException as error:
        if not _is_to_be_said(error):
            raise UnsaidError(exit_code(error)) from error
        raise


def voice_of_rank(error: BaseException) -> str:
    """Return what stands before an error's line: nothing in a single process, nor where all ranks stopped as asked.

    Args:
        error: the exception.
    """
    try:
        is_of_all = isinstance(error, InterruptedRunError) or world_size_of_launch() == 1
        return "" if is_of_all else f"rank {rank_of_launch()}: "
    except ConfigError:  # it is what the error speaks of
        return ""


def quieten_torch(*, is_debug: bool) -> None:
    """Keep what torch's C++ writes of lost connections, with stacks, from stderr; errors say the same in one line.

    Args:
        is_debug: whether it is wanted.
    """
    if world_size_of_launch() > 1 and not is_debug:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def leave_word(board: Store, code: int) -> bool:
    """Say on the board that the run has failed, and what it is to end with; return whether nobody had said so before.

    Args:
        board: see `find_board`.
        code: exit code of the cause.
    """
    # what is set first stays: an effect never takes the place of its cause; a number of its own tells whose word it is
    mine = f"{code} {board.add(_WORDS, 1)}"
    is_first = board.compare_set(_CODE, "", mine) == mine.encode()
    board.set(_FAILED, "yes")
    return is_first


def code_of_ranks(board: Store) -> int | None:
    """Return the exit code of the cause, or None if no rank has left word of a failure.

    Args:
        board: see `find_board`.
    """
    return int(board.get(_CODE).split()[0]) if board.check([_CODE]) else None


def is_first_to_say(text: str) -> bool:
    """Return whether no other rank has said the same before; True where there is nobody to ask.

    Args:
        text: what is to be said.
    """

    def is_first(board: Store) -> bool:
        return _is_new(board, text)

    return _ask(is_first)


def _is_to_be_said(error: BaseException) -> bool:
    def is_first(board: Store) -> bool:
        return _is_first(board, error)

    return _ask(is_first)


def _ask(question: Callable[[Store], bool]) -> bool:
    try:
        if world_size_of_launch() == 1:
            return True
        from lightrft.backends.collectives.rendezvous import find_board

        board = find_board(_PATIENCE)
        return board is None or question(board)
    except (ConfigError, RuntimeError):  # the launch makes no sense, or its store has gone meanwhile
        return True


def _is_new(board: Store, text: str) -> bool:
    return board.add(hashlib.sha256(text.encode()).hexdigest(), 1) == 1


def _is_first(board: Store, error: BaseException) -> bool:
    if isinstance(error, InterruptedRunError):
        return board.add("stopped", 1) == 1
    if is_effect(error):
        if _has_failed(board):
            return False
        return leave_word(board, EXIT_FAILED)
    return leave_word(board, exit_code(error))


def _has_failed(board: Store) -> bool:
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline:
        if board.check([_FAILED]):
            return True
        time.sleep(0.02)
    return False
