"""From a run's configuration and a number of ranks to the memory of one of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightrft.algorithms.chunked_head import max_chunk_rows
from lightrft.config.root import Config
from lightrft.config.strategy import StrategyConfig
from lightrft.data.prompts import Problem
from lightrft.errors import ConfigError
from lightrft.loops.checks import check_settings, check_world
from lightrft.models.tokenizer import ModelTokenizer, encode_text
from lightrft.planning.line import Line
from lightrft.planning.memory import Sharing, Work, memory_of_rank
from lightrft.planning.sizes import sizes_of
from lightrft.strategy.build import chosen_key
from lightrft.strategy.registry import find_engine, find_strategy

if TYPE_CHECKING:
    from torch import nn

    from lightrft.planning.activations import Computing

__all__ = ["check_ranks", "is_recomputed", "longest_prompt", "memory_of_run", "sharing_of"]

_SUMMED_AT_ONCE = 500_000_000
"""Elements of gradients that DeepSpeed sums over ranks at a time in stage 0."""

_MAX_LIVE = 1_000_000_000
"""Elements of whole parameters up to which DeepSpeed keeps those of stage 3 that will be used again."""


def check_ranks(config: Config, world_size: int) -> None:
    """Refuse settings that contradict one another or choose what nobody registered, and ranks that they do not allow.

    Args:
        config: the run.
        world_size: number of ranks.

    Raises:
        ConfigError: the first contradiction.

    Example:
        >>> check_ranks(Config(strategy=StrategyConfig(train_batch_size=8)), 4)
    """
    check_settings(config)
    if world_size < 1:
        raise ConfigError(f"world_size={world_size} is no number of ranks; use 1 or more.")
    key, copies, near_ranks = chosen_key(config.strategy), config.strategy.fsdp_replicate, config.strategy.zero_hpz
    find_strategy(key)
    find_engine(config.engine.type)
    if key in {"single", "fake"} and world_size > 1:
        raise ConfigError(
            f"world_size={world_size} is more than strategy={key!r} supports, which is one process; set "
            "strategy.strategy=fsdp2 or deepspeed."
        )
    if key == "fsdp2" and world_size % copies:
        raise ConfigError(f"fsdp_replicate={copies} does not divide world_size({world_size}); use one of its divisors.")
    if key == "deepspeed" and config.strategy.zero_stage == 3 and world_size % near_ranks:
        raise ConfigError(f"zero_hpz={near_ranks} does not divide world_size({world_size}); use one of its divisors.")
    check_world(config, world_size)


def longest_prompt(problems: Iterable[Problem], tokenizer: ModelTokenizer) -> int:
    """Return the tokens of the longest prompt.

    Args:
        problems: at least one.
        tokenizer: the model's.

    Raises:
        DataError: a prompt holds a character that the tokenizer does not know.
    """
    return max(len(encode_text(tokenizer, problem.question, where=problem.question)) for problem in problems)


def memory_of_run(config: Config, model: nn.Module, *, world_size: int, on_cpu: bool, prompt_tokens: int) -> list[Line]:
    """Return the parts of the memory of one rank while it learns from a rollout.

    Args:
        config: the run.
        model: its model, plain; its parameters may be on the meta device.
        world_size: number of ranks.
        on_cpu: whether ranks compute on a CPU, where device and main memory are one.
        prompt_tokens: of the longest prompt.

    Raises:
        ConfigError: `fsdp_wrap` names no layer of the model.
    """
    sizes = sizes_of(model, config.strategy.fsdp_wrap if chosen_key(config.strategy) == "fsdp2" else ())
    strategy, answer_tokens = config.strategy, config.engine.max_new_tokens
    vocabulary = 0 if sizes.decoder is None else sizes.decoder.vocabulary
    work = Work(
        # the last token is predicted and not read
        num_positions=strategy.micro_train_batch_size * (prompt_tokens + answer_tokens - 1),
        # logits are formed where a token of the answer is predicted
        chunk_rows=min(max_chunk_rows(vocabulary, on_cpu=on_cpu), strategy.micro_train_batch_size * answer_tokens),
        computing=_computing(strategy),
        is_recomputed=is_recomputed(strategy),
        has_reference=config.algorithm.kl_coef > 0,
        has_engine=config.engine.type == "hf",
        engine_sleeps=strategy.enable_engine_sleep and not on_cpu,
        save_copy=("device" if on_cpu else "host") if config.checkpoint.save_in_background else None,
    )
    return memory_of_rank(sizes, sharing_of(strategy, world_size=world_size, on_cpu=on_cpu), work)


def sharing_of(config: StrategyConfig, *, world_size: int, on_cpu: bool) -> Sharing:
    """Return how ranks share a model; of a strategy that is not ours nothing is known, and each rank has all of it.

    Args:
        config: the settings of the strategy.
        world_size: number of ranks.
        on_cpu: whether ranks compute on a CPU, where nothing is offloaded.

    Example:
        >>> sharing_of(StrategyConfig(fsdp=True, fsdp_replicate=2), world_size=8, on_cpu=True).parameter_ranks
        4
    """
    key = chosen_key(config)
    if key == "fsdp2":
        return _fully_sharded(config, world_size, on_cpu=on_cpu)
    return _by_zero(config, world_size, on_cpu=on_cpu) if key == "deepspeed" else Sharing()


def is_recomputed(config: StrategyConfig) -> bool:
    """Return whether layers keep their inputs alone and are computed again in the backward pass.

    Args:
        config: the settings of the strategy.
    """
    return config.gradient_checkpointing and chosen_key(config) == "fsdp2"


def _computing(config: StrategyConfig) -> Computing:
    if not config.bf16:
        return "float32"
    return "bfloat16" if chosen_key(config) == "fsdp2" else "autocast"


def _fully_sharded(config: StrategyConfig, world_size: int, *, on_cpu: bool) -> Sharing:
    num_ranks = world_size // config.fsdp_replicate
    is_offloaded = config.fsdp_cpu_offload and not on_cpu
    return Sharing(
        parameter_ranks=num_ranks,
        gradient_ranks=num_ranks,
        optimizer_ranks=num_ranks,
        by_rows=True,
        gathered="two layers" if config.fsdp_reshard_after_forward else "all",
        # gradients are summed over ranks when the window is complete, and until then each rank has all of its own
        keeps_gradients_whole=config.fsdp_sum_once
        and config.train_batch_size > config.micro_train_batch_size * world_size,
        offloaded=frozenset({"parameters", "gradients", "optimizer state"} if is_offloaded else ()),
    )


def _by_zero(config: StrategyConfig, world_size: int, *, on_cpu: bool) -> Sharing:
    stage = config.zero_stage
    is_third, is_offloaded = stage == 3, config.zero_offload_optimizer and stage > 0 and not on_cpu
    num_buckets = 2 if config.zero_overlap_comm and stage > 1 and not on_cpu else 1
    offloaded = {"optimizer state", "gradients"} if is_offloaded else set[str]()
    if config.zero_offload_param and is_third and not on_cpu:
        offloaded |= {"parameters"}
    return Sharing(
        parameter_ranks=world_size if is_third else 1,
        gradient_ranks=world_size if stage > 1 else 1,
        optimizer_ranks=world_size if stage else 1,
        whole_up_to=config.zero_persistence_threshold if is_third else 0,
        second_ranks=config.zero_hpz if is_third else 1,
        # float32 shards of stage 3 are stepped in place, unless they are stepped in main memory
        has_copy=stage in {1, 2} or (is_third and is_offloaded),
        gathered="all" if is_third else "none",
        max_gathered=_MAX_LIVE,
        bucket_elements=config.zero_bucket_size if stage else _SUMMED_AT_ONCE,
        num_buckets=num_buckets,
        offloaded=frozenset(offloaded),
    )
