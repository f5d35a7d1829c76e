"""A strategy that is held to its laws while a real run goes on."""

from lightrft.testing.checked.checked import checked

__all__ = ["checked"]
