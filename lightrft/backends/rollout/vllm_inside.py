"""The inside of vLLM, of the versions that `vllm_package` names: what its public functions do not reach.

When vLLM learns to do one of these things by itself, or does it otherwise in another version, this is the module that
changes.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

import attrs
import torch
import torch.distributed as dist
from torch import nn

from lightrft.backends.rollout.vllm_package import Llm, RequestOutput, Vllm, undisturbed
from lightrft.errors import ConfigError, EngineStateError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Inside",
    "ModelRunner",
    "begin_load",
    "end_load",
    "free_cache",
    "load",
    "restore_cache",
    "run_requests",
    "start_inside",
    "stop_inside",
]


class ModelRunner(Protocol):
    """What runs the model and owns the key-value cache."""

    kv_caches: list[torch.Tensor]
    model_config: object
    vllm_config: object

    def get_model(self) -> nn.Module:
        """Return vLLM's own model."""
        ...


class _QuantMethod(Protocol):
    def process_weights_after_loading(self, layer: object) -> None: ...


class _Layer(Protocol):
    """A layer whose matrix was rearranged for the CPU."""

    weight: torch.Tensor
    quant_method: _QuantMethod


@attrs.define(kw_only=True, eq=False)
class Inside:
    """A running vLLM; a handle.

    Attributes:
        llm: its outside.
        runner: what is below it.
        model: vLLM's own model.
        parameters: names of the parameters of that model.
        temperature: divides the logits from now on.
        loaded: parameters that the load under way has reached; None outside of a load.
        owns_group: whether the default process group was made for this engine.
        cache_bytes: size of each tensor of the key-value cache.
    """

    llm: Llm
    runner: ModelRunner
    model: nn.Module
    parameters: frozenset[str]
    temperature: float = 1.0
    loaded: set[str] | None = None
    owns_group: bool
    cache_bytes: tuple[int, ...] = ()


def start_inside(
    package: Vllm, model: PreTrainedModel, *, context: int | None, batch_size: int, cache_bytes: int
) -> Inside:
    """Return a running vLLM with a model's architecture, and weights of no meaning.

    Args:
        package: vLLM.
        model: gives architecture and dtype.
        context: tokens of the longest sequence; None takes what vLLM reads off the architecture.
        batch_size: bound on the sequences that are decoded at once.
        cache_bytes: size of the key-value cache.

    Raises:
        UnsupportedError: vLLM does not run this model.
        ConfigError: the cache does not hold one sequence.
        EngineStateError: another one runs in this process.
    """
    if import_module("vllm.distributed.parallel_state").model_parallel_is_initialized():
        raise EngineStateError("engine='vllm' runs in this process already and its groups are of the whole process; close it.")
    owns_group = not dist.is_initialized()
    with undisturbed(), _memory_unbound(), tempfile.TemporaryDirectory() as directory:
        _write_config(model, directory)
        if owns_group:
            # with a store in memory no port is opened and no file is written
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            llm = package.LLM(
                model=directory,
                skip_tokenizer_init=True,
                trust_remote_code=False,
                load_format="dummy",
                generation_config="vllm",  # no sampling settings from elsewhere
                dtype=str(model.dtype).removeprefix("torch."),
                enforce_eager=True,
                distributed_executor_backend="uni",
                max_num_seqs=batch_size,
                kv_cache_memory_bytes=cache_bytes,
                use_tqdm_on_load=False,
                seed=0,
                **({} if context is None else {"max_model_len": context}),
            )
        except Exception as error:
            _leave_groups(owns_group=owns_group)
            raise _refusal(model, error, cache_gb=cache_bytes / 1e9) from error
    # when this is collected it would destroy whatever groups there are then
    cast("Any", llm.llm_engine).engine_core._finalizer.detach()  # noqa: SLF001
    worker = cast("Any", llm.collective_rpc(_itself)[0])
    runner: ModelRunner = worker.model_runner
    own = runner.get_model()
    parameters = frozenset(name for name, _ in own.named_parameters())
    inside = Inside(llm=llm, runner=runner, model=own, parameters=parameters, owns_group=owns_group)
    try:
        _check_heads(inside)
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


def _write_config(model: PreTrainedModel, directory: str) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)


def _refusal(model: nn.Module, error: Exception, *, cache_gb: float) -> Exception:
    said = " ".join(str(error).split())[:300]
    if "KV cache" in said:
        return ConfigError(f"cache_gb={cache_gb!r} does not suffice ({said}); raise it.")
    return UnsupportedError(
        f"model={type(model).__name__} does not start in vLLM ({said}); use the engine 'hf', or another architecture."
    )


def _check_heads(inside: Inside) -> None:
    """Refuse sizes of attention heads that vLLM would refuse at the first token."""
    for layer in inside.model.modules():
        sizes = layer.attn_backend.get_supported_head_sizes() if hasattr(layer, "attn_backend") else []
        if sizes and layer.head_size not in sizes:
            raise UnsupportedError(
                f"head_dim={layer.head_size!r} is not among the sizes that vLLM's attention takes, {sizes}; change "
                "hidden_size or num_heads, or use the engine 'hf'."
            )


def _scale_logits(inside: Inside) -> None:
    """Divide logits by the temperature where they are made: vLLM reports logprobs from before its own division."""
    kind = import_module("vllm.model_executor.layers.logits_processor").LogitsProcessor
    found = [module for module in inside.model.modules() if isinstance(module, kind)]
    if not found:
        raise UnsupportedError(
            f"model={type(inside.model).__name__} makes its logits in a way of its own, whose logprobs at a temperature "
            "cannot be reported; use the engine 'hf'."
        )

    def scale(module: nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        del module, args
        return logits if inside.temperature == 1 else logits / inside.temperature

    for module in found:
        module.register_forward_hook(scale)


def run_requests(
    inside: Inside, requests: Sequence[object], params: Sequence[object], *, temperature: float
) -> Sequence[RequestOutput]:
    """Return what came of each request; whatever ends it before, no request stays behind.

    Args:
        inside: a running vLLM.
        requests: prompts in vLLM's form.
        params: how each is sampled.
        temperature: divides the logits.
    """
    inside.temperature = temperature
    # vLLM draws from torch's global stream even where each request has its own, and compiles a function of one line
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        try:
            return inside.llm.generate(requests, params, use_tqdm=False)
        except BaseException:
            engine = cast("Any", inside.llm.llm_engine)
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise


def begin_load(inside: Inside) -> None:
    """Make the model ready to be loaded anew; a load that was not ended is ended.

    Args:
        inside: a running vLLM.
    """
    if inside.loaded is not None:
        end_load(inside)
    _reload().initialize_layerwise_reload(inside.model)
    inside.loaded = set()


def load(inside: Inside, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load tensors, of which nothing is kept.

    Args:
        inside: a running vLLM whose load has begun.
        tensors: (name, tensor) with transformers' names.
    """
    assert inside.loaded is not None  # noqa: S101 (the life cycle of engines allows no other order)
    storages: set[int] = set()

    def noted() -> Iterable[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            storages.add(tensor.untyped_storage().data_ptr())
            yield name, tensor

    with torch.no_grad(), _in_config(inside):
        inside.loaded |= cast("Any", inside.model).load_weights(noted())
    _keep_nothing(inside, storages)


def _keep_nothing(inside: Inside, storages: set[int]) -> None:
    """Copy what vLLM keeps of the tensors until the other parts of a layer come: they are the caller's, to write to."""
    infos = _reload().layerwise.LAYERWISE_INFO
    for layer in inside.model.modules():
        for _, call in infos[layer].loaded_weights if layer in infos else ():
            tensor = call.arguments["loaded_weight"]
            if tensor.untyped_storage().data_ptr() in storages:
                call.arguments["loaded_weight"] = tensor.clone()


def end_load(inside: Inside) -> frozenset[str]:
    """Return the parameters that the load did not reach, after it has ended.

    Args:
        inside: a running vLLM whose load has begun.
    """
    loaded, inside.loaded = inside.loaded or set(), None
    with torch.no_grad(), _in_config(inside):
        _reload().finalize_layerwise_reload(inside.model, inside.runner.model_config)
        _rearrange_tied(inside.model)
    return inside.parameters - loaded


def _rearrange_tied(model: nn.Module) -> None:
    """Rearrange matrices anew that several layers share: vLLM does it for the layer alone that was loaded by name.

    On a CPU a layer multiplies with a rearranged copy. A head that is tied to the embedding shares its matrix, and has
    a copy of its own, which would stay the old one.
    """
    layers = [cast("_Layer", layer) for layer in model.modules() if hasattr(layer, "cpu_linear")]
    owners = [id(module.weight) for module in model.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]
    for layer in layers:
        if layer.weight.numel() and owners.count(id(layer.weight)) > 1:
            layer.quant_method.process_weights_after_loading(layer)


def free_cache(inside: Inside) -> None:
    """Give back the memory of the key-value cache, and forget what was in it.

    Args:
        inside: a running vLLM without requests.
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
    state = import_module("vllm.distributed.parallel_state")
    state.destroy_model_parallel()
    if owns_group:
        state.destroy_distributed_environment()
        return
    if state._WORLD is not None:
        state._WORLD.destroy()
    state._WORLD = state._NODE_COUNT = None


def _in_config(inside: Inside) -> AbstractContextManager[object]:
    enter: Callable[[object], AbstractContextManager[object]] = import_module("vllm.config").set_current_vllm_config
    return enter(inside.runner.vllm_config)


def _reload() -> ModuleType:
    return import_module("vllm.model_executor.model_loader.reload")
