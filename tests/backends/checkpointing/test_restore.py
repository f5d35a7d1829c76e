"""What is restored of an optimizer, one parameter and one group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from lightrft.backends.checkpointing.access import OptimizerState, StoredTensor
from lightrft.backends.checkpointing.durable import write_file
from lightrft.backends.checkpointing.live import _places, build_live_access
from lightrft.backends.checkpointing.restore import _set_options
from lightrft.backends.checkpointing.stored import open_tensors
from lightrft.backends.checkpointing.tensor_files import bytes_of, safetensors_chunks, writing_order


@contextmanager
def stored(directory: Path, **tensors: torch.Tensor) -> Iterator[Mapping[str, StoredTensor]]:
    pieces = [bytes_of(tensors[name]) for name in writing_order(tensors)]
    write_file(directory / "file", safetensors_chunks(tensors, pieces))
    with open_tensors(directory / "file") as opened:
        yield opened


@pytest.mark.parametrize(
    ("options", "device"),
    [
        ({}, "cpu"),
        ({"fused": None, "capturable": False}, "cpu"),
        ({"fused": True}, "meta"),
        ({"capturable": True}, "meta"),
    ],
)
def test_step_counts_go_where_the_kernel_reads_them(tmp_path: Path, options: dict[str, object], device: str) -> None:
    """Step counts stay on the host unless the kernel is fused or capturable; other state is where the parameter is."""
    parameter = nn.Parameter(torch.zeros(2, device="meta"))  # every machine has it
    with stored(tmp_path, step=torch.tensor(3.0), exp_avg=torch.ones(2)) as tensors:
        state, _ = _places({**tensors, "note": 7}, {}, parameter, options, set())
    assert (state["step"].device.type, state["exp_avg"].device.type, state["note"]) == (device, "meta", 7)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerState:
    return build_live_access(lambda model: model).optimizer_state(model, optimizer, owner="model")


def test_a_parameter_without_saved_state_has_none_afterwards() -> None:
    """What a parameter had is dropped where the saved one had nothing."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1)).sum().backward()
    optimizer.step()
    optimizer_state(optimizer, model).plan_parameter("weight", None, options={}, source="file")()
    assert set(optimizer.state) == {model.bias}


def test_state_that_is_there_is_read_to_its_own_memory(tmp_path: Path) -> None:
    """Moments keep their memory and change when the plan is applied, not before; new ones are laid out as parameters.

    What shares memory with another tensor, or has another dtype, gets memory of its own: no value is lost.
    """
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False))
    first, second, third = model.parameters()
    optimizer = torch.optim.AdamW(model.parameters())
    shared, low = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    optimizer.state[first] = {"exp_avg": shared}
    optimizer.state[second] = {"exp_avg": shared}
    optimizer.state[third] = {"exp_avg": low, "other": 1}
    live = optimizer_state(optimizer, model)
    values = torch.randn(3, 2, 3)
    with stored(tmp_path, **{str(number): value for number, value in enumerate(values)}) as tensors:
        plans = [
            live.plan_parameter(f"{number}.weight", {"exp_avg": tensors[str(number)]}, options={}, source="file")
            for number in range(3)
        ]
        assert not shared.any()
        assert not low.any()
        for plan in plans:
            plan()
    assert optimizer.state[first]["exp_avg"] is shared
    for number, parameter in enumerate((first, second, third)):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], values[number])
        assert list(optimizer.state[parameter]) == ["exp_avg"]


def test_options_are_the_saved_ones_and_the_defaults_of_newer_ones() -> None:
    """A group gets the saved options; one that torch knows and the file lacks keeps its value; others go."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    group = optimizer.param_groups[0]
    group["mine"] = 1
    live = optimizer_state(optimizer, model)
    _set_options(live.groups[0], {"lr": 0.5, "micro_batches": 2}, live)()
    assert (group["lr"], group["momentum"], group["micro_batches"]) == (0.5, 0.9, 2)
    assert group["params"] == [model.weight]
    assert "mine" not in group
