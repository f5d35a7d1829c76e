"""Disks that are full or cannot be written, directories that go away, and two runs in one directory, each for real.

Whatever happens: one line, earlier checkpoints as they were, nothing left behind.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

import lightrft
from lightrft.backends.checkpointing.background import saving_thread
from lightrft.backends.checkpointing.canonical import CheckpointFunctions
from lightrft.backends.collectives.single import build_collectives
from lightrft.cli import main
from lightrft.errors import CheckpointError
from lightrft.strategy.config import StrategyConfig
from lightrft.testing.ranks.here import scratch_directory

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
NOBODY = 65534


def tree(directory: Path) -> dict[str, bytes]:
    """Everything that stands in a directory, hidden or not."""
    return {
        str(path.relative_to(directory)): b"directory" if path.is_dir() else path.read_bytes()
        for path in sorted(directory.rglob("*"))
    }


def assert_one_line(error: CheckpointError, *words: str) -> None:
    assert "\n" not in str(error)
    assert all(word in str(error) for word in words), error


def assert_loads(functions: CheckpointFunctions, directory: Path, step: int) -> None:
    model = nn.Linear(1, 1, bias=False)
    assert functions.latest_ckpt(directory) == step
    assert functions.load_ckpt(model, directory).step == step
    assert model.weight.item() == step


def save_small(functions: CheckpointFunctions, directory: Path, step: int, **keywords: object) -> Path:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, step)
    return functions.save_ckpt(model, directory, step=step, **keywords)


def done(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603 (fixed commands)


@contextmanager
def mounted(directory: Path, options: str) -> Generator[Path]:
    directory.mkdir()
    if shutil.which("mount") is None or not done("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)):
        pytest.skip("mounting a small file system needs root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)  # noqa: S603, S607 (a fixed command)


@pytest.mark.parametrize("lacking", ["bytes", "names"])
def test_a_disk_that_is_full_anywhere_in_any_file(
    tmp_path: Path, checkpointing: CheckpointFunctions, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """With a page more of space each time, or a name more, every file is cut short once, until the save succeeds."""
    reached: list[str] = []
    original = os.open

    def note_and_open(path: str | Path, flags: int, *mode: int, **keywords: int) -> int:
        if flags & os.O_CREAT:
            reached.append(Path(path).name)
        return original(path, flags, *mode, **keywords)

    monkeypatch.setattr(os, "open", note_and_open)
    cut_short: set[str] = set()
    model, state = nn.Linear(40, 40), {"padding": "x" * 9000}  # files of several pages, which are cut in their middle
    models = {"actor": model, "reference": model}
    options = f"size={64 * PAGE_SIZE}" if lacking == "bytes" else "nr_inodes=32"
    with mounted(tmp_path / "disk", options) as disk:
        save_small(checkpointing, disk / "run", 1)
        before = tree(disk)
        ballast = filled(disk)
        while True:
            reached.clear()
            try:
                path = checkpointing.save_ckpt(models, disk / "run", step=2, client_state=state)
                break
            except CheckpointError as error:
                assert_one_line(error, f"save_dir='{disk}/run' failed: No space left on device", "; free space or")
            cut_short.update(reached[-1:])
            assert {name: each for name, each in tree(disk).items() if not name.startswith("ballast")} == before
            assert_loads(checkpointing, disk / "run", 1)
            ballast.pop().unlink()
        assert cut_short == {"lightrft.json", *(file.name for file in path.iterdir())}


def filled(disk: Path) -> list[Path]:
    """Fill a disk with files of one page each, and return them."""
    files: list[Path] = []
    while True:
        path = disk / f"ballast-{len(files)}"
        try:
            path.write_bytes(bytes(PAGE_SIZE))
        except OSError:
            path.unlink(missing_ok=True)
            return files
        files.append(path)


@contextmanager
def read_only_disk(directory: Path) -> Generator[None]:
    if not done("mount", "--bind", str(directory), str(directory)):
        pytest.skip("mounting needs root")
    try:
        assert done("mount", "-o", "remount,ro,bind", str(directory))
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)  # noqa: S603, S607 (a fixed command)


@contextmanager
def immutable(directory: Path) -> Generator[None]:
    if shutil.which("chattr") is None or not done("chattr", "+i", str(directory)):
        pytest.skip("an immutable directory needs root, and a file system that has them")
    try:
        yield
    finally:
        assert done("chattr", "-i", str(directory))


@pytest.mark.parametrize(
    ("lock", "reason"), [(read_only_disk, "Read-only file system"), (immutable, "Operation not permitted")]
)
def test_a_directory_that_root_cannot_write(
    tmp_path: Path,
    checkpointing: CheckpointFunctions,
    lock: Callable[[Path], Generator[None]],
    reason: str,
) -> None:
    """A read-only file system and an immutable directory are said in one line; what is there still loads."""
    directory = tmp_path / "run"
    save_small(checkpointing, directory, 1)
    before = tree(tmp_path)
    with lock(directory):
        with pytest.raises(CheckpointError) as caught:
            save_small(checkpointing, directory, 2)
        assert_one_line(caught.value, f"save_dir='{directory}' failed: {reason} ", "; free space or choose another")
        assert_loads(checkpointing, directory, 1)
        with pytest.raises(CheckpointError) as caught:
            checkpointing.save_model(nn.Linear(1, 1), directory / "model")
        assert_one_line(caught.value, f"output_dir='{directory}/model' failed: {reason} ")
    assert tree(tmp_path) == before
    save_small(checkpointing, directory, 2)


def test_pruning_what_cannot_be_removed(
    tmp_path: Path, checkpointing: CheckpointFunctions, capsys: pytest.CaptureFixture[str]
) -> None:
    """`lightrft checkpoint prune` says it in one line, and nothing is half removed."""
    for step in (1, 2):
        save_small(checkpointing, tmp_path / "run", step)
    before = tree(tmp_path)
    with read_only_disk(tmp_path / "run"):
        assert main(["checkpoint", "prune", str(tmp_path), "--max-num", "1"]) == 2
        assert main(["checkpoint", "prune", str(tmp_path / "run"), "--max-num", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert f"directory='{tmp_path}/run/step-00000001' failed: Read-only file system (" in lines[1]
    assert lines[1].endswith("; those that are newer stay as they were.")
    assert tree(tmp_path) == before


def as_nobody(action: Callable[[], str]) -> str:
    """Return what an action says in a child that permission bits bind, which they do not bind root."""
    out, into = os.pipe()
    process = os.fork()
    if process == 0:
        gc.disable()  # what is collected here may wait for threads that only the parent has
        words = "nothing was said"
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            words = action()
        except BaseException as error:  # noqa: BLE001 (it is looked at)
            words = f"{type(error).__name__}: {error}"
        finally:
            os.write(into, words.encode())
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        words = pipe.read()
    os.waitpid(process, 0)
    return words


def test_a_directory_of_somebody_else(checkpointing: CheckpointFunctions) -> None:
    """Without the permission to write, a save is one line and a load works; one that may not remove has committed."""

    def save(directory: Path, step: int) -> str:
        try:
            return save_small(checkpointing, directory, step, max_num=1).name
        except CheckpointError as error:
            assert_one_line(error)
            return str(error)

    def load() -> str:
        assert_loads(checkpointing, locked, 1)
        return "loaded"

    with scratch_directory() as scratch:
        scratch.chmod(0o755)
        locked, shared = scratch / "locked", scratch / "shared"
        for directory in (locked, shared):
            path = save_small(checkpointing, directory, 1)
            path.chmod(0o555)
        locked.chmod(0o555)
        shared.chmod(0o777)
        before = tree(locked)
        words = as_nobody(lambda: save(locked, 2))
        assert words.startswith(f"save_dir='{locked}' failed: Permission denied ({locked}/.step-00000002.tmp-")
        assert words.endswith("; free space or choose another directory. Earlier checkpoints are as they were.")
        assert as_nobody(load) == "loaded"
        assert tree(locked) == before
        words = as_nobody(lambda: save(shared, 2))
        older = f"{shared}/step-00000001 (Permission denied)"
        assert words == f"step=2 is committed, and older checkpoints cannot be removed: {older}; remove them by hand."
        assert sorted(path.name for path in shared.iterdir()) == ["step-00000001", "step-00000002"]
        assert_loads(checkpointing, shared, 2)
        for path in (locked, *scratch.glob("*/step-*")):
            path.chmod(0o755)


@pytest.fixture(scope="module")
def matrix() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    yield importlib.import_module("kill_matrix_program")
    sys.path.remove(folder)


@pytest.mark.parametrize("what", ["run", "staging", "content"])
def test_what_is_removed_while_it_is_written(checkpointing: CheckpointFunctions, matrix: ModuleType, what: str) -> None:
    """At whichever operation somebody removes it: the save ends in one line or has committed; the others are intact."""
    with scratch_directory() as scratch:

        def begin(number: int) -> Path:
            directory = scratch / str(number) / "run"
            shutil.copytree(scratch / "base", directory)
            return directory

        def remove(directory: Path) -> None:
            staging = list(directory.glob(".step-00000003.*"))
            removed = {
                "run": [directory],
                "staging": staging,
                "content": [path / "content" for path in staging],
            }[what]
            for path in removed:
                shutil.rmtree(path, ignore_errors=True)

        for step in (1, 2):
            save_small(checkpointing, scratch / "base", step)
        outcomes: list[str] = []
        operations: list[str] = []
        directory = begin(-1)
        matrix.trace(lambda: save_small(checkpointing, directory, 3, max_num=2), operations.append)
        for number in range(len(operations)):
            directory = begin(number)
            seen: list[str] = []

            def act(name: str, directory: Path = directory, seen: list[str] = seen, number: int = number) -> None:
                seen.append(name)
                if len(seen) == number + 1:
                    remove(directory)

            try:
                matrix.trace(lambda directory=directory: save_small(checkpointing, directory, 3, max_num=2), act)
                outcomes.append("saved")
            except CheckpointError as error:
                assert_one_line(error)
                outcomes.append("refused")
            if what == "run":
                assert not directory.exists() or outcomes[-1] == "saved"
                save_small(checkpointing, directory, 3) if not directory.exists() else None
                continue
            left = sorted(path.name for path in directory.iterdir())
            assert left in (["step-00000001", "step-00000002"], ["step-00000002", "step-00000003"]), (number, left)
            assert (outcomes[-1] == "saved") == (left[-1] == "step-00000003"), (number, outcomes[-1])
            assert_loads(checkpointing, directory, int(left[-1][-1]))
            shutil.rmtree(directory.parent)
    assert {"saved", "refused"} == set(outcomes)


SaveAtOnce = Callable[..., list[dict[str, str]]]


@pytest.fixture(scope="module")
def save_at_once() -> Generator[SaveAtOnce]:
    """Tells two processes to save, each what it is to do, and then asks both what came of it."""
    program = Path(__file__).with_name("saving_program.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lightrft.__file__).parents[1])}
    command = [sys.executable, str(program)]
    runs = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603 (our own program)
        for _ in range(2)
    ]

    def told(run: subprocess.Popen[str]) -> str:
        assert run.stdout is not None
        return run.stdout.readline()

    def save(directory: Path, *requests: dict[str, object]) -> list[dict[str, str]]:
        for run, request in zip(runs, requests, strict=True):
            assert run.stdin is not None
            run.stdin.write(json.dumps({"save_dir": str(directory), **request}) + "\n")
            run.stdin.flush()
        return [json.loads(told(run)) for run in runs]

    try:
        assert [told(run) for run in runs] == ["ready\n"] * 2
        yield save
    finally:
        for run in runs:
            run.kill()
            run.communicate()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory of checkpoints in memory, where operations are quick and so often meet."""
    with scratch_directory() as scratch:
        yield scratch / "run"


def test_two_runs_with_steps_of_their_own_do_not_disturb_each_other(
    shared: Path, save_at_once: SaveAtOnce, checkpointing: CheckpointFunctions
) -> None:
    """Both save and remove old checkpoints at the same time; every save succeeds, and what stays verifies."""
    for number in range(1, 31):
        steps = [2 * number, 2 * number + 1]
        answers = save_at_once(shared, *({"step": step, "value": step, "max_num": 2} for step in steps))
        assert answers == [{"saved": f"{shared}/step-{step:08d}"} for step in steps]
        left = sorted(path.name for path in shared.iterdir())
        assert all(name.startswith("step-") for name in left), left
        assert left[-1] == f"step-{steps[-1]:08d}"
        assert_loads(checkpointing, shared, steps[-1])


@pytest.mark.parametrize("is_named", [True, False])
def test_two_runs_that_save_the_same_step_leave_one_checkpoint(
    shared: Path, save_at_once: SaveAtOnce, checkpointing: CheckpointFunctions, is_named: bool
) -> None:
    """One of them has saved, and the other is told in one line that the step exists; both may have, without a step."""
    refused = 0
    for number in range(1, 31):
        step = {"step": number} if is_named else {}
        answers = save_at_once(shared, *({**step, "value": 100 * number + run} for run in range(2)))
        winners = [run for run, answer in enumerate(answers) if "saved" in answer]
        assert len(winners) == 1 or (len(winners) == 2 and not is_named)
        for run, answer in enumerate(answers):
            if run in winners:
                model = nn.Linear(1, 1, bias=False)
                path = Path(answer["saved"])
                checkpointing.load_ckpt(model, shared, step=int(path.name[5:]))
                assert model.weight.item() == 100 * number + run
            else:
                refused += 1
                assert "exists already" in answer["refused"]
                assert "nothing is ever overwritten" in answer["refused"]
                assert "\n" not in answer["refused"]
        assert all(path.name.startswith("step-") for path in shared.iterdir())
    assert refused == 30 or not is_named


def test_a_run_that_lives_keeps_its_lock(shared: Path, save_at_once: SaveAtOnce) -> None:
    """While a writer holds its staging directory no other run removes it, and when it is gone the next save does."""
    leftover = shared / ".step-00000009.tmp-0123456789abcdef"
    leftover.mkdir(parents=True)
    lock = os.open(leftover, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    save_at_once(shared, {"step": 1, "value": 1}, {"step": 2, "value": 2})
    assert leftover.is_dir()
    os.close(lock)
    save_at_once(shared, {"step": 3, "value": 1}, {"step": 4, "value": 2})
    assert not leftover.exists()


@pytest.mark.parametrize("moment", ["read_manifest", "retire"])
def test_what_another_run_removes_first_is_gone_as_well(
    tmp_path: Path, checkpointing: CheckpointFunctions, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """An old checkpoint that goes between two looks of a save at it, or before it is removed, does not end the save."""
    module = importlib.import_module("lightrft.backends.checkpointing.retention")
    original = getattr(module, moment)

    def go_first(path: Path, **keywords: int) -> object:
        if moment == "retire":
            shutil.rmtree(path)
        found = original(path, **keywords)
        if moment == "read_manifest" and path.name == "step-00000001":
            shutil.rmtree(path)
        return found

    for step in (1, 2):
        save_small(checkpointing, tmp_path, step)
    monkeypatch.setattr(module, moment, go_first)
    assert save_small(checkpointing, tmp_path, 3, max_num=1).name == "step-00000003"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("in_background", [False, True])
def test_what_cannot_be_removed_is_named_beside_what_is_committed(
    tmp_path: Path, checkpointing: CheckpointFunctions, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    """A removal that fails, for want of something else, too, is no failed save, and keeps no other from its removal."""

    def fail(path: Path) -> None:
        if path.name != "step-00000002":
            raise FileNotFoundError(2, "No such file or directory", str(path / "gone"))
        shutil.rmtree(path)

    for step in (1, 2, 3):
        save_small(checkpointing, tmp_path, step)
    monkeypatch.setattr("lightrft.backends.checkpointing.retention.retire", fail)

    def save() -> None:
        with saving_thread(build_collectives(StrategyConfig(strategy="single"))) as background:
            save_small(checkpointing, tmp_path, 4, max_num=1, background=background if in_background else None)

    with pytest.raises(CheckpointError) as caught:
        save()
    older = ", ".join(f"{tmp_path}/step-{step:08d} (No such file or directory)" for step in (1, 3))
    assert str(caught.value) == (
        f"step=4 is committed, and older checkpoints cannot be removed: {older}; remove them by hand."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (1, 3, 4)]
    assert_loads(checkpointing, tmp_path, 4)
