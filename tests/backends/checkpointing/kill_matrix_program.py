# ruff: noqa: T201, PLR0915 (a program that prints its result; one story, told in one function)
"""Kills a writer at every file-system operation of a save, and looks at what is left. Run by test_kill_matrix.py.

The operations are found by tracing: every call of a C function of `posix`, `fcntl` or `_io` while a save runs. The
writer is a fork of this process, which runs one thread, so that torch is imported once. What the disk holds after one
operation is what it holds before the next, so killing before each and after the last covers every instant. With
"background" the save is written by a thread while the run goes on, and that thread is traced, too. Prints one JSON
object.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import nn

from lightrft.backends.checkpointing.background import saving_thread
from lightrft.backends.checkpointing.canonical import build_checkpointing
from lightrft.backends.checkpointing.live import build_live_access
from lightrft.backends.collectives.single import build_collectives
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.training import Trainable

KILLED = 137


def unwrap_model(model: nn.Module) -> nn.Module:
    return model


def make(value: float) -> Trainable:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model.weight.fill_(value)
    model(torch.ones(1, 2)).sum().backward()
    return Trainable(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3))


def is_file_operation(function: object) -> bool:
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or type(owner).__module__
    # these two are of `posix`, yet touch no file, and are called at times of their own
    return module in {"posix", "fcntl", "_io", "io"} and getattr(function, "__name__", "") not in {"urandom", "fspath"}


def trace(
    action: Callable[[], object],
    on_operation: Callable[[str], None],
    is_traced: Callable[[object], bool] = is_file_operation,
) -> None:
    def profile(frame: FrameType, event: str, function: object) -> None:
        del frame
        if event == "c_call" and is_traced(function):
            on_operation(str(getattr(function, "__name__", function)))

    threading.setprofile(profile)  # of threads that begin meanwhile
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def go_on(trainable: Trainable) -> list[float]:
    """Take the steps that follow a checkpoint, and return where they lead."""
    model, optimizer, scheduler = trainable
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.rand(1, 2)) - 1).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return [value for parameter in model.parameters() for value in parameter.flatten().tolist()]


def in_child(action: Callable[[], object]) -> int:
    process = os.fork()
    if process == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:  # noqa: BLE001 (the parent sees the status)
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def fingerprint(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*"), key=lambda p: re.sub(r"tmp-[0-9a-f]{16}", "tmp", str(p))):
        content = path.read_bytes() if path.is_file() else b"directory"
        name = re.sub(r"tmp-[0-9a-f]{16}", "tmp", str(path.relative_to(directory)))
        digest.update(f"{name} {hashlib.sha256(content).hexdigest()} ".encode())
    return digest.hexdigest()


def main(root: Path, *, in_background: bool) -> None:
    torch.set_num_threads(1)
    collectives = build_collectives(StrategyConfig(strategy="single"))
    collectives.setup_distributed()
    functions = build_checkpointing(collectives=collectives, access=build_live_access(unwrap_model))
    base = root / "base"
    for step in (1, 2):
        functions.save_ckpt(make(float(step)), base, step=step, client_state={"value": step})
    # a writer that was killed before, so that cleaning up is killed too
    leftover = base / ".step-00000003.tmp-0123456789abcdef"
    (leftover / "content").mkdir(parents=True)
    (leftover / "lightrft.json").touch()
    (leftover / "content" / "model.model.safetensors").write_bytes(b"half")

    stream = torch.get_rng_state()
    uninterrupted: dict[str, list[float]] = {}

    def save(directory: Path) -> None:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 (numpy's global stream)
        torch.set_rng_state(stream)  # equal bytes for equal operations: a state of the disk is looked at once
        trainable = make(3.0)
        # retention removes step 1 after the commit, so that removal is killed too
        if in_background:
            with saving_thread(collectives) as background:
                functions.save_ckpt(
                    trainable, directory, step=3, client_state={"value": 3}, max_num=2, background=background
                )
                uninterrupted["after 3"] = go_on(trainable)
        else:
            functions.save_ckpt(trainable, directory, step=3, client_state={"value": 3}, max_num=2)
            uninterrupted["after 3"] = go_on(trainable)

    def check(directory: Path) -> list[int]:
        committed = sorted(int(path.name[5:]) for path in directory.glob("step-*"))
        assert functions.latest_ckpt(directory) == committed[-1]
        for step in (*committed, None):
            live = make(0.0)
            loaded = functions.load_ckpt(live, directory, step=step)
            value = float(loaded.step)
            assert loaded.client_state == {"value": loaded.step}
            assert live.model.get_parameter("weight").tolist() == [[value, value]]
            if loaded.step == 3:
                assert go_on(live) == uninterrupted["after 3"]
        assert loaded.step == committed[-1]
        functions.save_ckpt(make(4.0), directory, step=4, client_state={"value": 4})
        assert all(path.name.startswith("step-") for path in directory.iterdir()), list(directory.iterdir())
        return committed

    shutil.copytree(base, root / "warm")  # what is imported on first use is imported here, or traces would differ
    save(root / "warm")
    check(root / "warm")
    operations: list[str] = []
    shutil.copytree(base, root / "traced")
    log = root / "operations.json"

    def traced() -> None:
        states: list[str] = []

        def note(name: str) -> None:
            operations.append(name)
            states.append(fingerprint(root / "traced"))

        trace(lambda: save(root / "traced"), note)
        log.write_text(json.dumps([operations, [*states, fingerprint(root / "traced")]]))

    assert in_child(traced) == 0
    operations, states = json.loads(log.read_text())
    seen: dict[str, list[int]] = {}
    results: list[list[int]] = []
    for kill_at in range(len(operations) + 1):
        if states[kill_at] in seen:  # the operation before changed nothing on the disk (a look, a sync, a lock)
            results.append(seen[states[kill_at]])
            continue
        directory = root / f"killed-{kill_at}"
        shutil.copytree(base, directory)
        count = 0

        def kill(name: str, kill_at: int = kill_at) -> None:
            nonlocal count
            if count == kill_at:
                os._exit(KILLED)
            assert name == operations[count], (kill_at, count, name, operations[count])
            count += 1

        status = in_child(lambda directory=directory, kill=kill: trace(lambda: save(directory), kill))
        assert status == (KILLED if kill_at < len(operations) else 0), (kill_at, status)
        assert fingerprint(directory) == states[kill_at], kill_at
        seen[states[kill_at]] = check(directory)
        results.append(seen[states[kill_at]])
        shutil.rmtree(directory)
    print(json.dumps({"operations": operations, "committed": results, "num_states": len(seen)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), in_background="background" in sys.argv[2:])
