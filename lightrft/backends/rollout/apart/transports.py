"""The transports by their names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lightrft.backends.rollout.apart import collective, memory
from lightrft.backends.rollout.apart.transport import Transport

__all__ = ["TRANSPORTS"]

TRANSPORTS: Mapping[str, Transport] = MappingProxyType({"memory": memory.TRANSPORT, "collective": collective.TRANSPORT})
"""By the value of `EngineConfig.transport`."""
