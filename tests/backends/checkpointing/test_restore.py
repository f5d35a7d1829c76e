"""What is restored of an optimizer, one parameter and one group at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrft.backends.checkpointing.access import OptimizerState
from lightrft.backends.checkpointing.live import _restored, build_live_access
from lightrft.backends.checkpointing.restore import _set_options


@pytest.mark.parametrize(
    ("options", "device"),
    [
        ({}, "cpu"),
        ({"fused": None, "capturable": False}, "cpu"),
        ({"fused": True}, "meta"),
        ({"capturable": True}, "meta"),
    ],
)
def test_step_counts_go_where_the_kernel_reads_them(options: dict[str, object], device: str) -> None:
    """Step counts stay on the host unless the kernel is fused or capturable; other state is where the parameter is."""
    parameter = nn.Parameter(torch.zeros(2, device="meta"))  # every machine has it
    saved = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "note": 7}
    state = _restored(saved, parameter, options)
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
