"""The stream of a model's tensors under their plain names."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lightrft.backends.training.autocast import unwrap_autocast

__all__ = ["named_tensors"]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for every parameter and persistent buffer; see `NamedTensors`.

    Example:
        >>> [name for name, _ in named_tensors(nn.Linear(2, 2))]
        ['weight', 'bias']
    """
    for name, value in unwrap_autocast(model).state_dict().items():
        if name.rpartition(".")[2] != "_extra_state":  # that of a module is neither parameter nor buffer
            yield name, value
