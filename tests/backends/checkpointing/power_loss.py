"""A file system that may lose what was not synced: records a save, and makes every state that a crash may leave.

What is recorded is what the disk holds after each operation of the save, found by tracing as in `kill_matrix_program`:
every call of a C function of `posix`, `fcntl` or `_io`. Two states that follow each other differ by what the operation
did, whatever it is called; a sync changes nothing and is seen where it is called.

What a crash may leave:

- the content of a file, after its last sync: as it was then, as it is now, half of it, or zeros;
- the names of a directory, after its last sync: any of the changes since, in any combination, the later ones without
  the earlier ones too. A rename changes two directories at once, all or nothing.
"""

from __future__ import annotations

import itertools
import os
import random
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import attrs
from kill_matrix_program import trace

Names: TypeAlias = "dict[str, int]"
Disk: TypeAlias = "dict[int, Names | bytes]"
"""By number: the names in a directory, or the content of a file. Number 0 is the root."""

EXHAUSTIVE = 12  # changes of names that may be lost, up to which all combinations are made


@attrs.frozen(kw_only=True)
class Change:
    """One operation on names: all of it becomes durable with a sync of any directory that it touches.

    Attributes:
        names: (directory, name, number that stands there now or None) for each name.
    """

    names: tuple[tuple[int, str, int | None], ...]


@attrs.frozen(kw_only=True)
class Moment:
    """An instant of the save.

    Attributes:
        label: the operation that came last.
        durable: what no crash can lose: names, and the content of files at their last sync.
        changes: changes of names since, in order.
        contents: what files hold now that held something else at their last sync.
    """

    label: str
    durable: Disk
    changes: tuple[Change, ...]
    contents: Mapping[int, bytes]


@attrs.define(kw_only=True, eq=False)
class _Recorder:
    root: Path
    numbers: dict[int, int] = attrs.field(factory=dict)  # by the file system's own, which it uses again
    next_number: int = 0
    disk: Disk = attrs.field(factory=dict)
    written: dict[int, bytes] = attrs.field(factory=dict)  # content of every file, also of those that are gone
    durable: Disk = attrs.field(factory=dict)
    changes: list[Change] = attrs.field(factory=list)
    moments: list[Moment] = attrs.field(factory=list)


def record(
    root: Path, action: Callable[[], object], *, is_skipped: Callable[[Path], bool] | None = None
) -> list[Moment]:
    """Return the moments of an action on the files below a directory; what is there before is durable.

    Args:
        root: the directory.
        action: what works there.
        is_skipped: says of a path that its syncs are not made: a planted bug.
    """
    recorder = _Recorder(root=root)
    _look(recorder)
    recorder.durable, recorder.changes = _copy(recorder.disk), []
    sync = os.fsync
    synced: list[int] = []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if is_skipped is None or not is_skipped(path):
            sync(descriptor)  # which the trace sees
            _sync(recorder, os.fstat(descriptor).st_ino)
            synced.append(descriptor)

    seen: list[str] = []

    def on_operation(name: str) -> None:
        seen.append(name)
        _note(recorder, name)

    os.fsync = fsync
    try:
        trace(action, on_operation)
    finally:
        os.fsync = sync
    _note(recorder, "the end")
    # no sync that the trace saw was made behind the back of the recorder
    assert len([name for name in seen if "sync" in name]) == len(synced), seen
    return recorder.moments


def states(moment: Moment, *, seed: int = 0) -> Iterator[Disk]:
    """Yield what a crash at this moment may leave: all of it, or a sample where it is too much.

    Args:
        moment: when.
        seed: of the sample.
    """
    for applied in _subsets(moment.changes, seed):
        for contents in _contents(moment):
            disk = _copy(moment.durable)
            for change in applied:
                for directory, name, number in change.names:
                    names = disk.setdefault(directory, {})
                    assert isinstance(names, dict)
                    if number is None:
                        names.pop(name, None)
                    else:
                        names[name] = number
            yield disk | contents


def files_of(disk: Disk, number: int = 0, path: str = "") -> dict[str, bytes | None]:
    """Return the content of every file by its path; directories have None. What no name leads to is not there.

    Args:
        disk: a state.
        number: of the directory to begin with.
        path: of that directory.
    """
    found: dict[str, bytes | None] = {}
    names = disk.get(number, {})
    assert isinstance(names, dict)
    for name, below in sorted(names.items()):
        here = f"{path}{name}"
        content = disk.get(below, {})
        if isinstance(content, bytes):
            found[here] = content
        else:
            found[here] = None
            found |= files_of(disk, below, f"{here}/")
    return found


def put(files: Mapping[str, bytes | None], root: Path) -> None:
    """Make files and directories.

    Args:
        files: as `files_of` returns them.
        root: where; it is made.
    """
    root.mkdir()
    for path, content in files.items():
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


def _note(recorder: _Recorder, label: str) -> None:
    _look(recorder)
    contents = {number: now for number, now in recorder.written.items() if recorder.durable.get(number) != now}
    moment = Moment(label=label, durable=_copy(recorder.durable), changes=tuple(recorder.changes), contents=contents)
    recorder.moments.append(moment)


def _look(recorder: _Recorder) -> None:
    """Take in what the disk holds, and what has changed in the names since the last look."""
    before = recorder.disk
    after: Disk = {}
    alive: dict[int, int] = {}
    _walk(recorder, recorder.root, after, alive)
    recorder.numbers = alive  # what is gone may come back as something else under the same number
    changed: list[tuple[int, str, int | None]] = []
    for number in sorted(before.keys() | after.keys()):
        old, new = before.get(number, {}), after.get(number, {})
        # names in a directory that is gone are gone with it
        if isinstance(old, dict) and isinstance(new, dict) and (number in after):
            changed += [
                (number, name, new.get(name))
                for name in sorted(old.keys() | new.keys())
                if old.get(name) != new.get(name)
            ]
    if changed:
        recorder.changes.append(Change(names=tuple(changed)))
    recorder.disk = after


def _walk(recorder: _Recorder, path: Path, after: Disk, alive: dict[int, int]) -> int:
    status = path.stat()
    if status.st_ino not in recorder.numbers:
        recorder.numbers[status.st_ino] = recorder.next_number
        recorder.next_number += 1
    number = alive[status.st_ino] = recorder.numbers[status.st_ino]
    if stat.S_ISDIR(status.st_mode):
        names: Names = {}
        after[number] = names
        for below in sorted(path.iterdir()):
            names[below.name] = _walk(recorder, below, after, alive)
    else:
        recorder.written[number] = after[number] = path.read_bytes()
    return number


def _sync(recorder: _Recorder, own_number: int) -> None:
    number = recorder.numbers.get(own_number)
    if number is None:
        return
    content = recorder.disk.get(number)
    if content is None:
        return
    if isinstance(content, bytes):
        recorder.durable[number] = content
        return
    done = [change for change in recorder.changes if any(directory == number for directory, _, _ in change.names)]
    for change in done:
        for directory, name, below in change.names:
            names = recorder.durable.setdefault(directory, {})
            assert isinstance(names, dict)
            if below is None:
                names.pop(name, None)
            else:
                names[name] = below
    recorder.changes = [change for change in recorder.changes if change not in done]


def _subsets(changes: tuple[Change, ...], seed: int) -> Iterator[tuple[Change, ...]]:
    if len(changes) <= EXHAUSTIVE:
        for chosen in itertools.product([True, False], repeat=len(changes)):
            yield tuple(itertools.compress(changes, chosen))
        return
    yield from (changes[:length] for length in range(len(changes) + 1))
    for index in range(len(changes)):
        yield changes[:index] + changes[index + 1 :]
        yield changes[index : index + 1]
    places = random.Random(seed)  # noqa: S311 (no secret)
    for _ in range(2**EXHAUSTIVE):
        yield tuple(change for change in changes if places.random() < 0.5)


def _contents(moment: Moment) -> Iterator[dict[int, bytes]]:
    """Yield what the files that were not synced may hold: all of them alike, and each in turn with the rest as now."""
    if not moment.contents:
        yield {}
        return
    losses = {number: _losses(moment.durable.get(number), now) for number, now in moment.contents.items()}
    yield dict(moment.contents)
    for alike in zip(*losses.values(), strict=True):
        yield dict(zip(losses, alike, strict=True))
    for number, each in losses.items():
        for content in each:
            yield {**moment.contents, number: content}


def _losses(synced: Names | bytes | None, now: bytes) -> tuple[bytes, bytes, bytes]:
    return (synced if isinstance(synced, bytes) else b"", bytes(len(now)), now[: len(now) // 2])


def _copy(disk: Disk) -> Disk:
    return {number: dict(content) if isinstance(content, dict) else content for number, content in disk.items()}
