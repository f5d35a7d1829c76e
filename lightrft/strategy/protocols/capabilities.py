"""What a backend says of itself, so that its laws can be chosen without trying it."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal, TypeAlias

__all__ = ["CAPABILITIES", "Capabilities", "Capability"]

Capability: TypeAlias = Literal["bf16", "images", "ranks", "sampling", "seeds", "tensor_parallel", "videos"]
"""Something that not every backend can do. What is claimed obeys its laws; what is not raises `UnsupportedError`."""

Capabilities: TypeAlias = frozenset[Capability]
"""What one strategy or engine claims."""

CAPABILITIES = MappingProxyType(
    {
        "bf16": "a strategy computes in bfloat16 over float32 parameters; without it, bf16=True is refused",
        "images": "an engine that has a processor takes prompts with images; without it, such prompts are refused",
        "ranks": "a strategy trains in more than one process; without it, building it in one of several is refused",
        "sampling": "an engine draws tokens from the policy; without it, top_k, top_p and min_new_tokens are refused",
        "seeds": "an engine draws by the seed; without it, equal requests may be given other draws of the policy",
        "tensor_parallel": "several ranks run one engine together; without it, tensor_parallel_size above 1 is refused",
        "videos": "an engine whose processor reads videos takes prompts with them; without it, they are refused",
    }
)
"""What each capability means, claimed and not."""
