"""The inside of SGLang, of the versions that `package` names: how it is started as a guest, asked, and stopped.

SGLang's own engine starts two more processes, speaks with them in pickles over sockets, and when one of them dies it
kills the process that asked. Here its scheduler runs in the process that asks, one step after the other: no process, no
socket, no pickle. Here and in `groups`, `requests`, `sampler` and `load` is all that leans
on what SGLang does not promise.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore  # under `torch.distributed` it is not exported to type checkers

from lightrft.backends.rollout.request_checks import placeholders
from lightrft.backends.rollout.sglang.groups import alone, leave
from lightrft.backends.rollout.sglang.handle import Inside
from lightrft.backends.rollout.sglang.images import forget_images
from lightrft.backends.rollout.sglang.package import Request, Scheduler, Sglang, undisturbed
from lightrft.backends.rollout.sglang.sampler import own_sampler
from lightrft.errors import ConfigError, EngineStateError, UnsupportedError
from lightrft.models.positions import without_weights
from lightrft.strategy.protocols.images import Processor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "forget",
    "free_cache",
    "restore_cache",
    "start_inside",
    "stop_inside",
]

_KEPT_TOKENS = 6
"""Tokens of a context and of the cache that SGLang keeps from every prompt."""


def start_inside(
    package: Sglang,
    model: PreTrainedModel,
    *,
    processor: Processor | None,
    context: int | None,
    batch_size: int,
    cache_bytes: int,
) -> Inside:
    """Return a running SGLang with a model's architecture, and weights of no meaning.

    Args:
        package: SGLang.
        model: gives architecture and dtype.
        processor: the model's, if it shall read images.
        context: tokens of the longest sequence; None takes what SGLang reads off the architecture.
        batch_size: bound on the sequences that are decoded at once.
        cache_bytes: size of the key-value cache.

    Raises:
        UnsupportedError: SGLang does not run this model.
        ConfigError: the cache does not hold one sequence.
        EngineStateError: another one runs in this process.
    """
    if package.parallel_state.model_parallel_is_initialized():
        raise EngineStateError(
            "engine='sglang' runs in this process already and its groups are of the whole process; close it."
        )
    owns_group, requests = not dist.is_initialized(), cast("list[Request]", [])
    num_tokens = _cache_tokens(model, context, cache_bytes)
    with undisturbed(), tempfile.TemporaryDirectory() as directory:
        _write_config(model, directory)
        if owns_group:
            # with a store in memory nothing is written and no other process can come in
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            args = _arguments(package, model, directory, context=context, batch_size=batch_size, num_tokens=num_tokens)
            package.runtime_context.publish(
                args, role="scheduler", ranks=package.runtime_context.SpawnRanks(world_rank=0, gpu_id=0)
            )
            with alone(package):
                scheduler = cast("Scheduler", _guest(package, requests)(args, _no_ports(package)))
        except Exception as error:
            leave(package, owns_group=owns_group)
            said = " ".join(str(error).split())[:300]
            raise UnsupportedError(
                f"model={type(model).__name__} does not start in SGLang ({said}); use the engine 'hf', or another "
                "architecture."
            ) from error
    runner = scheduler.tp_worker.model_runner
    never = placeholders(processor)
    runner.sampler = own_sampler(
        package, never
    )  # there is a name for samplers of others, and on a CPU it is not heeded
    return Inside(
        package=package,
        scheduler=scheduler,
        model=runner.model,
        requests=requests,
        owns_group=owns_group,
        processor=processor,
        architecture=None if processor is None else without_weights(model),
    )


def _cache_tokens(model: PreTrainedModel, context: int | None, cache_bytes: int) -> int:
    """Return how many tokens the cache holds; SGLang counts in tokens."""
    config: PretrainedConfig = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    num_tokens, needed = cache_bytes // int(per_token), (context or 1) + _KEPT_TOKENS
    if num_tokens < needed:
        raise ConfigError(
            f"cache_gb={cache_bytes / 1e9!r} does not suffice for one sequence of {context or 1} tokens "
            f"({needed * per_token / 1e9:.3g} GB); raise it."
        )
    return num_tokens


def _write_config(model: PreTrainedModel, directory: str) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)


def _arguments(
    package: Sglang,
    model: PreTrainedModel,
    directory: str,
    *,
    context: int | None,
    batch_size: int,
    num_tokens: int,
) -> object:
    args = package.server_args.ServerArgs(
        model_path=directory,
        skip_tokenizer_init=True,
        trust_remote_code=False,
        load_format="dummy",
        dtype=str(model.dtype).removeprefix("torch."),
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        disable_cuda_graph=True,
        disable_overlap_schedule=True,  # one step after the other
        max_total_tokens=num_tokens,
        max_running_requests=batch_size,
        enable_p2p_check=True,  # or else it replaces a function of torch
        log_level="error",
        random_seed=0,
        **({} if context is None else {"context_length": context + _KEPT_TOKENS}),
    )
    args.resolve_once()
    args.check_server_args()
    return args


def _no_ports(package: Sglang) -> object:
    return package.server_args.PortArgs(
        tokenizer_ipc_name="",
        scheduler_input_ipc_name="",
        detokenizer_ipc_name="",
        nccl_port=0,
        rpc_ipc_name="",
        metrics_ipc_name="",
        tokenizer_worker_ipc_name=None,
        decoupled_spec_ipc_config=None,
    )


def _guest(package: Sglang, requests: list[Request]) -> Callable[[object, object], object]:
    """Return SGLang's scheduler without sockets and watchdogs; it notes its requests and tells the sampler of them."""
    base = package.scheduler.Scheduler

    def init_ipc_channels(scheduler: Any, ports: object) -> None:
        del ports
        nobody = SimpleNamespace(send_output=_send_nothing)
        scheduler.ipc_channels = SimpleNamespace(
            recv_from_tokenizer=None,
            recv_from_rpc=None,
            send_to_tokenizer=nobody,
            send_to_detokenizer=nobody,
            send_metrics_from_scheduler=None,
        )
        scheduler.load_snapshot_writer = scheduler.recv_from_tokenizer = None

    def init_soft_watchdog(scheduler: Any) -> None:
        del scheduler

    def init_watch_dog_memory_saver_input_blocker(scheduler: Any) -> None:
        # a watchdog would kill the process that asks when nobody asks for five minutes
        scheduler.watchdog = scheduler.recv_skipper = scheduler.input_blocker = None
        scheduler.memory_saver_adapter = package.scheduler.TorchMemorySaverAdapter.create(enable=False)

    def _create_generation_req(scheduler: Any, received: object, *args: object, **kwargs: object) -> Request:
        request: Request = base._create_generation_req(scheduler, received, *args, **kwargs)  # noqa: SLF001 (made to be replaced)
        request.eos_token_ids = set()  # stop tokens are those of the request
        requests.append(request)
        return request

    def run_batch(scheduler: Any, batch: Any, *args: object) -> object:
        scheduler.tp_worker.model_runner.sampler.rows = batch.reqs
        return base.run_batch(scheduler, batch, *args)

    replaced = (
        init_ipc_channels,
        init_soft_watchdog,
        init_watch_dog_memory_saver_input_blocker,
        _create_generation_req,
        run_batch,
    )
    kind: object = type("GuestScheduler", (base,), {function.__name__: function for function in replaced})
    return cast("Callable[[object, object], object]", kind)


def _send_nothing(output: object, request: object = None) -> None:
    del output, request


def forget(inside: Inside) -> None:
    """Forget the keys and values of earlier prompts, and what was computed of images.

    Args:
        inside: a running SGLang.

    Raises:
        EngineStateError: requests are under way.
    """
    if not inside.scheduler.flush_cache(empty_cache=False):
        raise EngineStateError(
            "flush_cache: SGLang keeps its prefix cache, as with requests under way; start a new engine."
        )
    forget_images(inside.package)


def free_cache(inside: Inside) -> None:
    """Give back the memory of the key-value cache.

    Args:
        inside: a running SGLang without requests, which was made to forget what is in it.
    """
    storages = [tensor.untyped_storage() for tensor in _cache(inside)]
    inside.cache_bytes = tuple(storage.nbytes() for storage in storages)
    for storage in storages:
        storage.resize_(0)


def restore_cache(inside: Inside) -> None:
    """Allot the memory of the key-value cache again.

    Args:
        inside: a SGLang whose cache was freed.
    """
    for tensor, size in zip(_cache(inside), inside.cache_bytes, strict=True):
        tensor.untyped_storage().resize_(size)
        tensor.zero_()


def _cache(inside: Inside) -> list[torch.Tensor]:
    pool = inside.scheduler.tp_worker.model_runner.token_to_kv_pool
    return [*pool.k_buffer, *pool.v_buffer]


def stop_inside(inside: Inside) -> None:
    """Free everything, and leave a process group alone that is somebody else's.

    Args:
        inside: a running SGLang.
    """
    with undisturbed():
        inside.scheduler.release_host_resources()
        leave(inside.package, owns_group=inside.owns_group)
