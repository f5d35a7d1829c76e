"""Reinforcement fine-tuning of language models: one interface whose backends mean the same.

Start with `lightrft.strategy`; importing this package alone loads nothing heavy.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
