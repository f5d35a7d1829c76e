"""The engine "sglang": completions of SGLang, in this process and on its CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightrft.backends.adapters import Adapted
from lightrft.backends.rollout.guest_engine import Guest, build_guest_engine
from lightrft.backends.rollout.sglang.handle import Inside
from lightrft.backends.rollout.sglang.inside import forget, free_cache, restore_cache, start_inside, stop_inside
from lightrft.backends.rollout.sglang.load import begin_load, end_load, load
from lightrft.backends.rollout.sglang.package import import_sglang
from lightrft.backends.rollout.sglang.requests import run_requests
from lightrft.errors import UnsupportedError
from lightrft.strategy.protocols.images import Processor
from lightrft.strategy.protocols.rollout import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightrft.config.sections import EngineConfig

__all__ = ["build_sglang"]


def build_sglang(config: EngineConfig) -> Engine:
    """Return the engine "sglang".

    It takes the causal language models of transformers that SGLang has an architecture for, and with a processor
    Qwen2.5-VL, which reads images. Asleep, it holds weights and no key-value cache: on a CPU there is no other memory
    to which weights could go.

    Args:
        config: `batch_size` bounds the sequences that are decoded at once, `cache_gb` is the size of the key-value
            cache.

    Raises:
        MissingPackageError: SGLang is not installed, or in a version that is not known.
        UnsupportedError: the machine has a GPU, or SGLang was imported for another device.
    """
    package = import_sglang()

    def start(
        model: PreTrainedModel, processor: Processor | None, context: int | None, adapted: Adapted | None
    ) -> Inside:
        if adapted is not None:
            raise UnsupportedError("engine.adapters='sent' is not for the engine 'sglang'; use 'merged'.")
        return start_inside(
            package,
            model,
            processor=processor,
            context=context,
            batch_size=config.batch_size,
            cache_bytes=int(config.cache_gb * 1e9),
        )

    guest = Guest(
        name="sglang",
        title="SGLang",
        capabilities=frozenset({"images", "sampling", "seeds"}),
        start=start,
        generate=run_requests,
        begin_load=begin_load,
        load=load,
        end_load=end_load,
        forget=forget,
        free_cache=free_cache,
        restore_cache=restore_cache,
        stop=stop_inside,
    )
    return build_guest_engine(guest)
