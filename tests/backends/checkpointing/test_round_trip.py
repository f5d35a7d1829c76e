from __future__ import annotations

import json
import math
import pickletools
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightrft.backends.checkpointing.canonical import CheckpointFunctions
from lightrft.strategy.protocols.checkpointing import Checkpointing
from lightrft.strategy.protocols.training import Trainable

Make = Callable[..., Trainable]
Train = Callable[[Trainable, int], list[float]]
Snapshot = Callable[[Trainable], dict[str, object]]


@given(
    seed=st.integers(0, 99),
    width=st.sampled_from([1, 3, 4]),
    num_micro_batches=st.integers(0, 5),
    fused=st.booleans(),
    schedule=st.sampled_from(["none", "lambda", "cosine", "multistep", "plateau"]),
    further=st.integers(0, 3),
)
# the fixture is a record of functions: it holds nothing from one example to the next
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_load_restores_every_bit_and_the_run_goes_on_as_if_never_interrupted(
    checkpointing: CheckpointFunctions,
    make_trainable: Make,
    train: Train,
    snapshot: Snapshot,
    seed: int,
    width: int,
    num_micro_batches: int,
    fused: bool,
    schedule: str,
    further: int,
) -> None:
    """Saving changes nothing, loading gives the saved state bit for bit, and training goes on from there unchanged.

    The model that is loaded into has other values, and was trained or not.
    """
    trainable = make_trainable(seed, width=width, fused=fused, schedule=schedule)
    train(trainable, num_micro_batches)
    with tempfile.TemporaryDirectory() as directory:
        before = snapshot(trainable)
        checkpointing.save_ckpt(trainable, directory)
        assert snapshot(trainable) == before
        losses = train(trainable, 5)
        after = snapshot(trainable)

        resumed = make_trainable(seed + 1, width=width, fused=fused, schedule=schedule)
        train(resumed, further)
        transient = resumed.model.get_buffer("transient").clone()
        checkpointing.load_ckpt(resumed, directory)
    assert snapshot(resumed) == before
    assert torch.equal(resumed.model.get_buffer("transient"), transient)
    assert train(resumed, 5) == losses
    assert snapshot(resumed) == after


def test_record_satisfies_the_protocol(checkpointing: CheckpointFunctions) -> None:
    """The record can be passed where a `Checkpointing` is asked for (the type checkers hold this line)."""
    narrow: Checkpointing = checkpointing
    assert narrow.latest_ckpt("/nowhere") is None


def test_several_models_are_saved_by_name(
    tmp_path: Path, checkpointing: CheckpointFunctions, make_trainable: Make, train: Train, snapshot: Snapshot
) -> None:
    """A mapping of trained and plain models round-trips, and its keys are in the names of the files."""
    actor, reference = make_trainable(1), nn.Linear(3, 2)
    train(actor, 3)
    path = checkpointing.save_ckpt({"actor": actor, "reference": reference}, tmp_path, step=12)
    assert path == tmp_path / "step-00000012"
    assert {"actor.optimizer.safetensors", "reference.model.safetensors"} <= {file.name for file in path.iterdir()}
    before, weight = snapshot(actor), reference.weight.detach().clone()
    other = make_trainable(2)
    with torch.no_grad():
        reference.weight.zero_()
    loaded = checkpointing.load_ckpt({"reference": reference, "actor": other}, tmp_path)
    assert (loaded.path, loaded.step, loaded.client_state) == (path, 12, {})
    assert snapshot(other) == before
    assert torch.equal(reference.weight, weight)


def test_plain_model_with_optimizer_is_a_trainable(
    tmp_path: Path, checkpointing: CheckpointFunctions, make_trainable: Make, train: Train, snapshot: Snapshot
) -> None:
    """What was saved as model=, optimizer=, scheduler= loads into a `Trainable`; a wrapper leaves no trace in names."""
    model, optimizer, scheduler = saved = make_trainable(3)
    train(saved, 2)
    wrapper = nn.Module()
    wrapper.wrapped = model
    checkpointing.save_ckpt(wrapper, tmp_path, optimizer=optimizer, scheduler=scheduler)
    before, other = snapshot(saved), make_trainable(4)
    checkpointing.load_ckpt(other, tmp_path)
    assert snapshot(other) == before


def test_client_state_comes_back_equal(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """Whatever JSON holds comes back equal, infinities, NaN and huge integers too."""
    state = {
        "best": -math.inf,
        "sampler": {"order": [3, 1, 2], "": None},
        "big": 10**5000,
        "$odd": ["\ud800", True, 1e-320],
    }
    checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path, client_state={**state, "nan": math.nan})
    loaded = checkpointing.load_ckpt(nn.Linear(1, 1), tmp_path).client_state
    assert math.isnan(float(str(loaded.pop("nan"))))
    assert loaded == state


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.NAdam(p, lr=0.1),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), amsgrad=True),
        lambda p: torch.optim.Adadelta(p, lr=0.1),
    ],
)
def test_other_optimizers_round_trip(
    tmp_path: Path, checkpointing: CheckpointFunctions, build: Callable[[object], torch.optim.Optimizer]
) -> None:
    """Any optimizer whose state is tensors by parameter resumes bit for bit, tensors as learning rates included."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(2, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 2)
        return model, build(model.parameters())

    model, optimizer = make()
    step(model, optimizer)
    checkpointing.save_ckpt(model, tmp_path, optimizer=optimizer)
    other, other_optimizer = make()
    checkpointing.load_ckpt(other, tmp_path, optimizer=other_optimizer)
    for _ in range(2):
        step(model, optimizer)
        step(other, other_optimizer)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


def test_random_streams_continue(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """The streams of Python (also inside a Gaussian pair), numpy and torch continue after a load."""
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002 (numpy's global stream)
    checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path)

    def draw() -> list[object]:
        return [random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()]  # noqa: NPY002, S311 (numpy's global stream)

    expected = draw()
    checkpointing.load_ckpt(nn.Linear(1, 1), tmp_path)
    assert draw() == expected


def test_no_file_is_a_pickle_and_none_is_unpickled(
    saved: Path, checkpointing: CheckpointFunctions, make_trainable: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of a checkpoint can be read as pickle opcodes, and loading works where unpickling is impossible."""
    for file in saved.glob("*/*"):
        assert file.suffix in {".json", ".safetensors"}
        with pytest.raises((ValueError, UnicodeDecodeError)):
            list(pickletools.genops(file.read_bytes()))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, refuse)
    assert checkpointing.load_ckpt(make_trainable(9), saved).client_state == {"seen": 5}


def test_tensors_that_share_memory_are_kept_whole(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """Views of one storage that are no tied parameter are written each for itself, and stay views after a load."""

    def make(value: float) -> nn.Module:
        model = nn.Module()
        memory = torch.arange(6.0) + value
        model.register_buffer("all", memory)
        model.register_buffer("part", memory[1:3])
        return model

    checkpointing.save_ckpt(make(0.0), tmp_path)
    model = make(5.0)
    checkpointing.load_ckpt(model, tmp_path)
    assert model.get_buffer("all").tolist() == [0, 1, 2, 3, 4, 5]
    model.get_buffer("all")[1] = 9
    assert model.get_buffer("part").tolist() == [9, 2]


def test_optimizer_state_keeps_where_and_how_torch_makes_it(
    tmp_path: Path, checkpointing: CheckpointFunctions, make_trainable: Make, train: Train
) -> None:
    """A fresh fused AdamW gets float32 step counters and moments in the memory order of their parameters."""
    trainable = make_trainable(1)
    train(trainable, 2)
    checkpointing.save_ckpt(trainable, tmp_path)
    fresh = make_trainable(2)
    checkpointing.load_ckpt(fresh, tmp_path)
    turned = fresh.model.get_parameter("turned")
    state = fresh.optimizer.state[turned]
    assert (state["step"].dtype, state["step"].item()) == (torch.float32, 1.0)
    assert state["exp_avg"].stride() == turned.stride() == (1, 4)


def test_streams_that_a_process_lacks_are_left_alone(
    tmp_path: Path, checkpointing: CheckpointFunctions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of a process without numpy loads into one with it, whose stream stays, and the other way round."""
    before = np.random.get_state(legacy=True)[1].tolist()  # noqa: NPY002 (numpy's global stream)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "numpy")
        path = checkpointing.save_ckpt(nn.Module(), tmp_path)
    assert "numpy" not in json.loads((path / "rank-00000.random.json").read_bytes())
    checkpointing.load_ckpt(nn.Module(), tmp_path)
    assert np.random.get_state(legacy=True)[1].tolist() == before  # noqa: NPY002 (numpy's global stream)
    checkpointing.save_ckpt(nn.Module(), tmp_path)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "numpy")
        assert checkpointing.load_ckpt(nn.Module(), tmp_path).step == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_stream_and_tensors_come_back(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """The CUDA stream continues after a load, and a model on the device gets its tensors back there."""
    model = nn.Linear(3, 3).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.rand(2, 3, device="cuda")).sum().backward()
    optimizer.step()
    checkpointing.save_ckpt(model, tmp_path, optimizer=optimizer)
    expected, weight = torch.rand(3, device="cuda"), model.weight.detach().clone()
    other = nn.Linear(3, 3).cuda()
    fresh = torch.optim.AdamW(other.parameters(), fused=True)
    checkpointing.load_ckpt(other, tmp_path, optimizer=fresh)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    assert torch.equal(other.weight, weight)
    assert all(tensor.is_cuda for state in fresh.state.values() for tensor in state.values())
