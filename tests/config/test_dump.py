from __future__ import annotations

import argparse
import datetime as dt
import enum
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.config import Config, DataConfig, RunConfig, StrategyConfig, as_mapping, config_digest, to_json, to_toml
from lightrft.errors import ConfigError
from lightrft.testing.cases.configs import strategy_configs


class Colour(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    TWO = 2


class Word(str, enum.Enum):  # noqa: UP042  the older spelling is what programs have
    YES = "yes"


def test_to_toml_is_readable() -> None:
    """Every section is a table, settings that are None are left out, and free tables come after their section."""
    text = to_toml(Config(data=DataConfig(task_options={"a b": [1, {"c": "x\ny"}]})))
    assert text.startswith("[strategy]\nseed = 42\nmax_norm = 1.0\n")
    assert '\n\n[data.task_options]\n"a b" = [1, {c = "x\\ny"}]\n\n[model]\n' in text
    assert "task = " not in text
    assert text.endswith("threads = 0\n")


@settings(deadline=None, max_examples=25)
@given(strategy_configs())
def test_a_section_reads_back_equal(config: StrategyConfig) -> None:
    """A section alone is TOML that reads back equal too, and equal settings have equal digests."""
    read = StrategyConfig.from_mapping(tomllib.loads(to_toml(config)))
    assert read == config
    assert config_digest(read) == config_digest(config)


@pytest.mark.parametrize(
    "value",
    [
        dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=dt.UTC),
        dt.date(2026, 1, 2),
        dt.time(3, 4, 5),
        float("inf"),
        -0.0,
        Number.TWO,
        Word.YES,
        ("a", ("b",)),
        2**70,
        "\x00\t\"\\'\u2028\U0001f600",
    ],
)
def test_extra_args_read_back_equal(value: object) -> None:
    """What TOML can hold is kept in extra_args: dates, infinities, numbers and strings of any kind, tuples as lists."""
    config = StrategyConfig(extra_args={"value": value, "nested": [{"value": value}]})
    assert StrategyConfig.from_mapping(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    "value", [None, object(), Path("x"), argparse.Namespace(), Colour.RED, [None], {"hf_token": None}, {1: 2}]
)
def test_what_toml_cannot_hold_is_refused(value: object) -> None:
    """Anything else in extra_args is an error that names its path: no TOML reads back different."""
    with pytest.raises(ConfigError, match=r"^strategy\.extra_args\.value.*(cannot be written|cannot hold).*; "):
        to_toml(Config(strategy=StrategyConfig(extra_args={"value": value})))


def test_what_unicode_cannot_hold_is_refused() -> None:
    """A path of undecodable bytes, which no TOML file can hold, is an error that shows it."""
    with pytest.raises(ConfigError, match=r"config='\\udcff' is not Unicode"):
        to_toml(Config(run=RunConfig(dir="runs/\udcff")))


def test_as_mapping_is_total() -> None:
    """Whatever extra_args hold, the mapping is plain data: known kinds by their value, objects by their type."""
    day = dt.date(2026, 1, 2)
    extra = {"a": Colour.RED, "b": Path("x"), "c": day, "d": (1, None), "e": float("nan"), "f": {2: 3}, "g": {4}}
    config = StrategyConfig(
        extra_args={**extra, "h": argparse.Namespace(key="s3cret"), "i": print, "hf_token": "s3cret"}
    )
    assert as_mapping(config)["extra_args"] == {
        "a": 1,
        "b": "x",
        "c": "2026-01-02",
        "d": [1, None],
        "e": "nan",
        "f": {"2": 3},
        "g": "<builtins.set>",
        "h": "<argparse.Namespace>",
        "i": "<builtins.builtin_function_or_method>",
        "hf_token": "***",
    }
    assert "args" not in as_mapping(config)
    assert json.loads(to_json(config)) == as_mapping(config)


def test_digest_is_the_same_in_every_process() -> None:
    """The digest depends on the settings alone: not on the process, its hash seed, or the order of keys."""
    code = "from lightrft.config import *; print(config_digest(StrategyConfig(extra_args={'b': 1, 'a': 'x'})))"
    runs = [
        subprocess.run(  # noqa: S603  our own interpreter
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert runs == [config_digest(StrategyConfig(extra_args={"a": "x", "b": 1}))] * 2


@settings(deadline=None, max_examples=25)
@given(strategy_configs(), st.integers(10_001, 10_010))
def test_digest_tells_settings_apart(config: StrategyConfig, seed: int) -> None:
    """A different setting gives a different digest; a secret and the original arguments give the same one."""
    assert config_digest(attrs.evolve(config, seed=seed)) != config_digest(config)
    assert config_digest(attrs.evolve(config, args=object())) == config_digest(config)
    tokens = [attrs.evolve(config, extra_args={**config.extra_args, "token": token}) for token in ("a", "b")]
    assert config_digest(tokens[0]) == config_digest(tokens[1])


def test_numbers_that_are_equal_are_written_alike() -> None:
    """An int for a float setting and minus zero are the same settings, the same text and the same digest."""
    one, other = StrategyConfig(max_norm=2, l2=-0.0), StrategyConfig(max_norm=2.0, l2=0)
    assert one == other
    assert to_toml(one) == to_toml(other)
    assert config_digest(one) == config_digest(other)
