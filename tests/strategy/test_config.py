from __future__ import annotations

import argparse
import collections
import dataclasses
import pickle
import warnings
from types import MappingProxyType, SimpleNamespace

import attrs
import pytest
from hypothesis import given, settings

import lightrft.config.strategy
from lightrft.errors import ConfigError
from lightrft.strategy.config import SCHEDULERS, StrategyConfig
from lightrft.testing.cases.configs import plain_tables, strategy_configs

KNOWN = {field.name for field in attrs.fields(StrategyConfig)}


class ClassArgs:
    seed = 7
    reward_url = "http://localhost"
    _hidden = 1

    class Nested:
        pass

    @property
    def max_norm(self) -> float:
        return 0.5

    def method(self) -> None:
        raise AssertionError


class SlottedArgs:
    __slots__ = ("colour", "max_norm", "seed")

    def __init__(self) -> None:
        self.seed = 7
        self.colour = "red"


@dataclasses.dataclass
class DataclassArgs:
    seed: int = 7
    colour: str = "red"


@attrs.frozen
class AttrsArgs:
    seed: int = 7
    colour: str = "red"


def test_both_modules_name_one_record() -> None:
    """The import path that users write gives the record of the configuration itself."""
    assert StrategyConfig is lightrft.config.strategy.StrategyConfig
    assert "cosine" in SCHEDULERS


@settings(deadline=None, max_examples=25)
@given(strategy_configs())
def test_from_args_of_vars_is_the_identity(config: StrategyConfig) -> None:
    """A config goes through `vars` and `from_args`, and through a mapping, a Namespace and pickle, unchanged."""
    assert StrategyConfig.from_args(vars(config)) == config
    assert StrategyConfig.from_args(argparse.Namespace(**vars(config))) == config
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301  what we pickled ourselves
    assert StrategyConfig.from_args(config) is config


@settings(deadline=None, max_examples=25)
@given(strategy_configs(), plain_tables())
def test_unknown_attributes_change_no_setting(config: StrategyConfig, extra: dict[str, object]) -> None:
    """Whatever else the arguments hold is kept in `extra_args` and changes no setting."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = StrategyConfig.from_args({**vars(config), **extra})
    assert read.extra_args == {**config.extra_args, **extra}
    assert attrs.evolve(read, extra_args={}) == attrs.evolve(config, extra_args={})


@pytest.mark.parametrize("args", [SlottedArgs(), DataclassArgs(), AttrsArgs(), SimpleNamespace(seed=7, colour="red")])
def test_any_object_with_attributes(args: object) -> None:
    """Settings are found in slots, dataclasses, attrs records and namespaces, and the object itself is kept."""
    config = StrategyConfig.from_args(args)
    assert (config.seed, dict(config.extra_args)) == (7, {"colour": "red"})
    assert config.args is args


def test_class_attributes_count() -> None:
    """Values on the class of the arguments and properties are settings; methods and private names are not."""
    config = StrategyConfig.from_args(ClassArgs())
    assert (config.seed, config.max_norm) == (7, 0.5)
    assert config.extra_args == {"reward_url": "http://localhost"}


@pytest.mark.parametrize("args", [None, 3, "fsdp2", [1], object(), StrategyConfig, print, test_class_attributes_count])
def test_what_has_no_settings_is_refused(args: object) -> None:
    """None, scalars, classes and functions that were not called are errors and no defaults."""
    with pytest.raises(ConfigError, match=r"^args=.*; (pass|call)"):
        StrategyConfig.from_args(args)


def test_none_means_not_given() -> None:
    """Argparse writes None for what was not given: the default holds, also for extra_args."""
    args = argparse.Namespace(**dict.fromkeys(KNOWN), mine=None)
    config = StrategyConfig.from_args(args)
    assert config == StrategyConfig(extra_args={"mine": None})
    assert config.get_extra_arg("mine", default=3) is None
    assert config.get_extra_arg("other", default=3) == 3


def test_extra_args_must_be_a_mapping() -> None:
    """Arguments whose own attribute `extra_args` is no mapping are refused."""
    with pytest.raises(ConfigError, match=r"^extra_args='x' is not a mapping; pass"):
        StrategyConfig.from_args(argparse.Namespace(extra_args="x"))


@pytest.mark.parametrize("extra", ["x", {1: 2}])
def test_extra_args_of_the_record_have_names(extra: object) -> None:
    """The record itself refuses extra arguments without names."""
    with pytest.raises(ConfigError, match=r"^extra_args=.* is not a table"):
        StrategyConfig(extra_args=extra)  # type: ignore[arg-type]


def test_a_near_miss_is_kept_with_a_warning() -> None:
    """A name one character away from a setting that was not given stays in extra_args, and a warning says so."""
    with pytest.warns(UserWarning, match=r"max_norn is no setting of a strategy.*if max_norm was meant"):
        config = StrategyConfig.from_args(argparse.Namespace(max_norn=3.0))
    assert config == StrategyConfig(extra_args={"max_norn": 3.0})


def test_plausible_names_do_not_warn() -> None:
    """No warning for a near name whose setting was given too, nor for short names."""
    args = argparse.Namespace(max_norm=1.0, max_norms=[1.0], l1=0.1, feed=3, fp16=True, rollout_batch_size=4)
    assert set(StrategyConfig.from_args(args).extra_args) == {"max_norms", "l1", "feed", "fp16", "rollout_batch_size"}


def test_extra_args_are_safe_from_later_changes() -> None:
    """Changing the original's dicts and lists does not change the config, while other objects stay the same ones."""
    ordered = collections.OrderedDict(a=1)
    original = {"a": {"b": [1]}, "c": ([1],), "ordered": ordered}
    config = StrategyConfig.from_args(argparse.Namespace(extra_args=original, mine=original["a"]))
    original["a"]["b"].append(2)  # type: ignore[call-overload]
    original["c"][0].append(2)  # type: ignore[index]
    assert config.extra_args["a"] == config.extra_args["mine"] == {"b": [1]}
    assert config.extra_args["c"] == ([1],)
    assert config.extra_args["ordered"] is ordered


def test_from_mapping_keeps_the_mapping() -> None:
    """A mapping may be of any kind, is kept as `args`, and its lists stand for tuples and ints for floats."""
    mapping = MappingProxyType({"adam_betas": [0, 0.5], "max_norm": 2, "extra_args": {"mine": 1}})
    config = StrategyConfig.from_mapping(mapping)
    assert config == StrategyConfig(adam_betas=(0.0, 0.5), max_norm=2.0, extra_args={"mine": 1})
    assert isinstance(config.max_norm, float)
    assert config.args is mapping


def test_from_mapping_is_strict() -> None:
    """In a mapping a misspelt key, and the reserved `args`, are errors that name the nearest key and the source."""
    with pytest.raises(
        ConfigError, match=r"^args.py: max_norn=3 is not a setting of StrategyConfig; did you mean 'max_norm'"
    ):
        StrategyConfig.from_mapping({"max_norn": 3}, source="args.py")
    with pytest.raises(ConfigError, match="args=None is not a setting"):
        StrategyConfig.from_mapping({"args": None})
    with pytest.raises(ConfigError, match="config: config=3 is not a mapping"):
        StrategyConfig.from_mapping(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("max_norm", -1, "max_norm=-1.0 is too small; use 0 or more."),
        ("max_norm", float("nan"), "max_norm=nan is not finite; write a number."),
        ("max_norm", 10**400, "is not finite; write a number."),
        ("max_norm", True, "max_norm=True is not a number; write a number."),
        ("seed", 2.0, "seed=2.0 is not an integer; write an integer."),
        ("zero_stage", 4, "zero_stage=4 is out of range; use an integer in [0, 3]."),
        ("zero_stage", 1.5, "zero_stage=1.5 is not an integer; write an integer."),
        ("lr_warmup_ratio", 1.5, "lr_warmup_ratio=1.5 is out of range; use a number in [0, 1]."),
        (
            "lr_scheduler",
            "cosin",
            "lr_scheduler='cosin' is not known; did you mean 'cosine'? Known: constant, cosine, linear.",
        ),
        ("adam_betas", (0.9,), "adam_betas=(0.9,) is not a pair of numbers; write it as [0.9, 0.95]."),
        ("adam_betas", (0.9, 1.0), "adam_betas=(0.9, 1.0) is out of range; use two numbers in [0, 1)."),
        ("adam_betas", ("a", 0.0), "adam_betas='a' is not a number; write a number."),
        ("train_batch_size", 0, "train_batch_size=0 is too small; use 1 or more."),
        ("bf16", 1, "bf16=1 is not a bool; use true or false."),
    ],
)
def test_values_out_of_range(setting: str, value: object, message: str) -> None:
    """Each value that cannot be used is refused while the record is built, in words that say what to write."""
    with pytest.raises(ConfigError) as caught:
        StrategyConfig.from_args({setting: value})
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize(("train", "micro", "way_out"), [(6, 4, "use 4 or 8"), (3, 4, "use 4.")])
def test_batch_sizes_must_divide(train: int, micro: int, way_out: str) -> None:
    """A batch that is not a whole number of micro-batches is refused with the nearest that are."""
    with pytest.raises(ConfigError, match=rf"^train_batch_size={train} is not divisible by .*{way_out}"):
        StrategyConfig(train_batch_size=train, micro_train_batch_size=micro)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_frozen(name: str) -> None:
    """No setting of a built config can be changed."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(StrategyConfig(), name, 1)
