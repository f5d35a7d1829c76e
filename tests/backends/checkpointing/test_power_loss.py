"""A save whose disk loses what was not synced: whatever the crash leaves, committed checkpoints are there and whole."""

from __future__ import annotations

import importlib
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightrft.backends.checkpointing.canonical import CheckpointFunctions
from lightrft.backends.checkpointing.layout import committed_steps
from lightrft.errors import LightRFTError
from lightrft.testing.ranks.here import scratch_directory


@pytest.fixture(scope="module")
def power_loss() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    yield importlib.import_module("power_loss")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def make(power_loss: ModuleType) -> Callable[[float], Any]:
    """Makes a trainable whose weights are a number."""
    del power_loss
    made: Callable[[float], Any] = importlib.import_module("kill_matrix_program").make
    return made


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory in memory: what is lost is decided here, not by a disk."""
    with scratch_directory() as directory:
        (directory / "disk").mkdir()
        yield directory / "disk"


@pytest.fixture
def save(checkpointing: CheckpointFunctions, make: Callable[[float], Any]) -> Callable[..., None]:
    def save_step(directory: Path, step: int, max_num: int | None = None) -> None:
        checkpointing.save_ckpt(make(float(step)), directory, step=step, client_state={"value": step}, max_num=max_num)

    return save_step


@pytest.fixture
def problems_of(
    checkpointing: CheckpointFunctions, power_loss: ModuleType, make: Callable[[float], Any], save: Callable[..., None]
) -> Callable[..., list[str]]:
    """Looks at all that a crash at any moment may leave, and tells what is wrong with it.

    What a crash may leave between two syncs it may leave just before the second, so only these moments are looked at.
    """

    def look(directory: Path, allowed: list[set[int]]) -> list[str]:
        problems: list[str] = []
        steps = set(committed_steps(directory))
        if steps not in allowed:
            problems.append(
                f"steps {sorted(steps)} are committed, and one of {[sorted(one) for one in allowed]} must be"
            )
        if checkpointing.latest_ckpt(directory) != max(steps, default=None):
            problems.append(f"{checkpointing.latest_ckpt(directory)} is taken for committed beside {sorted(steps)}")
        for step in steps:
            live = make(0.0)
            try:
                loaded = checkpointing.load_ckpt(live, directory, step=step)
            except LightRFTError as error:
                problems.append(str(error))
            else:
                weight = live.model.get_parameter("weight").tolist()
                assert (loaded.client_state, weight) == ({"value": step}, [[float(step)] * 2])
        return problems

    def save_once_more(directory: Path) -> None:
        save(directory, 9)
        assert look(directory, [set(committed_steps(directory))]) == []
        assert checkpointing.latest_ckpt(directory) == 9
        assert all(path.name.startswith("step-") for path in directory.iterdir()), list(directory.rglob(".*/**"))

    def check(moments: list[Any], run: str, during: list[set[int]], after: list[set[int]], scratch: Path) -> list[str]:
        seen: set[object] = set()
        num_states = 0
        places = random.Random(0)  # noqa: S311 (no secret)
        for moment in [*(moment for moment in moments if moment.label == "fsync"), moments[-1]]:
            allowed = after if moment is moments[-1] else during
            for state in power_loss.states(moment):
                num_states += 1
                files = power_loss.files_of(state)
                # what is found depends on this alone; the rest is left over, and matters to the next save
                visible = (
                    moment is moments[-1],
                    *(item for item in files.items() if item[0].startswith(f"{run}/step-")),
                )
                if visible not in seen or places.random() < 0.001:
                    seen.add(visible)
                    shutil.rmtree(scratch, ignore_errors=True)
                    power_loss.put(files, scratch)
                    problems = look(scratch / run, allowed)
                    if problems:
                        return problems
                    save_once_more(scratch / run)
        assert num_states > 1000
        assert len(seen) >= len(during)
        return []

    return check


def is_never(path: Path) -> bool:
    del path
    return False


def is_file(path: Path) -> bool:
    return path.is_file()


def is_content(path: Path) -> bool:
    return path.name == "content"


def is_run(path: Path) -> bool:
    return path.name == "run"


def is_parent(path: Path) -> bool:
    return path.name in {"disk", "runs"}


@pytest.mark.parametrize(
    ("is_skipped", "problem"),
    [
        (is_never, None),
        (is_file, r"step-00000003/manifest.json is not JSON"),
        (is_content, r"3 is taken for committed beside \[1, 2\]|step-00000003/.* cannot be read: No such file"),
        (is_run, r"steps \[(1, )?2\] are committed, and one of .* must be"),
    ],
    ids=["all syncs", "no file", "not their directory", "not the directory of the run"],
)
def test_a_crash_loses_no_checkpoint(
    disk: Path,
    power_loss: ModuleType,
    save: Callable[..., None],
    problems_of: Callable[..., list[str]],
    is_skipped: Callable[[Path], bool],
    problem: str | None,
) -> None:
    """A third save removes the first of three: it is there until the third is durable, and no half of any is taken.

    A sync that is left out, of the files, of their directory or of the one above, is found.
    """
    for step in (1, 2):
        save(disk / "run", step)

    def action() -> None:
        save(disk / "run", 3, max_num=2)

    moments = power_loss.record(disk, action, is_skipped=is_skipped)
    scratch = disk.with_name("crashed")
    found = problems_of(moments, "run", [{1, 2}, {1, 2, 3}, {2, 3}], [{1, 2, 3}, {2, 3}], scratch)
    assert (found == []) if problem is None else re.search(problem, found[0]), found


@pytest.mark.parametrize(
    ("is_skipped", "is_found"), [(is_never, False), (is_parent, True)], ids=["all syncs", "no parent"]
)
def test_a_crash_loses_no_directory_of_checkpoints(
    disk: Path,
    power_loss: ModuleType,
    save: Callable[..., None],
    problems_of: Callable[..., list[str]],
    is_skipped: Callable[[Path], bool],
    is_found: bool,
) -> None:
    """The first save makes the directory of the run and its parent, which are there when it returns."""

    def action() -> None:
        save(disk / "runs" / "run", 1)

    moments = power_loss.record(disk, action, is_skipped=is_skipped)
    problems = problems_of(moments, "runs/run", [set(), {1}], [{1}], disk.with_name("crashed"))
    assert bool(problems) == is_found, problems
