"""The memory of one optimizer step, measured by taking it in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import cast

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.zero.shards import is_partitioned, shard_of
from lightrft.config.root import Config
from lightrft.loops.learn import learn
from lightrft.models.build import build_model_and_tokenizer
from lightrft.planning.run import is_recomputed
from lightrft.strategy.build import get_strategy
from lightrft.strategy.protocols.rollout import Completion
from lightrft.strategy.protocols.training import StepResult
from lightrft.strategy.record import Strategy

__all__ = ["local_bytes", "measure_step"]


def measure_step(config: Config, *, prompt_tokens: int) -> dict[str, int]:
    """Return the bytes of what one optimizer step holds, by the names that the estimate has for them.

    The model learns from made-up completions of the greatest length, two micro-batches at most. "all" is what the
    process took in all: on CUDA the peak of what torch allocated, else the growth of its resident memory.

    Args:
        config: the run; its strategy starts and is torn down again.
        prompt_tokens: of each prompt.
    """
    micro = config.strategy.micro_train_batch_size
    size = min(config.strategy.train_batch_size, 2 * micro)
    strategy = get_strategy(attrs.evolve(config.strategy, train_batch_size=size))
    strategy.setup_distributed()
    try:
        return _measure(strategy, config, [_completion(config, prompt_tokens, number) for number in range(size)])
    finally:
        strategy.teardown()


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the parts that this rank has of tensors.

    Args:
        tensors: whole, or spread over ranks.

    Example:
        >>> local_bytes([torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)])
        16
    """
    return sum(own.numel() * own.element_size() for own in map(_own_part, tensors))


def _own_part(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return shard_of(tensor) if is_partitioned(tensor) else tensor


def _completion(config: Config, prompt_tokens: int, number: int) -> Completion:
    length = config.engine.max_new_tokens
    return Completion(
        prompt_ids=(0,) * prompt_tokens,
        token_ids=(0,) * length,
        logprobs=(0.0,) * length,
        finish_reason="length",
        weight_version=0,
        sample_index=number,
    )


def _measure(strategy: Strategy, config: Config, completions: list[Completion]) -> dict[str, int]:
    before = strategy.report_memory("before")
    model, _ = build_model_and_tokenizer(config.model, seed=config.strategy.seed)
    copied = copy.deepcopy(model) if config.algorithm.kl_coef else None
    actor, _, _, reference = strategy.prepare_models_and_optimizers(model, None, None, copied, None, 1)
    seen: dict[str, int] = {}
    if reference is not None:
        seen["reference model"] = local_bytes(strategy.unwrap_model(reference).parameters())
    with torch.autograd.graph.saved_tensors_hooks(_build_note(kept := dict[int, tuple[str, int]]()), _as_it_is):
        learn(
            _watched(strategy, seen, kept),
            actor,
            completions,
            torch.ones(len(completions)),
            algorithm=config.algorithm,
            temperature=config.engine.temperature,
            max_new_tokens=config.engine.max_new_tokens,
            train_batch_size=len(completions),
            micro_train_batch_size=config.strategy.micro_train_batch_size,
            reference=reference,
        )
    after = strategy.report_memory("after")
    seen["all"] = after.peak_allocated or after.resident - before.resident
    if is_recomputed(config.strategy):
        seen["activations, recomputed"] = seen.pop("activations")
    return {name: num_bytes for name, num_bytes in seen.items() if num_bytes > 0}


def _watched(strategy: Strategy, seen: dict[str, int], kept: dict[int, tuple[str, int]]) -> Strategy:
    """Return the strategy with a look at its tensors before each backward pass, and before and after each step."""

    def backward(
        loss: Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float | None = None,
        is_boundary: bool | None = None,
    ) -> None:
        for name in {name for name, _ in kept.values()}:
            total = sum(num_bytes for of, num_bytes in kept.values() if of == name)
            seen[name] = max(total, seen.get(name, 0))
        strategy.backward(loss, model, optimizer, weight=weight, is_boundary=is_boundary)
        kept.clear()

    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        if is_boundary:
            parameters = list(strategy.unwrap_model(model).parameters())
            seen["parameters"] = local_bytes(parameters)
            seen["gradients"] = local_bytes(one.grad for one in parameters if one.grad is not None)
        result = strategy.optimizer_step(optimizer, model, scheduler, is_boundary=is_boundary)
        states = cast("dict[Tensor, dict[str, object]]", optimizer.state).values()
        seen["optimizer state"] = local_bytes(
            one for state in states for one in state.values() if isinstance(one, Tensor)
        )
        return result

    return attrs.evolve(strategy, backward=backward, optimizer_step=optimizer_step)


def _build_note(kept: dict[int, tuple[str, int]]) -> Callable[[Tensor], Tensor]:
    def note(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base  # noqa: SLF001
        storage = tensor.untyped_storage()
        if not isinstance(base, nn.Parameter):
            # what is kept lives until the backward pass, so no two of them have one address
            kept[storage._cdata] = (_kind(base), storage.nbytes())  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        return tensor

    return note


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _kind(tensor: Tensor) -> str:
    """Return the name of the line that counts a tensor: a weight that was made bfloat16 is no activation."""
    made = tensor.grad_fn
    if made is None or made.name() != "ToCopyBackward0":
        return "activations"
    is_of_weight = any(before is not None and "AccumulateGrad" in before.name() for before, _ in made.next_functions)
    return "bfloat16 copies" if is_of_weight else "activations"
