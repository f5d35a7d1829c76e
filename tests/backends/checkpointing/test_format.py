"""Another tool reads what we write: `format_reader` follows docs/checkpoints.md and shares no code with the library."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightrft
from lightrft.backends.checkpointing import lossless
from lightrft.backends.checkpointing.canonical import CheckpointFunctions
from lightrft.backends.training import window
from lightrft.config import StrategyConfig
from lightrft.loops.state import RunState
from lightrft.strategy import get_strategy
from lightrft.strategy.protocols import Trainable
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.replicated import build_gloo
from lightrft.testing.subject import subject_of

PAGE = Path(lightrft.__file__).parents[1] / "docs" / "checkpoints.md"
FOLDER = Path(__file__).parent
KNOWN = (
    *("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64"),
)
UNKNOWN = ("complex64", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
"""Dtypes that safetensors of the oldest supported version cannot hold."""
STATE = {
    "big": [2**70, -(2**63), 2**63 - 1, -(2**63) + 1, 0],
    "floats": [0.1, 1e300, 5e-324, -0.0, 1.0, math.inf, -math.inf],
    "$odd": {"$tuple": [None, True, {"": []}]},
    "é": "ü\n",
}


@pytest.fixture(scope="module")
def programs() -> Iterator[Callable[[str], ModuleType]]:
    sys.path.insert(0, str(FOLDER))  # workers get this path
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def reader(programs: Callable[[str], ModuleType]) -> ModuleType:
    return programs("format_reader")


def array_of(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).detach().numpy()


def assert_same_arrays(found: dict[str, np.ndarray], expected: dict[str, Tensor]) -> None:
    """Names, dtypes, shapes and bytes are equal."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        array = array_of(tensor)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def test_the_reader_is_independent() -> None:
    """It imports nothing but the standard library and numpy."""
    tree = ast.parse((FOLDER / "format_reader.py").read_text())
    imported = {
        name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    imported |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


def test_the_manifest_of_the_page_has_its_own_digest() -> None:
    """The example of the page obeys the rule of the page."""
    block = re.search(r"### manifest\.json\n\n```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    manifest = json.loads(block[1])
    assert hashlib.sha256((json.dumps(manifest["content"]) + "\n").encode()).hexdigest() == manifest["sha256"]


def test_the_page_has_every_field_and_every_form(saved: Path, reader: ModuleType) -> None:
    """Fields of the manifest and of the records, and forms of values, are those of the page."""
    page = PAGE.read_text()
    sections = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##)", page, re.DOTALL | re.MULTILINE))

    def fields(section: str) -> set[str]:
        cells = re.findall(r"^\| (`.+?) \|", sections[section], re.MULTILINE)
        return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}

    found = reader.read_checkpoint(saved)
    assert fields("manifest.json") == found["manifest"].keys()
    assert fields("rank-RRRRR.random.json") == {*found["rank-00000.random.json"], "cuda"}
    record = found["model.state.json"]
    assert fields("&lt;name&gt;.state.json") == {*record, *record["optimizer"]}
    assert set(re.findall(r"`\{\"(\$\w+)\"", sections["Values in JSON"])) == set(lossless._DECODERS)
    position = {key for group in record["optimizer"]["groups"] for key in group["options"] if key.startswith("micro_")}
    assert position == {window.MICRO_BATCHES}
    assert all(f"`{key}`" in page for key in (window.MICRO_BATCHES, window.PENDING, window.PROMISE))
    assert all(f"`{field.name}`" in sections["client_state.json"] for field in attrs.fields(RunState))


def test_what_one_process_writes_is_read(
    tmp_path: Path,
    reader: ModuleType,
    make_trainable: Callable[..., Trainable],
    train: Callable[[Trainable, int], list[float]],
) -> None:
    """Every file of an awkward model in an open window: tensors, ties, options, schedule, streams and client state."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    strategy.setup_distributed()
    trainable, reference = make_trainable(0), nn.Linear(2, 3).double()
    train(trainable, 3)
    random.gauss(0, 1)
    strategy.save_ckpt({"actor": trainable, "reference": reference}, tmp_path, step=7, client_state=STATE, metric=0.1)
    found = reader.read_checkpoint(tmp_path)
    manifest = found.pop("manifest")
    assert (manifest["step"], manifest["strategy"], manifest["world_size"], manifest["metric"]) == (7, "single", 1, 0.1)
    assert repr(found.pop("client_state.json")) == repr(STATE)

    model, optimizer, scheduler = trainable
    names = {name: name for name, _ in model.named_parameters()}
    state, aliases = dict(model.state_dict()), {"head.weight": "embed.weight"}
    aliases |= {name: name.replace("twin", "inner") for name in state if name.startswith("twin.")}
    assert_same_arrays(
        found.pop("actor.model.safetensors"), {name: state[name] for name in state if name not in aliases}
    )
    moments = {
        f"{key}.{name}": value
        for name in names
        for key, value in optimizer.state.get(model.get_parameter(name), {}).items()
    }
    assert_same_arrays(found.pop("actor.optimizer.safetensors"), moments)
    record = found.pop("actor.state.json")
    assert record["aliases"] == aliases
    for saved, live in zip(record["optimizer"]["groups"], optimizer.param_groups, strict=True):
        assert reader.decoded(saved["options"]) == {key: value for key, value in live.items() if key != "params"}
        assert [model.get_parameter(name) for name in saved["parameters"]] == [*map(_Same, live["params"])]
    assert reader.decoded(record["optimizer"]["groups"][0]["options"])["micro_batches"] == 1
    assert reader.decoded(record["scheduler"]) == scheduler.state_dict()
    gradients = {name: model.get_parameter(name).grad for name in names if model.get_parameter(name).grad is not None}
    assert_same_arrays(found.pop("rank-00000.actor.gradients.safetensors"), gradients)

    assert_same_arrays(found.pop("reference.model.safetensors"), dict(reference.state_dict()))
    assert found.pop("reference.state.json") == {"aliases": {}, "optimizer": None, "scheduler": None}
    streams = found.pop("rank-00000.random.json")
    assert (streams["rank"], streams["world_size"]) == (0, 1)
    assert reader.decoded(streams["python"]) == random.getstate()
    assert bytes.fromhex(streams["torch"]) == bytes(torch.get_rng_state().tolist())
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (numpy's global stream)
    assert streams["numpy"] == [kind, keys.tolist(), *rest]
    assert found == {}
    strategy.teardown()


class _Same:
    """Equal to one object alone; tensors compare by element."""

    def __init__(self, what: object) -> None:
        self.what = what

    def __eq__(self, other: object) -> bool:
        return self.what is other

    __hash__ = None


@pytest.mark.parametrize(("strategy", "zero_stage"), [("fsdp2", 0), ("deepspeed", 3)])
def test_what_two_processes_write_is_read(
    tmp_path: Path,
    reader: ModuleType,
    programs: Callable[[str], ModuleType],
    strategy: str,
    zero_stage: int,
    spawn: SpawnRank,
) -> None:
    """Whatever shards a model, its tensors and moments are whole in the files, under plain names."""
    module = programs("strategy_programs")
    job = module.Job(strategy=strategy, zero_stage=zero_stage, directories=[str(tmp_path)])
    with processes(subject_of(get_strategy, "strategy"), 2, timeout=90, spawn=spawn) as run:
        seen = run(module.write, job)[0].at
    found = reader.read_checkpoint(tmp_path)
    aliases = found["actor.state.json"]["aliases"]
    assert aliases == {"head.weight": "embed.weight"}
    whole = {name: tensor for name, tensor in seen.items() if " of " not in name and name not in aliases}
    assert_same_arrays(found["actor.model.safetensors"], whole)
    moments = {name.replace(" of ", "."): tensor for name, tensor in seen.items() if " of " in name}
    kept = {name: each for name, each in found["actor.optimizer.safetensors"].items() if not name.startswith("step.")}
    assert_same_arrays(kept, moments)
    assert len(kept) == 2 / 3 * len(found["actor.optimizer.safetensors"])
    assert (found["manifest"]["strategy"], found["manifest"]["world_size"]) == (strategy, 2)
    streams = [found[f"rank-0000{rank}.random.json"] for rank in (0, 1)]
    assert [(each["rank"], each["world_size"]) for each in streams] == [(0, 2), (1, 2)]
    assert found["client_state.json"] == {}


def test_open_windows_of_two_processes_are_read(
    tmp_path: Path, reader: ModuleType, programs: Callable[[str], ModuleType], spawn: SpawnRank
) -> None:
    """Each rank's file of gradients has the parts that it holds, under the names of the parameters."""
    module = programs("sharded_programs")
    with processes(subject_of(build_gloo, "strategy"), 2, timeout=60, spawn=spawn) as run:
        seen = run(module.save_inside_a_window, module.Job(directory=str(tmp_path), is_sharded=True, num_steps=1))
    found = reader.read_checkpoint(tmp_path)
    for rank, one in enumerate(seen):
        gradients = {
            name.replace("gradient of ", "shard."): tensor
            for name, tensor in one.tensors.items()
            if name.startswith("gradient of ")
        }
        assert gradients
        assert_same_arrays(found[f"rank-0000{rank}.actor.gradients.safetensors"], gradients)
    assert found["actor.state.json"]["optimizer"]["groups"][0]["options"]["micro_batches"] == 1


def test_the_reader_refuses_what_is_damaged(saved: Path, reader: ModuleType) -> None:
    """A flipped bit of any file is seen by whoever follows the page; a lost manifest is not passed over."""
    path = saved / "step-00000002"
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            with pytest.raises((AssertionError, ValueError, KeyError)):
                reader.read_checkpoint(saved)
        file.write_bytes(content)
    assert reader.read_checkpoint(saved)["client_state.json"] == {"seen": 5}
    (path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError):
        reader.read_checkpoint(saved)
    assert reader.read_checkpoint(saved, step=1)["client_state.json"] == {"seen": 3}


def test_headers_have_the_dtypes_of_the_page_alone(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """Whatever is saved; what the page does not name is stored raw."""
    said = re.search(r"Dtypes of the header are (.*?)\. A", PAGE.read_text(), re.DOTALL)
    assert said is not None
    model = nn.Module()
    for name in KNOWN + UNKNOWN:
        dtype = getattr(torch, name)
        model.register_buffer(f"of_{name}", torch.zeros(4 * dtype.itemsize, dtype=torch.uint8).view(dtype))
    path = checkpointing.save_ckpt(model, tmp_path)
    written = (path / "model.model.safetensors").read_bytes()
    header = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
    raw = json.loads(header.pop("__metadata__")["lightrft.raw"])
    known = set(re.findall(r"`(\w+)`", said[1]))
    assert {entry["dtype"] for entry in header.values()} == known
    assert len(known) == len(KNOWN)
    assert {entry["dtype"] for entry in raw.values()} == set(UNKNOWN)
    assert all(header[name]["dtype"] == "U8" for name in raw)


def test_a_checkpoint_is_written_in_the_order_of_the_page(
    saved: Path,
    checkpointing: CheckpointFunctions,
    make_trainable: Callable[..., Trainable],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the page numbers happens in its order: staging, files, manifest, rename, sync, and then removal."""
    events: list[str] = []
    originals = {name: getattr(os, name) for name in ("open", "fsync", "mkdir", "rename", "unlink", "rmdir")}

    def plain(path: object) -> str:
        return re.sub(r"tmp-[0-9a-f]{16}", "tmp", str(Path(str(path)).relative_to(saved.parent)))

    def noting(name: str) -> Callable[..., object]:
        def call(*args: object, **keywords: object) -> object:
            is_new = name != "open" or int(str(args[1])) & os.O_CREAT
            if is_new and "dir_fd" not in keywords:  # by which the files inside of what goes are removed
                where = Path(f"/proc/self/fd/{args[0]}").readlink() if name == "fsync" else args[0]
                events.append(f"{name} {plain(where)}" + (f" {plain(args[1])}" if name == "rename" else ""))
            return originals[name](*args, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in originals:
            patch.setattr(os, name, noting(name))
        path = checkpointing.save_ckpt(make_trainable(1), saved, step=3, max_num=2)
    staging, leaving = "run/.step-00000003.tmp", "run/.step-00000001.tmp"
    files = [file.name for file in path.iterdir() if file.name != "manifest.json"]
    commit = [
        f"mkdir {staging}",
        f"open {staging}/lightrft.json",
        f"fsync {staging}/lightrft.json",
        f"fsync {staging}",
        f"mkdir {staging}/content",
        f"open {staging}/content/manifest.json",
        f"fsync {staging}/content/manifest.json",
        f"fsync {staging}/content",
        f"rename {staging}/content run/step-00000003",
        "fsync run",
        f"unlink {staging}/lightrft.json",
        f"rmdir {staging}",
        f"mkdir {leaving}",
        f"rename run/step-00000001 {leaving}/content",
        f"unlink {leaving}/lightrft.json",
        f"rmdir {leaving}",
    ]
    places = [events.index(event) for event in commit]
    assert places == sorted(places), [events[place] for place in places]
    assert "fsync run" in events[places[13] : places[14]]  # the directory that goes has left its name for good
    for file in files:
        written = [events.index(f"{what} {staging}/content/{file}") for what in ("open", "fsync")]
        assert places[4] < written[0] < written[1] < places[5], file
    assert len([event for event in events if event.startswith(f"open {staging}")]) == len(files) + 2
