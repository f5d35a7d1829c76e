"""What versions of vLLM do in different ways; no other module asks for the version."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from lightrft.backends.rollout.vllm.package import installed_version

__all__ = ["reached_names", "takes_patterns"]


def reached_names(names: AbstractSet[str]) -> set[str]:
    """Return the names of the parameters that a load has reached.

    Args:
        names: what vLLM's `load_weights` has returned.
    """
    if installed_version() >= (0, 32):
        return set(names)
    inner = ".experts.routed_experts."  # what is before it is left out
    return {name if inner in name else name.replace(".experts.", inner) for name in names}


def takes_patterns() -> bool:
    """Return whether vLLM looks at ranks and scales that an adapter has for some layers of their own."""
    return installed_version() >= (0, 32)  # before, it takes those of the others
