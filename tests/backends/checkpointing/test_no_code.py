"""No file of a checkpoint carries code, whatever wrote it, and loading imports nothing that a file names."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import pickle
import pickletools
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save

import lightrft
from lightrft.strategy import get_strategy
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.subject import RunOnRanks, subject_of

FOLDER = Path(__file__).parent
MAKERS = [("single", 0, 1), ("fsdp2", 0, 1), ("fsdp2", 0, 2)] + [
    ("deepspeed", stage, world_size) for stage in range(4) for world_size in (1, 2)
]
ACTS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "EXT1", "EXT2", "EXT4"}
"""Opcodes that find a class or call it; a pickle without any of them holds plain data."""


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))  # workers get this path
    yield importlib.import_module("strategy_programs")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def ranks(programs: ModuleType, spawn: SpawnRank) -> Iterator[Callable[[int], RunOnRanks]]:
    del programs
    subject = subject_of(get_strategy, "strategy")
    with ExitStack() as stack:
        yield {n: stack.enter_context(processes(subject, n, timeout=90, spawn=spawn)) for n in (1, 2)}.__getitem__


def opcodes(content: bytes) -> list[str]:
    """Names of the opcodes from the beginning to the first STOP; none where that is no pickle."""
    try:
        return [opcode.name for opcode, _, _ in pickletools.genops(content)]
    except (ValueError, UnicodeDecodeError, EOFError):
        return []


def code_in(content: bytes) -> Iterator[str]:
    """Yield what in a file is a pickle: the whole, a member of an archive, or a part that acts."""
    if opcodes(content):
        yield "is a pickle"
    if zipfile.is_zipfile(io.BytesIO(content)):
        yield "is a zip archive"
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield from (f"{name} {words}" for words in code_in(archive.read(name)))
    yield from acting_parts(content)
    for digits in re.findall(rb'"((?:[0-9a-f]{2}){4,})"', content):  # as bytes stand in JSON
        yield from (f"{words}, in digits" for words in acting_parts(bytes.fromhex(digits.decode())))


def acting_parts(content: bytes) -> Iterator[str]:
    """Yield where a pickle begins that finds or calls something; from protocol 2 on its number comes first."""
    for found in re.finditer(rb"\x80[\x02-\x05]", content):
        acts = ACTS & set(opcodes(content[found.start() :]))
        if acts:
            yield f"has a pickle at {found.start()} ({', '.join(sorted(acts))})"


def test_code_is_found_wherever_it_stands() -> None:
    """Pickles of every protocol, archives of torch, and pickles inside of tensors and strings are all seen."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert list(code_in(pickle.dumps(Path, protocol=protocol)))
    archive = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, archive)
    assert any("data.pkl" in words for words in code_in(archive.getvalue()))
    legacy = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, legacy, _use_new_zipfile_serialization=False)
    assert list(code_in(legacy.getvalue()))
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        acting = pickle.dumps(Path("x"), protocol=protocol)
        assert list(code_in(save({"a": torch.frombuffer(bytearray(acting), dtype=torch.uint8)})))
        assert list(code_in(json.dumps({"a": acting.hex()}).encode()))
    assert list(code_in(save({"a": torch.arange(1000.0)}))) == []
    assert list(code_in(json.dumps({"a": bytes(range(256)).hex()}).encode())) == []


@pytest.mark.parametrize(("strategy", "zero_stage", "world_size"), MAKERS)
def test_no_file_of_any_strategy_carries_code(
    tmp_path: Path,
    programs: ModuleType,
    ranks: Callable[[int], RunOnRanks],
    strategy: str,
    zero_stage: int,
    world_size: int,
) -> None:
    """Every file is JSON or safetensors, and no byte of it begins a pickle that acts."""
    job = programs.Job(strategy=strategy, zero_stage=zero_stage, directories=[str(tmp_path)])
    ranks(world_size)(programs.write, job)
    files = sorted((tmp_path / "step-00000001").rglob("*"))
    assert len(files) == 5 + world_size
    for file in files:
        content = file.read_bytes()
        assert list(code_in(content)) == [], file.name
        if file.suffix == ".json":
            json.loads(content)
        else:
            assert file.suffix == ".safetensors"
            json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


EVIL = {
    "py/object": "evil.Thing",
    "__class__": "evil.Thing",
    "__reduce__": ["evil.call", []],
    "_target_": "evil.Thing",
    "!!python/object": "evil.Thing",
}


def forge(source: Path, target: Path, file: str, change: Callable[[dict[str, object]], object]) -> None:
    """Copy a checkpoint with another content of one file, to which its manifest agrees."""
    path = target / source.name
    path.mkdir(parents=True)
    for each in source.iterdir():
        (path / each.name).write_bytes(each.read_bytes())
    manifest = json.loads((path / "manifest.json").read_text())["content"]
    if file == "manifest.json":
        change(manifest)
    elif file.endswith(".safetensors"):
        content = (path / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        written = json.dumps(header).encode()
        written += b" " * (-len(written) % 8)
        (path / file).write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])
    else:
        value = json.loads((path / file).read_text())
        change(value)
        (path / file).write_text(json.dumps(value))
    if file != "manifest.json":
        content = (path / file).read_bytes()
        manifest["files"][file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    digest = hashlib.sha256((json.dumps(manifest) + "\n").encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"content": manifest, "sha256": digest}, indent=2) + "\n")


def tensor(dtype: str) -> dict[str, object]:
    return {"$tensor": {"dtype": dtype, "shape": [], "bytes": "0000803f"}}


FORGERIES: dict[str, tuple[str, Callable[[dict[str, object]], object]]] = {
    "client state": ("client_state.json", lambda state: state.update(EVIL)),
    "form": ("client_state.json", lambda state: state.update({"a": {"$evil.Thing": []}})),
    "tensor": ("client_state.json", lambda state: state.update({"a": tensor("evil.Thing")})),
    # torch imports these when they are asked for as its attributes
    "lazy module": ("client_state.json", lambda state: state.update({"a": tensor("_inductor")})),
    "another lazy module": ("client_state.json", lambda state: state.update({"a": tensor("_export")})),
    # and it warns of this name
    "name that warns": ("client_state.json", lambda state: state.update({"a": tensor("set_vital")})),
    "function": ("client_state.json", lambda state: state.update({"a": tensor("load")})),
    "cut tensor": ("client_state.json", lambda state: state.update({"a": tensor("float64")})),
    "option": ("actor.state.json", lambda state: state["optimizer"]["groups"][0]["options"].update(EVIL)),
    "schedule": ("actor.state.json", lambda state: state["scheduler"].update({"lr_lambdas": [EVIL]})),
    "state": ("actor.state.json", lambda state: state.update(EVIL)),
    "streams": ("rank-00000.random.json", lambda state: state.update({**EVIL, "python": "evil.Thing"})),
    "metadata": ("actor.model.safetensors", lambda header: header.update({"__metadata__": {"format": "evil.Thing"}})),
    "raw": (
        "actor.model.safetensors",
        lambda header: header.update(
            {"__metadata__": {"lightrft.raw": json.dumps({"count": {"dtype": "set_vital", "shape": [1]}})}}
        ),
    ),
    "manifest": (
        "manifest.json",
        lambda content: content.update({**EVIL, "strategy": "evil:build", "libraries": EVIL}),
    ),
}


def loaded(request: dict[str, object], folder: Path) -> dict[str, dict[str, object]]:
    """What a fresh process reports of loading."""
    done = subprocess.run(  # noqa: S603 (our own program)
        [sys.executable, str(FOLDER / "no_code_program.py")],
        input=json.dumps(request),
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(lightrft.__file__).parents[1]), str(FOLDER), str(folder)]),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize(("strategy", "zero_stage"), [("single", 0), ("fsdp2", 0), ("deepspeed", 3)])
def test_loading_imports_nothing_that_a_file_names(
    tmp_path: Path, programs: ModuleType, ranks: Callable[[int], RunOnRanks], strategy: str, zero_stage: int
) -> None:
    """No checkpoint imports, compiles or unpickles, also if it has names of modules and classes everywhere."""
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('evil-was-here').touch()\n")
    whole = tmp_path / "whole"
    ranks(1)(programs.write, programs.Job(strategy=strategy, zero_stage=zero_stage, directories=[str(whole)]))
    for name, (file, change) in FORGERIES.items():
        forge(whole / "step-00000001", tmp_path / name, file, change)
    directories = [str(whole), *(str(tmp_path / name) for name in FORGERIES)]
    request = {"strategy": strategy, "zero_stage": zero_stage, "directories": directories}
    found = loaded(request, tmp_path)
    assert found.pop("is_evil_imported") is False
    assert {name: seen["events"] for name, seen in found.items() if seen["events"]} == {}
    assert found[str(whole)]["error"] is None
    refused = {Path(name).name for name, seen in found.items() if seen["error"]}
    assert {"form", "tensor", "lazy module", "name that warns", "function", "cut tensor", "streams", "raw"} <= refused
    assert all("\n" not in str(seen["error"]) for seen in found.values())
    assert not (tmp_path / "evil-was-here").exists()
