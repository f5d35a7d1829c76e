"""Lion: every parameter moves by the learning rate, in a direction that only a sign decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.optim import Optimizer

__all__ = ["Lion"]


class Lion(Optimizer):  # torch has optimizers inherit from its own class
    """Steps by the sign of an average of gradients; it keeps one number a parameter where AdamW keeps two.

    With gradient g, average m, rate lr and decay w, one step is

        p <- p * (1 - lr * w) - lr * sign(beta1 * m + (1 - beta1) * g)
        m <- beta2 * m + (1 - beta2) * g

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2.
    """

    def __init__(
        self, param_groups: Sequence[dict[str, object]], *, lr: float, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        """Keep the settings.

        Args:
            param_groups: mappings with "params" and "weight_decay".
            lr: length of a step, in units of the parameters.
            betas: coefficients of the direction and of the average.
        """
        super().__init__(param_groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss is returned
        """Move the parameters that have a gradient.

        Args:
            closure: plays no part; it stands in torch's signature.
        """
        del closure
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                direction = average.lerp(parameter.grad, 1 - beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
                average.lerp_(parameter.grad, 1 - beta2)
