"""The platform of SGLang on which plain torch computes on a CPU: an entry point of `sglang.srt.platforms`.

SGLang's own platform for CPUs needs kernels that are not published. SGLang asks every installed package for platforms;
this one answers only when it is asked for by name, as the engine "sglang" does.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["PLATFORM", "activate"]

PLATFORM = "lightrft_cpu"
"""Name of the entry point, and value of SGLang's variable `SGLANG_PLATFORM` that chooses it."""


def activate() -> str | None:
    """Return where SGLang finds the platform, or None where nobody asked for it by name."""
    return f"{__name__}:CpuPlatform" if os.environ.get("SGLANG_PLATFORM") == PLATFORM else None


def __getattr__(name: str) -> object:
    """Make SGLang's class when SGLang looks for it; without SGLang it cannot be made."""
    if name != "CpuPlatform":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    bases = (
        import_module("sglang.srt.platforms.cpu").CpuDeviceMixin,
        import_module("sglang.srt.platforms.interface").SRTPlatform,
    )
    own = {
        "__module__": __name__,
        "_enum": import_module("sglang.srt.platforms.device_mixin").PlatformEnum.OOT,
        "is_pin_memory_available": _is_pin_memory_available,
        "get_default_attention_backend": _get_default_attention_backend,
    }
    return type(name, bases, own)


def _is_pin_memory_available(platform: object, device: torch.device | None = None) -> bool:
    del platform, device
    return False


def _get_default_attention_backend(platform: object) -> str:
    del platform
    return "torch_native"
