"""Settings: they survive every way in and out, typing errors are named, and building from them has no side effect."""

from __future__ import annotations

import argparse
import json
import tomllib
import warnings
from collections.abc import Callable, Mapping
from typing import cast

import attrs
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
    as_mapping,
    config_digest,
    from_mapping,
    load_config,
    to_json,
    to_toml,
)
from lightrft.errors import ConfigError, LawError
from lightrft.testing.cases.configs import configs
from lightrft.testing.law import Harness, Law, for_all

__all__ = ["LAWS"]

_SECTIONS: Mapping[str, type[attrs.AttrsInstance]] = {
    "strategy": StrategyConfig,
    "engine": EngineConfig,
    "algorithm": AlgorithmConfig,
    "data": DataConfig,
    "model": ModelConfig,
    "checkpoint": CheckpointConfig,
    "run": RunConfig,
}
_SECRET_NAMES = ("password", "wandb_api_key", "hf_token", "secret", "credentials", "apiKey")


@attrs.frozen(kw_only=True)
class ConfigCase:
    """A configuration.

    Attributes:
        settings: JSON of every setting by section and name, written without the functions that are looked at.
    """

    settings: str


@attrs.frozen(kw_only=True)
class UnknownCase:
    """A configuration with more names than there are settings.

    Attributes:
        settings: as in `ConfigCase`.
        names: the other ones; each has its place as its value.
    """

    settings: str
    names: tuple[str, ...]


@attrs.frozen(kw_only=True)
class TypoCase:
    """A name of a setting that is written wrong.

    Attributes:
        section: where it stands; empty for the name of a section.
        name: the right name.
        written: the wrong one, one edit away.
    """

    section: str
    name: str
    written: str


@attrs.frozen(kw_only=True)
class SecretCase:
    """A secret among the settings of a strategy.

    Attributes:
        name: what it stands under.
        secret: its value.
        depth: how many tables it is inside of.
    """

    name: str
    secret: str
    depth: int


def _config_cases(world_size: int) -> SearchStrategy[ConfigCase]:
    del world_size
    return st.builds(ConfigCase, settings=configs().map(_written))


def _written(config: Config) -> str:
    return json.dumps(attrs.asdict(config, filter=_is_setting))


def _is_setting(field: attrs.Attribute[object], value: object) -> bool:
    del value
    return field.name != "args"


def _read(settings: str) -> Config:
    sections = cast("dict[str, dict[str, object]]", json.loads(settings))
    return Config(**{name: kind(**sections[name]) for name, kind in _SECTIONS.items()})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def _round_trips(harness: Harness, case: ConfigCase) -> None:
    del harness
    config = _read(case.settings)
    ways: dict[str, Callable[[], object]] = {
        "from_mapping(as_mapping(config))": lambda: from_mapping(as_mapping(config)),
        "from_mapping of its JSON": lambda: from_mapping(json.loads(to_json(config))),
        "from_mapping of its TOML": lambda: from_mapping(tomllib.loads(to_toml(config))),
    }
    for way, read in ways.items():
        _require_equal(way, read(), config)
    strategy = config.strategy
    _require_equal("from_args(vars(config))", StrategyConfig.from_args(vars(strategy)), strategy)
    _require_equal("from_args(Namespace)", StrategyConfig.from_args(argparse.Namespace(**vars(strategy))), strategy)
    _require_equal("from_mapping(as_mapping)", StrategyConfig.from_mapping(as_mapping(strategy)), strategy)
    _require_equal("config_digest", config_digest(_read(case.settings)), config_digest(config))
    _require_equal("the command line", load_config(None, _overrides(config)), _without_tables(config))


def _require_equal(way: str, seen: object, wanted: object) -> None:
    if seen != wanted:
        raise LawError(f"{way} gave {seen!r} and must give {wanted!r}.")


def _overrides(config: Config) -> list[str]:
    """Return the settings that are no tables as a command line writes them."""
    return [f"{section}.{line}" for section in _SECTIONS for line in _lines(getattr(config, section))]


def _lines(section: attrs.AttrsInstance) -> list[str]:
    lines = to_toml(section).split("\n")
    table = next((place for place, line in enumerate(lines) if line.startswith("[")), len(lines))
    return [line.replace(" = ", "=", 1) for line in lines[:table] if line]


def _without_tables(config: Config) -> Config:
    return attrs.evolve(
        config,
        strategy=attrs.evolve(config.strategy, extra_args={}),
        data=attrs.evolve(config.data, task_options={}),
    )


@st.composite
def _unknown_cases(draw: DrawFn, world_size: int) -> UnknownCase:
    del world_size
    known = set(attrs.fields_dict(StrategyConfig))
    near = st.builds(_edited, st.sampled_from(sorted(known)), st.integers(0, 30), st.sampled_from("axz_"), _EDITS)
    names = near | st.from_regex(r"[a-z][a-z_0-9]{0,8}", fullmatch=True)
    # a leading underscore makes a name private, and what is private is not kept
    other = draw(
        st.lists(
            names.filter(lambda name: name.isidentifier() and name[0] != "_" and name not in known),
            max_size=3,
            unique=True,
        )
    )
    return UnknownCase(settings=draw(configs().map(_written)), names=tuple(other))


def _leaves_known_alone(harness: Harness, case: UnknownCase) -> None:
    del harness
    config = _read(case.settings).strategy
    others = {name: place for place, name in enumerate(case.names)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name that looks like a setting is warned of
        seen = StrategyConfig.from_args(argparse.Namespace(**{**others, **vars(config)}))
    wanted = attrs.evolve(config, extra_args={**config.extra_args, **others})
    _require_equal(f"from_args with the unknown {sorted(others)}", seen, wanted)
    for name, place in others.items():
        _require_equal(f"get_extra_arg({name!r})", seen.get_extra_arg(name, default=-1), place)


_EDITS = st.sampled_from(("added", "left out", "changed", "swapped"))


def _edited(name: str, place: int, character: str, edit: str) -> str:
    place %= len(name)
    before, after = name[:place], name[place:]
    edits = {
        "added": before + character + after,
        "left out": before + after[1:],
        "changed": before + character + after[1:],
        "swapped": before + after[1:2] + after[:1] + after[2:],
    }
    return edits[edit]


@st.composite
def _typos(draw: DrawFn, world_size: int) -> TypoCase:
    del world_size
    section = draw(st.sampled_from(["", *_SECTIONS]))
    known = [name for name in attrs.fields_dict(_SECTIONS[section] if section else Config) if name != "args"]
    name = draw(st.sampled_from(known))
    written = st.builds(_edited, st.just(name), st.integers(0, len(name) - 1), st.sampled_from("aeksz_1"), _EDITS)
    is_typo = draw(written.filter(lambda text: bool(text) and text not in {*known, "args"}))
    return TypoCase(section=section, name=name, written=is_typo)


def _names_the_right_one(harness: Harness, case: TypoCase) -> None:
    del harness
    inner: object = {} if not case.section and case.name in _SECTIONS else 1
    mapping = {case.written: inner}
    readers: list[Callable[[], object]] = [lambda: from_mapping({case.section: mapping} if case.section else mapping)]
    if case.section == "strategy":
        readers.append(lambda: StrategyConfig.from_mapping(mapping))
    if case.section:
        readers.append(lambda: load_config(None, [f"{case.section}.{case.written}=1"]))
    for read in readers:
        message = _refusal(read)
        if case.written not in message or repr(case.name) not in message:
            raise LawError(
                f"{case.written!r} in the section {case.section!r} gave {message!r}; it must be refused with the name "
                f"of {case.name!r}."
            )


def _refusal(read: Callable[[], object]) -> str:
    try:
        read()
    except ConfigError as error:
        return str(error)
    return ""


def _secret_cases(world_size: int) -> SearchStrategy[SecretCase]:
    del world_size
    return st.builds(
        SecretCase,
        name=st.sampled_from(_SECRET_NAMES),
        secret=st.from_regex(r"s3cr3t-[0-9a-f]{8}", fullmatch=True),
        depth=st.integers(0, 2),
    )


def _hides(harness: Harness, case: SecretCase) -> None:
    del harness
    table: dict[str, object] = {case.name: case.secret}
    for _ in range(case.depth):
        table = {"inner": table, "list": [table]}
    strategy = StrategyConfig(extra_args=table)
    config = Config(strategy=strategy)
    shown = {
        "repr(StrategyConfig)": repr(strategy),
        "repr(Config)": repr(config),
        "to_toml": to_toml(config),
        "to_json": to_json(config),
        "as_mapping": str(as_mapping(strategy)),
        "the error about an unknown key": _refusal(lambda: from_mapping({"strategy": table})),
        "the error about a wrong value": _refusal(lambda: from_mapping({"strategy": {"seed": table}})),
    }
    for what, text in shown.items():
        if case.secret in text:
            raise LawError(f"{what} shows the secret under {case.name!r}: {text!r}.")
    if strategy.extra_args != table:
        raise LawError(f"extra_args={strategy.extra_args!r} lost the secret itself.")


LAWS: tuple[Law, ...] = (
    Law(
        id="config.round_trip",
        statement="Settings come back equal from arguments, a mapping, JSON, TOML and the command line.",
        check=for_all(_config_cases, _round_trips),
        worlds="one",
    ),
    Law(
        id="config.unknown_names",
        statement="Arguments that are no settings are kept and never change a setting.",
        check=for_all(_unknown_cases, _leaves_known_alone),
        worlds="one",
    ),
    Law(
        id="config.typos",
        statement="A name in a mapping or command line that is one edit from a setting is refused with the right one.",
        check=for_all(_typos, _names_the_right_one),
        worlds="one",
    ),
    Law(
        id="config.secrets",
        statement="Secrets are neither printed nor written.",
        check=for_all(_secret_cases, _hides),
        worlds="one",
    ),
)
"""Laws about settings, and about building a strategy from them."""
