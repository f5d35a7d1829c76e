"""What a file asks for beyond data is refused, and never done."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from lightrft.backends.checkpointing.foreign.opcodes import to_protocol_2
from lightrft.backends.checkpointing.foreign.opening import open_foreign
from lightrft.backends.checkpointing.foreign.restricted import as_torch_file, is_stand_in, made_of, read_restricted
from lightrft.errors import CheckpointError, LightRFTError

Sources = Callable[[int], Path]
Spoil = Callable[[Path, object], None]


class Evil:
    """Runs a command when Python's pickle reads it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


def read_all(directory: Path) -> None:
    with open_foreign(directory, name="actor") as found:
        for tensor in found.tensors.values():
            tensor.read()


def replace(pattern: str, protocol: int) -> Spoil:
    """A bare pickle in place of a file."""

    def spoil(directory: Path, evil: object) -> None:
        next(directory.rglob(pattern)).write_bytes(pickle.dumps(evil, protocol=protocol))

    return spoil


def add(pattern: str) -> Spoil:
    """An object beside what a file of `torch.save` holds."""

    def spoil(directory: Path, evil: object) -> None:
        path = next(directory.rglob(pattern))
        torch.save({**torch.load(path, weights_only=False), "epoch": evil}, path)

    return spoil


def spoil_metadata(directory: Path, evil: object) -> None:
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301 (ours)
    metadata.planner_data = evil
    path.write_bytes(pickle.dumps(metadata))


def spoil_part(directory: Path, evil: object) -> None:
    """One part of a tensor becomes a file of `torch.save` that holds the object, as `.metadata` says."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301 (ours)
    torch.save(evil, directory / "__9_0.distcp")
    place = next(place for index, place in metadata.storage_data.items() if index.fqn.endswith("embed.weight"))
    place.relative_path, place.offset, place.length = "__9_0.distcp", 0, (directory / "__9_0.distcp").stat().st_size
    path.write_bytes(pickle.dumps(metadata))


def spoil_value(directory: Path, evil: object) -> None:
    """An option of the optimizer, by the writer of DCP itself."""
    optimizer = {"state": {"w": {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": ["w"], "lr": evil}]}
    shutil.rmtree(directory)
    dcp.save({"model": {"w": torch.ones(2)}, "optimizer": optimizer}, checkpoint_id=directory, no_dist=True)


PLACES: dict[str, tuple[str, Spoil]] = {
    "metadata": ("dcp-nested", spoil_metadata),
    "metadata, alone": ("dcp-nested", replace(".metadata", 4)),
    "metadata, alone, old": ("dcp-nested", replace(".metadata", 2)),
    "metadata, alone, oldest": ("dcp-nested", replace(".metadata", 0)),
    "part of a tensor": ("dcp-alone", spoil_part),
    "value": ("dcp-nested", spoil_value),
    "module": ("zero0", add("mp_rank_00_model_states.pt")),
    "module, alone": ("zero0", replace("mp_rank_00_model_states.pt", 2)),
    "module, alone, new": ("zero0", replace("mp_rank_00_model_states.pt", 5)),
    "part of a module": ("zero3", add("zero_pp_rank_1_mp_rank_00_model_states.pt")),
    "part of an optimizer": ("zero2", add("*zero_pp_rank_1_mp_rank_00_optim_states.pt")),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("place", PLACES)
def test_code_in_any_place_is_refused_and_not_run(sources: Sources, tmp_path: Path, place: str) -> None:
    """A call of os.system stands where data belongs; the refusal names the file, and the call where it can be told."""
    name, spoil = PLACES[place]
    directory, effect = tmp_path / name, tmp_path / "effect"
    shutil.copytree(sources(2) / name, directory)
    read_all(directory)
    evil = Evil(f"touch {effect}")
    spoil(directory, evil)
    with pytest.raises(CheckpointError, match=name) as caught:
        read_all(directory)
    assert not effect.exists()
    assert "posix.system" in str(caught.value) or "alone" in place
    assert "\n" not in str(caught.value)
    pickle.loads(pickle.dumps(evil))  # noqa: S301 (that it would have run)
    assert effect.exists()


def test_forged_files_import_nothing_and_run_nothing(sources: Sources) -> None:
    """Of hundreds of forged pickles none makes the interpreter import, compile, start or look up anything."""
    program = Path(__file__).parent / "fuzz_program.py"
    directory = sources(1)
    done = subprocess.run(  # noqa: S603 (our own interpreter)
        [sys.executable, str(program), str(directory), "900"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4]), "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    result = json.loads((directory / "result.json").read_text())
    assert result["seen"] == []
    assert result["errors"] == []
    assert not result["effect"]
    assert result["ends"]["refused"] > 500
    assert result["ends"]["read"] > 0
    assert result["control"] == ["pickle.find_class ('posixpath', 'join')"]  # the hook does see


def test_what_this_process_allows_elsewhere_is_not_allowed_here(tmp_path: Path) -> None:
    """A class that other code has allowed is refused, and stays allowed for that code."""
    path = tmp_path / "file.pt"
    torch.save({"a": Path("x")}, path)
    with torch.serialization.safe_globals([type(Path())]):
        with pytest.raises(CheckpointError, match=r"pathlib\.PosixPath"):
            read_restricted(path, source="file")
        assert torch.load(path, weights_only=True) == {"a": Path("x")}


def test_a_stand_in_holds_data_alone(tmp_path: Path) -> None:
    """Under a name that is listed stands something that kept the arguments, and no instance of the class."""
    path = tmp_path / "file.pt"
    torch.save({"a": Path("/x/y")}, path)
    read = read_restricted(path, source="file", stand_ins=["pathlib.PosixPath"])
    assert isinstance(read, dict)
    assert not isinstance(read["a"], Path)
    assert is_stand_in(read["a"], "pathlib.PosixPath")
    assert made_of(read["a"], "pathlib.PosixPath") == ("/", "x", "y")
    with pytest.raises(TypeError, match="LossScaler"):
        made_of(read["a"], "deepspeed.LossScaler")


TEXTS = st.text(max_size=5) | st.text(alphabet="abc", min_size=1000, max_size=1010)
DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4) | st.tuples(inner, inner, inner)
    ),
    max_leaves=12,
)


@given(data=DATA, protocol=st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_a_rewritten_stream_says_the_same(data: object, protocol: int) -> None:
    """Plain data, shared and nested, and classes among it, read by Python and by torch from the rewritten stream."""
    mixed = [data, data, torch.float32, torch.Size([2, 3]), torch.Size([2, 3]), {"torch": "float32", "Size": data}]
    stream = to_protocol_2(pickle.dumps(mixed, protocol=protocol), source="stream")
    assert pickle.loads(stream) == mixed  # noqa: S301 (ours)
    assert read_restricted(as_torch_file(stream), source="stream") == mixed


@given(data=DATA, cut=st.integers(0, 10**6))
def test_a_stream_that_is_cut_off_is_refused(data: object, cut: int) -> None:
    """Wherever it ends."""
    whole = pickle.dumps([data, "end"])
    with pytest.raises(CheckpointError, match="stream is no pickle"):
        to_protocol_2(whole[: cut % len(whole)], source="stream")


@pytest.mark.parametrize("value", [b"bytes", bytearray(b"b"), {1, 2}, frozenset({1}), range(3).__reduce__])
def test_what_protocol_2_cannot_say_is_refused(value: object) -> None:
    """Bytes, sets and bound methods are no part of the metadata of tensors."""
    with pytest.raises(LightRFTError, match="stream is"):
        read_restricted(as_torch_file(to_protocol_2(pickle.dumps(value), source="stream")), source="stream")
