from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import safetensors
import torch
from torch import nn

import lightrft
from lightrft.backends.checkpointing.access import ModelState, Part
from lightrft.backends.checkpointing.canonical import CheckpointFunctions, build_checkpointing
from lightrft.backends.checkpointing.durable import commit, staging, write_file
from lightrft.backends.checkpointing.live import build_live_access
from lightrft.backends.checkpointing.manifest import read_manifest
from lightrft.backends.checkpointing.retention import Retention, surplus
from lightrft.backends.collectives.single import build_collectives
from lightrft.errors import CheckpointError, ConfigError, UnsupportedError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.training import Trainable

Make = Callable[..., Trainable]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_steps_count_on_and_none_is_saved_twice(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """The first step is 1, the next one more than the newest; one that exists is refused and stays as it was."""
    model = nn.Linear(1, 1)
    assert checkpointing.latest_ckpt(tmp_path / "run") is None
    assert checkpointing.save_ckpt(model, tmp_path / "run").name == "step-00000001"
    assert checkpointing.save_ckpt(model, tmp_path / "run", step=10**9).name == "step-1000000000"
    assert checkpointing.save_ckpt(model, tmp_path / "run").name == "step-1000000001"
    assert checkpointing.latest_ckpt(tmp_path / "run") == 10**9 + 1
    manifest = (tmp_path / "run" / "step-00000001" / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"step=1 exists already .*; nothing is ever overwritten"):
        checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path / "run", step=1)
    assert (tmp_path / "run" / "step-00000001" / "manifest.json").read_bytes() == manifest
    assert names(tmp_path / "run") == ["step-00000001", "step-1000000000", "step-1000000001"]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"step": -1}, "step=-1 is not a whole number of at least 0"),
        ({"step": True}, "step=True is not a whole number"),
        ({"step": 1.0}, "step=1.0 is not a whole number"),
        ({"max_num": 0}, "max_num=0 is not a whole number of at least 1"),
        ({"keep_every": -1}, "keep_every=-1 is not a whole number of at least 0"),
        ({"keep_best": True}, "keep_best=True is not a whole number of at least 0"),
        ({"max_mem": -0.5}, "max_mem=-0.5 is not a finite number of at least 0"),
        ({"max_mem": float("inf")}, "max_mem=inf is not a finite number"),
        ({"max_mem": "3"}, "max_mem='3' is not a finite number"),
        ({"metric": float("nan")}, "metric=nan is not a finite number; use one, or None"),
        ({"metric": True}, "metric=True is not a finite number"),
        ({"metric": 10**400}, "metric=10+ is not a finite number"),
        ({"scheduler": object()}, "scheduler is given without its optimizer"),
        ({"client_state": [1]}, r"client_state=\[1\] is not a mapping"),
        (
            {"client_state": {"sampler": {"rng": torch.zeros(2)}}},
            r"client_state.sampler.rng is a Tensor, which JSON cannot",
        ),
        ({"client_state": {"a": [0, (1, 2)]}}, r"client_state.a\[1\] is a tuple"),
        ({"client_state": {"a": {3: 1}}}, "client_state.a has the key 3, a int; use str keys"),
        ({"client_state": {"a": b""}}, "client_state.a is a bytes"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, checkpointing: CheckpointFunctions, call: dict[str, object], reason: str
) -> None:
    """A wrong argument names itself and its path, and no directory is made."""
    with pytest.raises(ConfigError, match=reason):
        checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path / "run", **call)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_client_state_that_holds_itself_is_refused(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """A state without end is refused in words."""
    state: dict[str, object] = {}
    state["self"] = state
    with pytest.raises(ConfigError, match="holds itself"):
        checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path, client_state=state)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({}, "is no model; pass a Module"),
        (3, "model=3 is no model"),
        ({"a/b": nn.Linear(1, 1)}, "'a/b' is no name"),
        ({"..": nn.Linear(1, 1)}, "'..' is no name"),
        ({"": nn.Linear(1, 1)}, "'' is no name"),
        ({"é": nn.Linear(1, 1)}, "is no name"),
        ({3: nn.Linear(1, 1)}, "is no name"),
        ({"a": nn.Linear(1, 1), "A": nn.Linear(1, 1)}, "'A' differs from 'a' in case alone"),
        ({"a": 3}, r"model\['a'\] is a int"),
    ],
)
def test_wrong_models_are_refused(
    tmp_path: Path, checkpointing: CheckpointFunctions, model: object, reason: str
) -> None:
    """What is no model, and a name that is no file name, is refused."""
    with pytest.raises(ConfigError, match=reason):
        checkpointing.save_ckpt(model, tmp_path)  # type: ignore[arg-type]


def with_buffer(tensor: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.register_buffer("odd", tensor)
    return model


class WithExtraState(nn.Module):
    def get_extra_state(self) -> object:
        return {"a": 1}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (with_buffer(torch.eye(2).to_sparse()), r"model.odd is sparse"),
        (with_buffer(torch.empty(2, device="meta")), r"model.odd is on the meta device"),
        (nn.Sequential(WithExtraState()), r"model.0 \(WithExtraState\) keeps extra state"),
    ],
)
def test_tensors_without_plain_bytes_are_refused(
    tmp_path: Path, checkpointing: CheckpointFunctions, model: nn.Module, reason: str
) -> None:
    """What cannot be written as it is is refused and named, and nothing is left behind."""
    with pytest.raises(UnsupportedError, match=reason):
        checkpointing.save_ckpt(model, tmp_path)
    assert names(tmp_path) == []


class Wrapper(torch.Tensor):
    """A tensor that holds others, as a shard of a distributed one does."""

    @classmethod
    def __torch_dispatch__(cls, *_: object) -> None:
        raise AssertionError("nothing is computed")


def test_wrapped_tensors_are_refused(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """A tensor subclass that holds others is refused: its bytes are not its values."""
    model = with_buffer(torch.Tensor._make_wrapper_subclass(Wrapper, (2,)))
    with pytest.raises(UnsupportedError, match=r"model.odd is a Wrapper, which wraps other tensors"):
        checkpointing.save_ckpt(model, tmp_path)


def test_optimizers_that_cannot_be_named_are_refused(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """An optimizer of another model, state of no parameter, keys with dots and values of other types are refused."""
    model = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=r"model.optimizer.param_groups\[0\] holds a tensor that is no parameter"):
        checkpointing.save_ckpt(model, tmp_path, optimizer=torch.optim.AdamW(nn.Linear(1, 1).parameters()))
    optimizer = torch.optim.AdamW(model.parameters())
    for state, reason in (
        ({"other": {}}, "belongs to no parameter"),
        ({model.weight: {"a.b": 1}}, "a key that is no identifier"),
        ({model.weight: {"a": object()}}, r"model.optimizer.state\['weight'\]\['a'\] is a object"),
    ):
        optimizer.state.clear()
        optimizer.state.update(state)
        with pytest.raises(ConfigError, match=reason):
            checkpointing.save_ckpt(model, tmp_path, optimizer=optimizer)
    with pytest.raises(ConfigError, match="a Trainable brings its own"):
        checkpointing.save_ckpt(Trainable(model, optimizer, None), tmp_path, optimizer=optimizer)


def test_retention_keeps_the_newest_and_never_touches_what_is_not_ours(
    tmp_path: Path, checkpointing: CheckpointFunctions
) -> None:
    """max_num counts and removes real directories with our manifest alone: no links, other names or other manifests."""
    model = nn.Linear(1, 1)
    for step in (1, 2, 3):
        checkpointing.save_ckpt(model, tmp_path, step=step)
    for name in ("step-00000000", "step-0", "step-00000009x", "notes", ".step-00000001.tmp-xyz"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("precious")
    (tmp_path / "step-00000000" / "manifest.json").write_text('{"mine": true}')
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "elsewhere" / "step")
    (tmp_path / "step-00000005").symlink_to(tmp_path / "elsewhere" / "step")
    (tmp_path / "step-00000006").write_text("a file")
    checkpointing.save_ckpt(model, tmp_path, step=4, max_num=2)
    assert [name for name in names(tmp_path) if name.startswith("step-")] == [
        "step-0",
        "step-00000000",
        "step-00000003",
        "step-00000004",
        "step-00000005",
        "step-00000006",
        "step-00000009x",
    ]
    assert all((tmp_path / name / "mine").exists() for name in ("step-00000000", "step-0", "notes"))
    assert (tmp_path / ".step-00000001.tmp-xyz" / "mine").exists()
    assert (tmp_path / "elsewhere" / "step" / "manifest.json").exists()


def test_retention_never_removes_what_was_just_saved(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """Newer steps of an earlier run do not push out the step that this run saved."""
    model = nn.Linear(1, 1)
    for step in (10, 11):
        checkpointing.save_ckpt(model, tmp_path, step=step)
    checkpointing.save_ckpt(model, tmp_path, step=5, max_num=1)
    assert names(tmp_path) == ["step-00000005", "step-00000011"]


def test_a_metric_is_kept_with_the_checkpoint(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """The manifest holds it bit for bit, as a number, or null where nobody gave one."""
    for step, metric in enumerate((None, 0.1, -0.0, 5e-324, 3)):
        path = checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path, step=step, metric=metric)
        written = json.loads((path / "manifest.json").read_text())["content"]["metric"]
        assert repr(written) == repr(None if metric is None else float(metric))
        assert read_manifest(path, step=step).metric == metric


def test_retention_by_size_counts_every_byte_to_the_last(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """Three checkpoints stay where max_mem is their total, and two where it is a byte less; the newest stays anyway."""
    model = nn.Linear(1, 1)
    paths = [checkpointing.save_ckpt(model, tmp_path, step=step) for step in range(4)]
    total = sum(file.stat().st_size for path in paths[1:] for file in path.iterdir())
    assert list(surplus(tmp_path, Retention(max_mem=total / 1e9))) == [0]
    assert list(surplus(tmp_path, Retention(max_mem=(total - 1) / 1e9))) == [0, 1]
    assert list(surplus(tmp_path, Retention(max_mem=0))) == [0, 1, 2]
    assert list(surplus(tmp_path, Retention(max_mem=0, keep_every=2))) == [1]
    assert list(surplus(tmp_path, Retention(max_num=1, max_mem=total / 1e9), just_saved=1)) == [0, 2]
    assert surplus(tmp_path, Retention(keep_best=1)) == surplus(tmp_path / "none", Retention(max_num=1)) == {}
    assert len(names(tmp_path)) == 4


def test_the_best_checkpoints_stay(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """The largest metric wins, of equal ones the newer; a checkpoint without a metric never does."""
    for step, metric in enumerate((0.5, 0.75, None, 0.75, -1.0, 0.25)):
        checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path, step=step, metric=metric, max_num=1, keep_best=1)
    assert names(tmp_path) == ["step-00000003", "step-00000005"]
    checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path, step=6, max_num=1, keep_best=5)
    assert names(tmp_path) == ["step-00000003", "step-00000005", "step-00000006"]


def test_only_leftovers_of_dead_writers_are_removed(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """A staging directory goes if its name and its content are exactly ours and no living writer holds its lock."""
    removed = [".step-00000001.tmp-0123456789abcdef", ".step-00000002.tmp-0123456789abcdef"]
    (tmp_path / removed[0]).mkdir()  # killed before the marker
    (tmp_path / removed[1] / "content").mkdir(parents=True)
    (tmp_path / removed[1] / "lightrft.json").touch()
    foreign, alive, linked = (f".step-0000000{n}.tmp-0123456789abcdef" for n in (3, 4, 5))
    (tmp_path / foreign).mkdir()
    (tmp_path / foreign / "lightrft.json").touch()
    (tmp_path / foreign / "mine").touch()
    (tmp_path / alive).mkdir()
    (tmp_path / linked).symlink_to(tmp_path / removed[1])
    unmarked = tmp_path / ".step-00000006.tmp-0123456789abcdef"
    (unmarked / "content").mkdir(parents=True)
    lock = os.open(tmp_path / alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path, step=7)
    finally:
        os.close(lock)
    assert names(tmp_path) == [foreign, alive, linked, unmarked.name, "step-00000007"]


def test_two_writers_of_one_step_end_with_one_checkpoint(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """Of two staged checkpoints of one step the first is committed, the second gets an error and leaves nothing."""
    target = tmp_path / "step-00000001"
    with staging(target) as late:
        checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path, step=1)
        before = (target / "manifest.json").read_bytes()
        (late / "manifest.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"step-00000001 exists already; nothing is ever overwritten"):
            commit(late, target)
    (tmp_path / "file").touch()
    with staging(tmp_path / "file") as late, pytest.raises(CheckpointError, match="exists already"):
        commit(late, tmp_path / "file")
    with staging(tmp_path / "other") as late, pytest.raises(FileNotFoundError):
        commit(late, tmp_path / "none" / "other")
    assert (target / "manifest.json").read_bytes() == before
    assert names(tmp_path) == ["file", "step-00000001"]


def test_many_threads_saving_into_one_directory_lose_nothing(
    tmp_path: Path, checkpointing: CheckpointFunctions
) -> None:
    """Writers that save at the same time each commit their own step."""
    threads = [
        threading.Thread(target=checkpointing.save_ckpt, args=(nn.Linear(1, 1), tmp_path), kwargs={"step": step})
        for step in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == [f"step-0000000{step}" for step in range(4)]
    for step in range(4):
        assert checkpointing.load_ckpt(nn.Linear(1, 1), tmp_path, step=step).step == step


def test_an_unwritable_directory_is_one_clear_line(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """A path below a file cannot be written, by root neither."""
    (tmp_path / "file").touch()
    for call in (checkpointing.save_ckpt, checkpointing.save_model):
        with pytest.raises(CheckpointError, match=r"_dir='.*file/run' failed: Not a directory") as caught:
            call(nn.Linear(1, 1), tmp_path / "file" / "run")
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_clear_line_and_harms_nothing(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """When the disk is full a save ends with one line, leaves nothing behind, and the earlier checkpoint loads."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(  # noqa: S603 (a fixed command)
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)],  # noqa: S607 (a fixed command)
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        checkpointing.save_ckpt(nn.Linear(1, 1), disk)
        for call in (checkpointing.save_ckpt, checkpointing.save_model):
            with pytest.raises(CheckpointError, match=r"failed: No space left on device; free space") as caught:
                call(nn.Linear(400, 400), disk if call is checkpointing.save_ckpt else disk / "model")
            assert "\n" not in str(caught.value)
        assert names(disk) == ["step-00000001"]
        assert checkpointing.load_ckpt(nn.Linear(1, 1), disk).step == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)  # noqa: S603, S607 (a fixed command)


def test_a_limit_on_file_sizes_is_one_clear_line(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """A write that the system cuts short (here by a limit of 100 kB a file) ends with one line, and nothing is left."""
    checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"failed: File too large; free space") as caught:
            checkpointing.save_ckpt(nn.Linear(400, 400), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]


def test_a_directory_removed_while_writing_is_one_clear_line(tmp_path: Path) -> None:
    """A directory that vanishes during a save ends it with one line."""
    access = build_live_access(lambda model: model)
    model = nn.Linear(1, 1, bias=False)

    def model_state(model: nn.Module, *, owner: str) -> ModelState:
        def remove_and_read() -> Part:
            shutil.rmtree(tmp_path / "run")
            return tensor.part()

        state = access.model_state(model, owner=owner)
        tensor = state.tensors["weight"]
        return attrs.evolve(state, tensors={"weight": attrs.evolve(tensor, part=remove_and_read)})

    functions = build_checkpointing(
        collectives=build_collectives(StrategyConfig(strategy="single")),
        access=attrs.evolve(access, model_state=model_state),
    )
    with pytest.raises(CheckpointError, match=r"failed: No such file or directory .*; free space"):
        functions.save_ckpt(model, tmp_path / "run")


def test_file_systems_without_locks_work(
    tmp_path: Path, checkpointing: CheckpointFunctions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no locks, saving works, and leftovers stay since nobody knows whether their writers live."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, f"no locks ({descriptor}, {operation})")

    monkeypatch.setattr(fcntl, "flock", refuse)
    leftover = tmp_path / ".step-00000001.tmp-0123456789abcdef"
    leftover.mkdir()
    checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path, step=1)
    assert names(tmp_path) == [leftover.name, "step-00000001"]


def test_every_file_and_name_is_synced_before_and_the_parent_after_the_rename(
    tmp_path: Path, checkpointing: CheckpointFunctions, make_trainable: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the rename every file of the checkpoint and its directory were synced; after it, the parent."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(descriptor: int) -> None:
        events.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def traced_rename(source: str, target: str) -> None:
        events.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    path = checkpointing.save_ckpt(make_trainable(0), tmp_path / "a" / "b")
    at = events.index(("rename", str(path)))
    synced = [Path(name) for kind, name in events[:at] if kind == "fsync"]
    assert {file.name for file in path.iterdir()} <= {file.name for file in synced}
    assert [file.name for file in synced].count("model.model.safetensors") == 1
    assert synced[-1].name == "content"
    assert {tmp_path, tmp_path / "a"} <= set(synced)
    assert ("fsync", str(path.parent)) in events[at:]


def test_large_tensors_are_digested_while_they_are_written(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """A tensor of several blocks, digested in a second thread, verifies and comes back."""
    torch.manual_seed(0)
    model, other = nn.Linear(1500, 1500), nn.Linear(1500, 1500)
    checkpointing.save_ckpt(model, tmp_path)
    checkpointing.load_ckpt(other, tmp_path)
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize("moment", ["open", "flock"])
def test_a_directory_that_another_writer_took_for_a_leftover_is_made_again(
    tmp_path: Path, checkpointing: CheckpointFunctions, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A staging directory that is removed between its making and its lock costs its writer a second try, no more."""
    module = {"open": os, "flock": fcntl}[moment]
    original = getattr(module, moment)
    removed: list[Path] = []

    def remove_first(*args: object, **keywords: object) -> object:
        for path in tmp_path.glob(".step-*"):
            if not removed:
                removed.append(path)
                path.rmdir()
        return original(*args, **keywords)

    monkeypatch.setattr(module, moment, remove_first)
    checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path, step=1)
    assert len(removed) == 1
    assert names(tmp_path) == ["step-00000001"]


def test_the_manifest_says_what_wrote_it(saved: Path) -> None:
    """A manifest names the versions of lightrft, Python, safetensors and torch, for whoever cannot read the rest."""
    written = json.loads((saved / "step-00000002" / "manifest.json").read_text())
    assert written["content"]["libraries"] == {
        "lightrft": lightrft.__version__,
        "python": platform.python_version(),
        "safetensors": safetensors.__version__,
        "torch": torch.__version__,
    }


def test_a_file_that_exists_is_not_written(tmp_path: Path) -> None:
    """Writing a file refuses one that is there, and leaves it as it is."""
    path = tmp_path / "file"
    record = write_file(path, [b"ab", memoryview(b"c")])
    assert (record.size, record.sha256, path.read_bytes()) == (3, hashlib.sha256(b"abc").hexdigest(), b"abc")
    with pytest.raises(FileExistsError):
        write_file(path, [b"other"])
    assert path.read_bytes() == b"abc"


def test_a_file_of_random_streams_says_whose_they_are(saved: Path) -> None:
    """The streams of a rank carry its number and that of all ranks."""
    written = json.loads((saved / "step-00000002" / "rank-00000.random.json").read_text())
    assert (written["rank"], written["world_size"]) == (0, 1)
