"""The inside of vLLM, of the versions that `package` names: how it is started as a guest, asked, and stopped.

Here and in `load_fast` is all that leans on what vLLM does not promise. What a version does otherwise is in
`differences`, and what its public functions come to do goes from these two modules.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore  # under `torch.distributed` it is not exported to type checkers

from lightrft.backends.rollout.vllm.handle import Inside, ModelRunner, SentAdapter
from lightrft.backends.rollout.vllm.load import choose_loader, has_inner_tower
from lightrft.backends.rollout.vllm.package import RequestOutput, Vllm, undisturbed
from lightrft.backends.rollout.vllm.positions import count_as_transformers
from lightrft.backends.rollout.vllm.sharding import Sharding, beside_others
from lightrft.errors import ConfigError, EngineCrashError, EngineStateError, UnsupportedError
from lightrft.strategy.protocols.images import Processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "forget",
    "free_cache",
    "restore_cache",
    "run_requests",
    "start_inside",
    "stop_inside",
]


def start_inside(
    package: Vllm,
    model: PreTrainedModel,
    *,
    processor: Processor | None,
    context: int | None,
    sent: SentAdapter | None,
    batch_size: int,
    cache_bytes: int,
    sharding: Sharding | None,
) -> Inside:
    """Return a running vLLM with a model's architecture, and weights of no meaning.

    Args:
        package: vLLM.
        model: gives architecture and dtype.
        processor: the model's, if it shall read images.
        context: tokens of the longest sequence; None takes what vLLM reads off the architecture.
        sent: an adapter that comes apart from the weights.
        batch_size: bound on the sequences that are decoded at once.
        cache_bytes: size of the key-value cache.
        sharding: how it is spread over ranks; None where this one has all of it.

    Raises:
        UnsupportedError: vLLM does not run this model.
        ConfigError: the cache does not hold one sequence.
        EngineStateError: another one runs in this process.
    """
    if import_module("vllm.distributed.parallel_state").model_parallel_is_initialized():
        raise EngineStateError(
            "engine='vllm' runs in this process already and its groups are of the whole process; close it."
        )
    owns_group, loader = not dist.is_initialized(), choose_loader()
    with (
        undisturbed(),
        _memory_unbound(),
        loader.starting(),
        beside_others(sharding) as placed,
        tempfile.TemporaryDirectory() as directory,
    ):
        _write_config(model, processor, directory)
        if owns_group:
            # with a store in memory nothing is written and no other process can come in
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            llm = package.LLM(
                model=directory,
                skip_tokenizer_init=processor is None,  # with images, vLLM needs the one inside of the processor
                language_model_only=processor is None,
                mm_hasher_algorithm="sha256",  # the default wants a package
                mm_device_do_normalize=False,  # else constants are in the model, and start as random as its weights
                trust_remote_code=False,
                load_format="dummy",
                generation_config="vllm",  # no sampling settings from elsewhere
                dtype=str(model.dtype).removeprefix("torch."),
                enforce_eager=True,
                max_num_seqs=batch_size,
                kv_cache_memory_bytes=cache_bytes,
                use_tqdm_on_load=False,
                seed=0,
                **placed,
                **({} if context is None else {"max_model_len": context}),
                **loader.settings,
                **({} if sent is None else sent.settings),
            )
        except Exception as error:
            _leave_groups(owns_group=owns_group)
            raise _refusal(model, error, cache_gb=cache_bytes / 1e9) from error
    # when this is collected it would destroy whatever groups there are then
    cast("Any", llm.llm_engine).engine_core._finalizer.detach()  # noqa: SLF001
    worker = cast("Any", llm.collective_rpc(_itself)[0])
    runner: ModelRunner = worker.model_runner
    own = runner.get_model()
    inside = Inside(
        llm=llm,
        runner=runner,
        model=own,
        processor=processor,
        loader=loader,
        sent=sent,
        owns_group=owns_group,
        is_sharded=sharding is not None,
        has_inner_tower=has_inner_tower(own),
    )
    try:
        _check_heads(inside)
        _flatten_videos(inside.model)
        if processor is not None:
            count_as_transformers(inside.model, model, processor)
        _scale_logits(inside)
    except UnsupportedError:
        stop_inside(inside)
        raise
    return inside


def _itself(worker: object) -> object:
    return worker


@contextmanager
def _memory_unbound() -> Generator[None]:
    """Keep vLLM from binding the whole process to the memory of one node of a machine that has several."""
    import_module("vllm._custom_ops")  # loads them
    operators = cast("Any", torch.ops)._C  # noqa: SLF001 (vLLM's own)
    bind = operators.init_cpu_memory_env
    operators.init_cpu_memory_env = _bind_nothing
    try:
        yield
    finally:
        operators.init_cpu_memory_env = bind


def _bind_nothing(nodes: object) -> None:
    del nodes


def _write_config(model: PreTrainedModel, processor: Processor | None, directory: str) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    if processor is None:
        return
    if not hasattr(processor, "save_pretrained"):
        raise UnsupportedError(
            f"processor={type(processor).__name__} cannot be saved, as vLLM reads it from a directory; use one of "
            "transformers, or the engine 'hf'."
        )
    cast("Any", processor).save_pretrained(directory)


def _refusal(model: nn.Module, error: Exception, *, cache_gb: float) -> Exception:
    said = _said(error)
    if "KV cache" in said or "cache blocks" in said:
        return ConfigError(f"cache_gb={cache_gb!r} does not suffice ({said}); raise it.")
    return UnsupportedError(
        f"model={type(model).__name__} does not start in vLLM ({said}); use the engine 'hf', or another architecture."
    )


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_heads(inside: Inside) -> None:
    """Refuse sizes of attention heads that vLLM would refuse at the first token."""
    for module in inside.model.modules():
        layer = cast("Any", module)
        backend: Any = getattr(layer, "attn_backend", None)  # of the layers that see it is a name, and takes every size
        sizes: list[int] = backend.get_supported_head_sizes() if hasattr(backend, "get_supported_head_sizes") else []
        if sizes and layer.head_size not in sizes:
            raise UnsupportedError(
                f"head_dim={layer.head_size!r} is not among the sizes that vLLM's attention takes, {sizes}; change "
                "hidden_size or num_heads, or use the engine 'hf'."
            )


def _flatten_videos(model: nn.Module) -> None:
    """Give vLLM what its LLaVA-OneVision makes of videos of different lengths in the form that it refuses others in."""
    seeing = cast("Any", model)
    if not hasattr(seeing, "embed_multimodal"):
        return
    embed: Callable[..., Sequence[torch.Tensor]] = seeing.embed_multimodal

    def embed_multimodal(**inputs: object) -> list[torch.Tensor]:
        return [seen.flatten(0, -2) for seen in embed(**inputs)]

    seeing.embed_multimodal = embed_multimodal


def _scale_logits(inside: Inside) -> None:
    """Divide logits by the temperature where they are made: vLLM reports logprobs from before its own division."""
    kind = import_module("vllm.model_executor.layers.logits_processor").LogitsProcessor
    found = [module for module in inside.model.modules() if isinstance(module, kind)]
    if not found:
        raise UnsupportedError(
            f"model={type(inside.model).__name__} makes its logits in a way of its own, whose logprobs at a "
            "temperature cannot be reported; use the engine 'hf'."
        )

    def scale(module: nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        del module, args
        return logits if inside.temperature == 1 else logits.div_(inside.temperature)  # made for this call alone

    for module in found:
        module.register_forward_hook(scale)


def run_requests(
    inside: Inside, requests: Sequence[object], params: Sequence[object], temperature: float
) -> Sequence[RequestOutput]:
    """Return what came of each request; whatever ends it before, no request stays behind.

    Args:
        inside: a running vLLM.
        requests: prompts in vLLM's form.
        params: how each is sampled.
        temperature: divides the logits.

    Raises:
        EngineCrashError: the engine is one of several ranks, and something ended it here or on another one.
    """
    inside.temperature = temperature
    # vLLM draws from torch's global stream even where each request has its own, and compiles functions of a line or two
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"), _ranks_uncounted(), _unwarned():
        try:
            adapter = None if inside.sent is None else inside.sent.request
            return inside.llm.generate(requests, params, use_tqdm=False, lora_request=adapter)
        except BaseException as error:
            engine = cast("Any", inside.llm.llm_engine)
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            if inside.is_sharded:
                _leave_groups(owns_group=False)  # or else the other ranks would wait for this one
                if isinstance(error, Exception):
                    raise EngineCrashError(f"vLLM broke off ({_said(error)}); start the engine again.") from error
            raise


@contextmanager
def _ranks_uncounted() -> Generator[None]:
    """Keep vLLM from counting for each token how many are likelier, which nobody asks."""
    sampler = cast("Any", import_module("vllm.v1.sample.sampler"))
    count = sampler.batched_count_greater_than
    sampler.batched_count_greater_than = _count_none
    try:
        yield
    finally:
        sampler.batched_count_greater_than = count


@contextmanager
def _unwarned() -> Generator[None]:
    """Keep torch from telling everybody that what vLLM calls has another name now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _count_none(logprobs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    del values
    return torch.zeros(len(logprobs), dtype=torch.int64)


def forget(inside: Inside) -> None:
    """Drop what was computed with earlier weights: keys and values of prompts, and what was seen in images.

    Args:
        inside: a running vLLM without requests.

    Raises:
        EngineStateError: requests are under way.
    """
    if not inside.llm.reset_prefix_cache():
        raise EngineStateError(
            "flush_cache: vLLM keeps its prefix cache, as with requests under way; start a new engine."
        )
    cast("Any", inside.llm.llm_engine).reset_encoder_cache()


def free_cache(inside: Inside) -> None:
    """Give back the memory of the key-value cache.

    Args:
        inside: a running vLLM without requests, which was made to forget what is in it.
    """
    storages = [tensor.untyped_storage() for tensor in inside.runner.kv_caches]
    inside.cache_bytes = tuple(storage.nbytes() for storage in storages)
    for storage in storages:
        storage.resize_(0)


def restore_cache(inside: Inside) -> None:
    """Allot the memory of the key-value cache again.

    Args:
        inside: a vLLM whose cache was freed.
    """
    for tensor, size in zip(inside.runner.kv_caches, inside.cache_bytes, strict=True):
        tensor.untyped_storage().resize_(size)
        tensor.zero_()


def stop_inside(inside: Inside) -> None:
    """Free everything, and leave a process group alone that is somebody else's.

    Args:
        inside: a running vLLM.
    """
    core = cast("Any", inside.llm.llm_engine).engine_core.engine_core
    with undisturbed():
        core.structured_output_manager.clear_backend()
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        import_module("vllm.envs").disable_envs_cache()
        _leave_groups(owns_group=inside.owns_group)


def _leave_groups(*, owns_group: bool) -> None:
    state = cast("Any", import_module("vllm.distributed.parallel_state"))
    state.destroy_model_parallel()
    if owns_group:
        state.destroy_distributed_environment()
        return
    if state._WORLD is not None:  # noqa: SLF001 (the public way destroys the default group, too)
        state._WORLD.destroy()  # noqa: SLF001
    state._WORLD = state._NODE_COUNT = None  # noqa: SLF001
