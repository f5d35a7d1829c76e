"""Hypothesis strategies that draw valid configurations, for property tests of anything that takes one."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from lightrft.config import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RunConfig,
    StrategyConfig,
)
from lightrft.config.redaction import is_secret
from lightrft.config.sections import (
    ADAPTER_NAMES,
    ADVANTAGE_NAMES,
    AGGREGATION_NAMES,
    CORRECTION_NAMES,
    KL_NAMES,
    LOSS_NAMES,
    PROCESS_NAMES,
    TRANSPORT_NAMES,
)
from lightrft.config.strategy import LONGEST_TIMEOUT, SCHEDULERS

__all__ = ["configs", "plain_tables", "strategy_configs"]

_RESERVED = frozenset({*vars(StrategyConfig()), "args"})


def _texts() -> SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)  # any Unicode, which lone surrogates are not


def _names() -> SearchStrategy[str]:
    return _texts().filter(bool)


def _counts(low: int = 0) -> SearchStrategy[int]:
    return st.integers(low, 10_000)


def _amounts(low: float = 0.0, high: float | None = None) -> SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


def plain_tables() -> SearchStrategy[dict[str, object]]:
    """Return a strategy for tables that TOML and JSON can hold, as `task_options` is one, without secrets."""
    keys = _texts().filter(_is_free)
    scalars = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _texts()
    values = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=5
    )
    return st.dictionaries(keys, values, max_size=3)


def _is_free(name: str) -> bool:
    return name not in _RESERVED and not is_secret(name)


@st.composite
def strategy_configs(draw: DrawFn) -> StrategyConfig:
    """Return a strategy for every setting of a strategy at once."""
    micro_train_batch_size = draw(st.integers(1, 64))
    shares = st.floats(0, 1, exclude_max=True)
    return StrategyConfig(
        strategy=draw(st.none() | _names()),
        seed=draw(_counts()),
        max_norm=draw(_amounts()),
        micro_train_batch_size=micro_train_batch_size,
        train_batch_size=micro_train_batch_size * draw(st.integers(1, 64)),
        bf16=draw(st.booleans()),
        zero_stage=draw(st.integers(0, 3)),
        fsdp=draw(st.booleans()),
        actor_learning_rate=draw(_amounts()),
        critic_learning_rate=draw(_amounts()),
        adam_betas=(draw(shares), draw(shares)),
        l2=draw(_amounts()),
        lr_scheduler=draw(st.sampled_from(SCHEDULERS)),
        lr_warmup_ratio=draw(_amounts(0, 1)),
        min_lr_ratio=draw(_amounts(0, 1)),
        engine_type=draw(_texts()),
        enable_engine_sleep=draw(st.booleans()),
        timeout=draw(st.floats(0, LONGEST_TIMEOUT, exclude_min=True)),
        extra_args=draw(plain_tables()),
    )


def _engines() -> SearchStrategy[EngineConfig]:
    return st.tuples(st.sampled_from(PROCESS_NAMES), st.sampled_from(ADAPTER_NAMES)).flatmap(_engines_with)


def _engines_with(process_and_adapters: tuple[str, str]) -> SearchStrategy[EngineConfig]:
    process, adapters = process_and_adapters
    return st.builds(
        EngineConfig,
        type=_names(),
        temperature=_amounts(),
        top_p=st.floats(0, 1, exclude_min=True),
        top_k=_counts(),
        max_new_tokens=_counts(1),
        min_new_tokens=_counts(),
        batch_size=_counts(1),
        script=st.lists(_texts(), max_size=3).map(tuple),
        process=st.just(process),
        transport=st.sampled_from(TRANSPORT_NAMES) if process == "own" else st.just("memory"),
        adapters=st.just(adapters),
        timeout_seconds=st.floats(0, LONGEST_TIMEOUT, exclude_min=True),
        tensor_parallel_size=_counts(1) if (process, adapters) == ("trainer", "merged") else st.just(1),
        url=st.sampled_from(["", "http://127.0.0.1:30000", "https://[::1]:8443/"]),
    )


def _algorithms() -> SearchStrategy[AlgorithmConfig]:
    return st.builds(
        AlgorithmConfig,
        num_samples=_counts(2),
        prompts_per_step=_counts(1),
        advantage=st.sampled_from(ADVANTAGE_NAMES),
        loss=st.sampled_from(LOSS_NAMES),
        aggregation=st.sampled_from(AGGREGATION_NAMES),
        clip_low=_amounts(0, 1),
        clip_high=_amounts(),
        dual_clip=st.none() | _amounts(1),
        num_epochs=_counts(1),
        kl_coef=_amounts(),
        kl_estimator=st.sampled_from(KL_NAMES),
        entropy_coef=_amounts(),
        importance_correction=st.sampled_from(CORRECTION_NAMES),
        importance_cap=_amounts(1),
        reward_clip=_amounts(),
        reward_running_norm=st.booleans(),
        reward_running_norm_minus_mean=st.booleans(),
        overlong_buffer=_counts(),
        overlong_penalty=_amounts(),
        dynamic_sampling=st.booleans(),
    )


@st.composite
def _data(draw: DrawFn) -> DataConfig:
    task, path = draw(st.tuples(st.none(), st.none() | _names()) | st.tuples(_names(), st.none()))
    return DataConfig(
        task=task,
        task_options=draw(plain_tables()),
        path=path,
        heldout_path=draw(st.none() | _names()),
        train_size=draw(_counts()),
        heldout_size=draw(_counts(1)),
        template=f"{draw(_texts())}{{question}}{draw(_texts())}",
        reward=draw(st.none() | _names()),
        seed=draw(_counts()),
    )


@st.composite
def _models(draw: DrawFn) -> ModelConfig:
    groups, per_group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    num_heads = groups * per_group
    return ModelConfig(
        path=draw(st.none() | _names()),
        architecture=draw(_names()),
        hidden_size=2 * num_heads * draw(st.integers(1, 64)),
        intermediate_size=draw(_counts()),
        num_layers=draw(_counts(1)),
        num_heads=num_heads,
        num_key_value_heads=draw(st.sampled_from([0, groups, num_heads])),
        max_length=draw(_counts(2)),
        tie_embeddings=draw(st.booleans()),
        alphabet=draw(_texts()),
    )


def _checkpoints() -> SearchStrategy[CheckpointConfig]:
    return st.builds(
        CheckpointConfig,
        save_every=_counts(),
        save_minutes=_amounts(),
        max_num=_counts(1),
        max_mem=st.none() | _amounts(),
        keep_every=_counts(),
        keep_best=_counts(),
        save_in_background=st.booleans(),
    )


def _runs() -> SearchStrategy[RunConfig]:
    return st.builds(
        RunConfig,
        dir=_names(),
        num_steps=_counts(),
        evaluate_every=_counts(),
        warmup_steps=_counts(),
        warmup_batch_size=_counts(1),
        warmup_size=_counts(),
        warmup_learning_rate=_amounts(),
        threads=st.integers(0, 1024),
    )


def configs() -> SearchStrategy[Config]:
    """Return a strategy for every setting of a run at once: valid as a record, though no run may be able to use it."""
    return st.builds(
        Config,
        strategy=strategy_configs(),
        engine=_engines(),
        algorithm=_algorithms(),
        data=_data(),
        model=_models(),
        checkpoint=_checkpoints(),
        run=_runs(),
    )
