"""A strategy for lightrft that trains with the optimizer Lion."""

from lion_strategy.optimizer import Lion
from lion_strategy.strategy import build_lion

__all__ = ["Lion", "build_lion"]
