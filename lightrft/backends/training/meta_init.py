"""Models without memory for parameters, whose weights come later."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

__all__ = ["fill_meta_parameters", "parameters_on_meta"]


@contextmanager
def parameters_on_meta() -> Generator[None]:
    """Build models whose parameters are on the meta device, tied ones still tied, and whose buffers are real.

    A buffer may be computed where the model is built and be in no file, so it must not get lost.

    Example:
        >>> with parameters_on_meta():
        ...     model = nn.BatchNorm1d(2)
        >>> model.weight.device.type, model.running_var.device.type
        ('meta', 'cpu')
    """

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        del module, name
        if parameter is None or parameter.is_meta:  # what is tied comes a second time, as it is by then
            return parameter
        moved = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        vars(moved).update(vars(parameter))
        return moved

    # torch's annotation leaves out that a hook may return what is registered instead
    handle = register_module_parameter_registration_hook(cast("Callable[..., None]", move))
    try:
        yield
    finally:
        handle.remove()


def fill_meta_parameters(modules: Sequence[nn.Module], device: str) -> None:
    """Give parameters on the meta device memory; tied ones stay tied.

    Their values are NaN (0 where there is none), so that a weight which nobody loads is seen in the first loss.

    Args:
        modules: their own parameters are meant, not those of their submodules.
        device: where to.
    """
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                if parameter not in filled:
                    filled[parameter] = _filled(parameter, device)
                setattr(module, name, filled[parameter])


def _filled(parameter: nn.Parameter, device: str) -> nn.Parameter:
    value = float("nan") if parameter.is_floating_point() else 0
    real = nn.Parameter(torch.full_like(parameter, value, device=device), requires_grad=parameter.requires_grad)
    vars(real).update(vars(parameter))
    return real
