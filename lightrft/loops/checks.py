"""Settings of different sections that contradict one another, said before anything is computed."""

from __future__ import annotations

from lightrft.config.root import Config
from lightrft.config.strategy import StrategyConfig
from lightrft.errors import ConfigError

__all__ = ["check_settings", "check_shares", "check_world"]


def check_settings(config: Config) -> None:
    """Refuse settings that would end the run at its first rollout or first step, or that have no effect.

    Args:
        config: the run's configuration.

    Raises:
        ConfigError: the first contradiction.

    Example:
        >>> check_settings(Config())
    """
    _check_batches(config)
    _check_engine(config)
    _check_lengths(config)
    _check_loss(config)
    _check_staleness(config)
    if config.algorithm.reward_running_norm_minus_mean and not config.algorithm.reward_running_norm:
        raise ConfigError(
            "algorithm.reward_running_norm_minus_mean=True has no effect without algorithm.reward_running_norm; "
            "set both, or neither."
        )


def check_world(config: Config, num_ranks: int) -> None:
    """Refuse a number of ranks among which the work of a step cannot be shared out evenly.

    Args:
        config: the run's configuration.
        num_ranks: how many there are.

    Raises:
        ConfigError: the first number that does not divide.

    Example:
        >>> check_world(Config(), 1)
    """
    check_shares(config.strategy.train_batch_size, config.strategy.micro_train_batch_size, num_ranks)
    prompts = config.algorithm.prompts_per_step
    if prompts % num_ranks:
        raise ConfigError(
            f"algorithm.prompts_per_step={prompts} is not divisible by world_size({num_ranks}); "
            f"use {_multiples(prompts, num_ranks)}."
        )


def check_shares(train_batch_size: int, micro_train_batch_size: int, num_ranks: int) -> None:
    """Refuse a batch that is not made of whole micro-batches of all ranks.

    Args:
        train_batch_size: completions of one optimizer step, on all ranks together.
        micro_train_batch_size: completions of one forward and backward of one rank.
        num_ranks: how many ranks there are.

    Raises:
        ConfigError: it does not divide.
    """
    at_once = micro_train_batch_size * num_ranks
    if train_batch_size % at_once:
        product = f" * world_size({num_ranks}) = {at_once}" if num_ranks > 1 else ""
        raise ConfigError(
            f"train_batch_size={train_batch_size} is not divisible by micro_train_batch_size("
            f"{micro_train_batch_size}){product}; use {_multiples(train_batch_size, at_once)}."
        )


def _multiples(number: int, factor: int) -> str:
    low = number // factor * factor
    return f"{low} or {low + factor}" if low else str(factor)


def _check_batches(config: Config) -> None:
    algorithm, size = config.algorithm, config.strategy.train_batch_size
    samples = algorithm.prompts_per_step * algorithm.num_samples
    if samples % size:
        raise ConfigError(
            f"strategy.train_batch_size={size} does not divide algorithm.prompts_per_step("
            f"{algorithm.prompts_per_step}) * num_samples({algorithm.num_samples}) = {samples}; use {samples} or a "
            "divisor of it."
        )


def _check_engine(config: Config) -> None:
    named, used = config.strategy.engine_type, config.engine.type
    if named not in {used, StrategyConfig().engine_type}:
        raise ConfigError(
            f"strategy.engine_type={named!r} is not engine.type={used!r}, which a run uses; set that one alone."
        )


def _check_lengths(config: Config) -> None:
    buffer, longest = config.algorithm.overlong_buffer, config.engine.max_new_tokens
    if buffer > longest:
        raise ConfigError(
            f"algorithm.overlong_buffer={buffer} is more than engine.max_new_tokens({longest}); use {longest} or less."
        )


def _check_loss(config: Config) -> None:
    loss, bound = config.algorithm.loss, config.algorithm.dual_clip
    if bound is None:
        return
    if loss != "ppo_clip":
        raise ConfigError(
            f"algorithm.dual_clip={bound} has no meaning for loss={loss!r}; leave it out, or set ppo_clip."
        )
    if bound == 1:
        raise ConfigError("algorithm.dual_clip=1.0 is not above 1; use e.g. 3.0, or leave it out.")


def _check_staleness(config: Config) -> None:
    staleness = f"algorithm.max_staleness={config.algorithm.max_staleness}"
    if not config.algorithm.max_staleness:
        return
    if config.algorithm.importance_correction == "none":
        raise ConfigError(
            f"{staleness} learns from what older weights made, and algorithm.importance_correction='none' takes it for "
            "the policy's own; set truncate or mask."
        )
    for setting, is_set in (
        ("strategy.enable_engine_sleep=True", config.strategy.enable_engine_sleep),
        ("run.offload_while_generating=True", config.run.offload_while_generating),
    ):
        if is_set:
            raise ConfigError(
                f"{staleness} generates while the policy learns, and {setting} has them take turns in memory; "
                "keep one of the two."
            )
    if config.strategy.compile_layers:
        raise ConfigError(
            f"{staleness} generates while the policy learns, and an engine may switch torch.compile off for the whole "
            "process meanwhile; leave strategy.compile_layers=True out."
        )
