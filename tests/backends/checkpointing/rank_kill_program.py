"""Kills one of two ranks, or both, at every file-system operation of a save that changes something.

The operations are found by tracing, as in `kill_matrix_program`, less those that look: torch looks at its sources when
it likes. The ranks are forks of this process, which runs one thread, so that torch is imported once; each pair meets
over gloo. Left out is what is rank 0's alone and is killed there: retention, and each of many writes of one file. With
"background" the saves are written by a thread of each rank, over a second gloo, while the ranks train on.
Writes result.json. Run by test_rank_kills.py.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import attrs
import numpy as np
import torch
import torch.distributed as dist
from kill_matrix_program import trace
from strategy_programs import Job, built, train

from lightrft.config import EngineConfig, StrategyConfig
from lightrft.strategy.background import background_saves
from lightrft.strategy.build import get_strategy
from lightrft.testing.subject import Rank

WORLD_SIZE = 2
SECONDS = 60  # after which a collective gives up; nobody may have to wait for that

Words: TypeAlias = "dict[int, str]"
"""What each rank said last; a killed one says nothing."""


@attrs.frozen(kw_only=True)
class Kill:
    """Who is killed: the rank that counts its operations, or all, before operation number `at`."""

    rank: int
    at: int
    takes_all: bool


@attrs.frozen(kw_only=True, eq=False)
class Save:
    """A save by all ranks.

    Attributes:
        job: strategy and stage.
        directory: where to.
        steps: which.
        store: where the ranks meet; a file that is not there.
        kill: who dies in the last step; None for nobody.
        log: file where each rank notes its operations of the last step, with what it had on the disk; None for none.
        in_background: whether a thread writes.
    """

    job: Job
    directory: Path
    steps: tuple[int, ...]
    store: Path
    kill: Kill | None = None
    log: Path | None = None
    in_background: bool = False


def rank_of(number: int, world_size: int, directory: Path) -> Rank:
    return Rank(
        rank=number,
        world_size=world_size,
        directory=directory,
        build=get_strategy,
        config=StrategyConfig(),
        engine=EngineConfig(),
    )


def run_rank(number: int, save: Save) -> str:
    """Save as one of two ranks; what is saved depends on the step alone."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(save.store), WORLD_SIZE),
        rank=number,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=SECONDS),
    )
    rank = rank_of(number, WORLD_SIZE, save.directory)
    for step in save.steps:
        strategy, trainable = built(rank, attrs.evolve(save.job, seed=step))
        train(strategy, trainable, rank, range(1))
        seed_streams(step + 10 * number)
        strategy.barrier()  # nobody writes before everybody has come this far

        def act() -> None:
            if not save.in_background:
                strategy.save_ckpt({"actor": trainable}, save.directory, step=step)  # noqa: B023 (called at once)
                return
            with background_saves(strategy) as background:  # noqa: B023
                strategy.save_ckpt({"actor": trainable}, save.directory, step=step, background=background)  # noqa: B023
                # a rank that trains on meets the loss of another there, too, and what it says must be the save's
                background.wait()

        if step == save.steps[-1] and save.kill is not None:
            trace(act, killer(number, save.kill), may_change)
        elif step == save.steps[-1] and save.log is not None:
            trace_into(log_of(save.log, number), act, number, save.directory)
        else:
            act()
    return "saved"


def seed_streams(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (numpy's global stream)
    torch.manual_seed(seed)


def may_change(function: object) -> bool:
    return getattr(function, "__module__", None) == "posix" and getattr(function, "__name__", "") not in {
        *("fspath", "getpid", "urandom"),
        *("fstat", "listdir", "lstat", "scandir", "stat"),
    }


def killer(number: int, kill: Kill) -> Callable[[str], None]:
    seen: list[str] = []

    def on_operation(name: str) -> None:
        if number == kill.rank and len(seen) == kill.at:
            os.killpg(0, signal.SIGKILL) if kill.takes_all else os.kill(os.getpid(), signal.SIGKILL)
        seen.append(name)

    return on_operation


def trace_into(log: Path, act: Callable[[], None], number: int, directory: Path) -> None:
    operations: list[tuple[str, str]] = []
    # the other rank works at its own pace, on a file of its own
    pattern = re.compile(r"(?!.*/rank-00001)" if number == 0 else r".*/rank-00001")

    def note(name: str) -> None:
        operations.append((name, fingerprint(directory, pattern, is_rough=True)))

    trace(act, note, may_change)
    note("the end")
    log.write_text(json.dumps([operations, sorted(sys.modules)]))


def log_of(log: Path, number: int) -> Path:
    return log.with_name(f"{log.name}-{number}")


def run_ranks(save: Save) -> Words:
    """Run a save on two forks of this process, which are a process group of their own."""
    out, into = os.pipe()
    first = os.fork()
    if first == 0:
        os.setsid()
        os.close(out)
        number = 0 if os.fork() else 1
        try:
            words = run_rank(number, save)
        except BaseException as error:  # noqa: BLE001 (it is looked at)
            words = f"{type(error).__name__}: {error}"
        os.write(into, json.dumps([number, words]).encode() + b"\n")
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        lines = pipe.read().splitlines()  # until both are gone
    os.waitpid(first, 0)
    return dict(json.loads(line) for line in lines)


def fingerprint(directory: Path, pattern: re.Pattern[str] = re.compile(""), *, is_rough: bool = False) -> str:
    """Return a digest of what stands in a directory, of the paths that match; of rough ones, whether it is empty."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*"), key=plain_name):
        if pattern.match(str(path)):
            content = path.read_bytes() if path.is_file() else b"directory"
            words = str(bool(content)) if is_rough else hashlib.sha256(content).hexdigest()
            digest.update(f"{plain_name(path.relative_to(directory))} {words} ".encode())
    return digest.hexdigest()


def plain_name(path: Path) -> str:
    return re.sub(r"tmp-[0-9a-f]{16}", "tmp", str(path))


def moments(log: Path, number: int) -> list[int]:
    """Return the operations before which a rank is killed: the last before each change of the disk; then "never"."""
    prints = [state for _, state in json.loads(log_of(log, number).read_text())[0]]
    return [at for at in range(len(prints) - 1) if prints[at] != prints[at + 1]] + [len(prints) - 1]


def check(directory: Path, reference: Path) -> list[int]:
    """Return the committed steps, each of which has the bytes of an uninterrupted save; load, and save once more."""
    committed = sorted(int(path.name[5:]) for path in directory.glob("step-*"))
    for step in committed:
        name = f"step-{step:08d}"
        assert fingerprint(directory / name) == fingerprint(reference / name), (directory, step)
    strategy, trainable = built(rank_of(0, 1, directory), Job(strategy="single", zero_stage=0, directories=[], seed=9))
    assert strategy.load_ckpt({"actor": trainable}, directory).step == committed[-1]
    strategy.save_ckpt({"actor": trainable}, directory, step=4)
    assert strategy.latest_ckpt(directory) == 4
    assert all(path.name.startswith("step-") for path in directory.iterdir()), list(directory.iterdir())
    strategy.teardown()
    return committed


def import_again(modules: list[str]) -> None:
    """Import what ranks imported on first use, or every pair of them would."""
    for module in modules:
        if module.startswith(("torch.", "deepspeed.", "lightrft.")):
            with suppress(ImportError):
                importlib.import_module(module)


def main(root: Path, name: str, stage: int, *, in_background: bool) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    log, reference, base, killed = (root / each for each in ("log", "reference", "base", "killed"))
    save = Save(
        job=Job(strategy=name, zero_stage=stage, directories=[]),
        directory=reference,
        steps=(1, 2, 3),
        store=root / "store",
        log=log,
        in_background=in_background,
    )
    assert run_ranks(save) == {0: "saved", 1: "saved"}
    import_again(json.loads(log_of(log, 0).read_text())[1])
    gc.freeze()  # or forks would copy the memory of all modules with every collection, which DeepSpeed makes often
    shutil.copytree(reference, base)
    shutil.rmtree(base / "step-00000003")
    shutil.copytree(base, root / "traced")
    again = attrs.evolve(save, directory=root / "traced", steps=(3,), store=root / "store-traced")
    assert run_ranks(again) == {0: "saved", 1: "saved"}
    assert fingerprint(root / "traced") == fingerprint(reference)
    result: list[dict[str, object]] = []
    kills = [Kill(rank=1, at=at, takes_all=False) for at in moments(log, 1)]
    # one way of dying at a time: the other strategy, which takes the same path, dies the other way
    kills += [
        Kill(rank=0, at=at, takes_all=number % 2 == (name == "fsdp2")) for number, at in enumerate(moments(log, 0))
    ]
    for kill in kills:
        shutil.copytree(base, killed)
        said = run_ranks(attrs.evolve(again, directory=killed, store=root / f"store-{len(result)}", kill=kill))
        result.append({**attrs.asdict(kill), "said": said, "committed": check(killed, reference)})
        shutil.rmtree(killed)
    names = [[name for name, _ in json.loads(log_of(log, rank).read_text())[0]] for rank in range(WORLD_SIZE)]
    (root / "result.json").write_text(json.dumps({"operations": names, "kills": result}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), in_background="background" in sys.argv[4:])
