"""What a strategy is built from: one frozen record, from arguments of any kind."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar, cast

import attrs

from lightrft.config._attributes import attributes
from lightrft.config._canonical import copied, pair, plain, real, texts
from lightrft.config._checks import (
    are_texts,
    at_least,
    between,
    is_bool,
    is_name,
    is_text,
    named,
    one_of,
    optional,
    two_shares,
)
from lightrft.config._names import NOT_A_SETTING, one_edit, setting_fields
from lightrft.config.redaction import redacted, shown
from lightrft.errors import ConfigError

__all__ = ["LONGEST_TIMEOUT", "SCHEDULERS", "StrategyConfig"]

_Default = TypeVar("_Default")
_SHORTEST_WARNED = 6

SCHEDULERS = ("constant", "cosine", "linear")
"""Names of the learning-rate schedules; each starts with a linear warm-up of `lr_warmup_ratio`."""

LONGEST_TIMEOUT = 31_536_000.0
"""Seconds of a year: longer than any run waits, and short enough for every clock that counts down from it."""


@attrs.frozen(kw_only=True, slots=False)  # no slots: `vars(config)` is a way back to `from_args`
class StrategyConfig:
    """The settings of a training strategy.

    Attributes:
        strategy: registry key. None chooses by `fsdp`: "fsdp2" when it is true, else "deepspeed".
        seed: seed of every random stream; rank r uses streams that are a function of (seed, r).
        max_norm: bound on the global gradient norm; 0 means no clipping.
        micro_train_batch_size: samples of one forward and backward on one rank.
        train_batch_size: samples of one optimizer step over all ranks.
        bf16: compute in bfloat16 over float32 parameters. Off by default: on a CPU it is far slower than float32.
        zero_stage: ZeRO stage (0 to 3) of the strategy "deepspeed".
        zero_bucket_size: elements that "deepspeed" exchanges at a time: more are faster, and need that much memory.
        zero_overlap_comm: let stages 2 and 3 exchange gradients while the backward pass goes on; on CUDA alone.
        zero_persistence_threshold: elements up to which stage 3 keeps a parameter whole on every rank, because
            gathering it takes longer than it is worth.
        zero_hpz: ranks that hold a second copy of the shards of stage 3 among them, so that the backward pass gathers
            inside of a machine alone; 1 means none.
        zero_offload_optimizer: keep the optimizer state of stages 1 to 3 in main memory; on a CPU it is.
        zero_offload_param: keep the shards of stage 3 in main memory; on a CPU they are.
        fsdp: choose "fsdp2" when `strategy` names nothing.
        fsdp_wrap: class names of the layers that "fsdp2" gathers one at a time. Empty takes what a model of
            transformers names itself, and gathers any other model as a whole.
        fsdp_replicate: copies of the shards of "fsdp2": with 1 the parameters are spread over all ranks; with n, over
            world size / n ranks each, so that whole parameters are gathered inside of a machine alone.
        fsdp_reshard_after_forward: let "fsdp2" give a layer's whole parameters up after its forward pass, and gather
            them again for its backward pass: less memory, more communication.
        fsdp_sum_once: let "fsdp2" sum gradients over ranks once a window, with its last micro-batch, where `backward`
            is told which one that is: least communication, but each rank holds whole gradients until then. False sums
            after every micro-batch and holds shards alone.
        fsdp_cpu_offload: keep parameters, gradients and optimizer state of "fsdp2" in main memory; on a CPU they are.
        gradient_checkpointing: let "fsdp2" keep the inputs of layers alone, and compute the rest again in the backward
            pass: less memory, a third more arithmetic.
        compile_layers: let "fsdp2" compile each layer with torch.compile when it is first called.
        actor_learning_rate: peak learning rate of the actor.
        critic_learning_rate: peak learning rate of the critic.
        adam_betas: coefficients of AdamW's two running averages.
        l2: decoupled weight decay, applied to matrices alone (norms and biases are left alone).
        lr_scheduler: one of `SCHEDULERS`.
        lr_warmup_ratio: share of all optimizer steps over which the learning rate rises linearly.
        min_lr_ratio: final learning rate of a decaying schedule as a share of the peak.
        engine_type: registry key of the rollout engine.
        enable_engine_sleep: let `maybe_sleep_inference_engine` put the engine to sleep.
        timeout: seconds after which a collective that not all ranks entered is an error.
        extra_args: attributes of the original arguments that are no setting of a strategy.
        args: the object that `from_args` was given; None otherwise. Not compared and not printed.
    """

    strategy: str | None = attrs.field(default=None, validator=optional(is_name))
    seed: int = attrs.field(default=42, validator=at_least(0, whole=True))
    max_norm: float = attrs.field(default=1.0, converter=real, validator=at_least(0))
    micro_train_batch_size: int = attrs.field(default=1, validator=at_least(1, whole=True))
    train_batch_size: int = attrs.field(default=1, validator=at_least(1, whole=True))
    bf16: bool = attrs.field(default=False, validator=is_bool)
    zero_stage: int = attrs.field(default=2, validator=between(0, 3, whole=True))
    zero_bucket_size: int = attrs.field(default=50_000_000, validator=at_least(2, whole=True))
    zero_overlap_comm: bool = attrs.field(default=True, validator=is_bool)
    zero_persistence_threshold: int = attrs.field(default=100_000, validator=at_least(0, whole=True))
    zero_hpz: int = attrs.field(default=1, validator=at_least(1, whole=True))
    zero_offload_optimizer: bool = attrs.field(default=False, validator=is_bool)
    zero_offload_param: bool = attrs.field(default=False, validator=is_bool)
    fsdp: bool = attrs.field(default=False, validator=is_bool)
    fsdp_wrap: tuple[str, ...] = attrs.field(default=(), converter=texts, validator=are_texts)
    fsdp_replicate: int = attrs.field(default=1, validator=at_least(1, whole=True))
    fsdp_reshard_after_forward: bool = attrs.field(default=True, validator=is_bool)
    fsdp_sum_once: bool = attrs.field(default=True, validator=is_bool)
    fsdp_cpu_offload: bool = attrs.field(default=False, validator=is_bool)
    gradient_checkpointing: bool = attrs.field(default=False, validator=is_bool)
    compile_layers: bool = attrs.field(default=False, validator=is_bool)
    actor_learning_rate: float = attrs.field(default=1e-5, converter=real, validator=at_least(0))
    critic_learning_rate: float = attrs.field(default=1e-5, converter=real, validator=at_least(0))
    adam_betas: tuple[float, float] = attrs.field(default=(0.9, 0.95), converter=pair, validator=two_shares)
    l2: float = attrs.field(default=0.0, converter=real, validator=at_least(0))
    lr_scheduler: str = attrs.field(default="cosine", validator=one_of(SCHEDULERS))
    lr_warmup_ratio: float = attrs.field(default=0.03, converter=real, validator=between(0, 1))
    min_lr_ratio: float = attrs.field(default=0.1, converter=real, validator=between(0, 1))
    engine_type: str = attrs.field(default="hf", validator=is_text)
    enable_engine_sleep: bool = attrs.field(default=False, validator=is_bool)
    timeout: float = attrs.field(default=1800.0, converter=real, validator=between(0, LONGEST_TIMEOUT, above_low=True))
    extra_args: Mapping[str, object] = attrs.field(
        factory=dict[str, object], converter=copied, validator=named, repr=redacted, eq=plain
    )
    args: object = attrs.field(default=None, repr=False, eq=False, metadata=NOT_A_SETTING)

    def __attrs_post_init__(self) -> None:
        """Check what several settings say together."""
        if self.train_batch_size % self.micro_train_batch_size:
            low = self.train_batch_size // self.micro_train_batch_size * self.micro_train_batch_size
            high = low + self.micro_train_batch_size
            raise ConfigError(
                f"train_batch_size={self.train_batch_size} is not divisible by "
                f"micro_train_batch_size({self.micro_train_batch_size}); use {f'{low} or ' if low else ''}{high}."
            )

    @classmethod
    def from_args(cls, args: object) -> StrategyConfig:
        """Return the typed settings among the attributes of any object.

        Nothing is refused for its name: what is no setting of a strategy is kept in `extra_args`. A name that is one
        character away from a setting that was not given is kept there too, with a warning. For a mapping whose every
        key must be a setting there is `from_mapping`.

        Args:
            args: an `argparse.Namespace`, any object with attributes (its own or its class's), a mapping, or a
                StrategyConfig, which is returned as it is. None for a setting means "not given", as argparse has it:
                the default holds. An attribute `extra_args` must be a mapping and is joined with the rest; the name
                `args` is reserved for the object itself.

        Raises:
            ConfigError: a value has the wrong type or is out of range, or `args` has no attributes.

        Example:
            >>> import argparse
            >>> config = StrategyConfig.from_args(argparse.Namespace(seed=7, max_norm=None, reward_url="http://localhost"))
            >>> config.seed, config.max_norm, config.extra_args
            (7, 1.0, {'reward_url': 'http://localhost'})
        """
        if isinstance(args, cls):
            return args
        known = set(setting_fields(cls)) - {"extra_args"}
        given = attributes(args, wanted=known)
        settings = {name: value for name, value in given.items() if name in known and value is not None}
        rest = {name: value for name, value in given.items() if name not in known | {"extra_args", "args"}}
        _warn_of_misspelt(rest, unused=known - set(settings))
        # the validators hold every value to its type, so the unchecked keywords are safe
        return cls(**settings, extra_args={**_extra(given), **rest}, args=args)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object], *, source: str = "config") -> StrategyConfig:
        """Return the settings that a mapping names, every key of which must be one.

        Args:
            mapping: settings by name. Lists stand for tuples; keys of your own go into its table `extra_args`.
            source: where the mapping is from, for messages.

        Raises:
            ConfigError: a key is no setting, or a value has the wrong type or is out of range; one line for each.

        Example:
            >>> StrategyConfig.from_mapping({"seed": 7, "adam_betas": [0.9, 0.99]}).adam_betas
            (0.9, 0.99)
        """
        from lightrft.config._structuring import structure

        return attrs.evolve(structure(cls, mapping, source=source), args=mapping)

    def get_extra_arg(self, name: str, default: _Default) -> _Default:
        """Return the extra argument `name`, or `default` when the original arguments had none.

        Args:
            name: attribute of the original arguments.
            default: what to return without it; its type is the type that the caller gets.
        """
        return cast("_Default", self.extra_args.get(name, default))


def _extra(given: Mapping[str, object]) -> Mapping[str, object]:
    extra = given.get("extra_args")
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):
        raise ConfigError(f"extra_args={shown(extra)} is not a mapping; pass a mapping of names to values.")
    return cast("Mapping[str, object]", extra)


def _warn_of_misspelt(rest: Iterable[str], *, unused: Collection[str]) -> None:
    for name in rest:
        for setting in sorted(unused):
            # short names are one character apart by chance (l1 and l2)
            if len(setting) >= _SHORTEST_WARNED and one_edit(name, setting):
                warnings.warn(
                    f"{name} is no setting of a strategy and is kept in extra_args; if {setting} was meant, rename it.",
                    stacklevel=3,
                )
