"""What is restored of an optimizer, one parameter and one group at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrft.backends.checkpointing.restore import _parameter_state, _set_options


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
    saved = {"tensors": ["step", "exp_avg"], "values": {"note": 7}}
    tensors = {"step.w": torch.tensor(3.0), "exp_avg.w": torch.ones(2)}
    state = _parameter_state("w", parameter, saved, tensors, options)
    assert state is not None
    assert (state["step"].device.type, state["exp_avg"].device.type, state["note"]) == (device, "meta", 7)
    assert _parameter_state("w", parameter, None, tensors, options) is None


def test_options_are_the_saved_ones_and_the_defaults_of_newer_ones() -> None:
    """A group gets the saved options; one that torch knows and the file lacks keeps its value; others go."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    group = optimizer.param_groups[0]
    group["mine"] = 1
    _set_options(group, {"lr": 0.5, "micro_batches": 2}, optimizer)()
    assert (group["lr"], group["momentum"], group["micro_batches"]) == (0.5, 0.9, 2)
    assert group["params"] == [parameter]
    assert "mine" not in group
