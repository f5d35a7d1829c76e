"""From settings of any kind to a strategy, and the registries behind it."""

from __future__ import annotations

import argparse
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
from torch import nn

from lightrft.config.root import Config
from lightrft.config.sections import EngineConfig
from lightrft.errors import ConfigError, LightRFTError, MissingPackageError, UnsupportedError
from lightrft.strategy import (
    ENGINES,
    STRATEGIES,
    Strategy,
    StrategyConfig,
    get_strategy,
    registered_engines,
    registered_strategies,
)
from lightrft.strategy.assemble import assemble
from lightrft.strategy.build import chosen_key, strategy_config
from lightrft.testing.signatures import signature_differences_of_record

SINGLE = StrategyConfig(strategy="single", train_batch_size=2)


def windows(strategy: Strategy) -> int:
    """Return how many micro-batches the strategy accumulates: what tells one config's strategy from another's."""
    model = nn.Linear(1, 1)
    optimizer = strategy.create_optimizer(model)
    for count in range(1, 9):
        strategy.backward(model.weight.sum(), model, optimizer)
        if strategy.optimizer_step(optimizer, model, None).stepped:
            return count
    raise AssertionError("no window was complete")


@pytest.mark.parametrize(
    "args",
    [
        SINGLE,
        argparse.Namespace(strategy="single", train_batch_size=2, unrelated="x"),
        types.SimpleNamespace(strategy="single", train_batch_size=2),
        {"strategy": "single", "train_batch_size": 2},
        Config(strategy=SINGLE),
    ],
    ids=["config", "namespace", "object", "mapping", "root"],
)
def test_settings_of_any_kind_build_the_same_strategy(args: object) -> None:
    """A config, a namespace, any object, a mapping and the config of a whole run give the strategy they describe."""
    assert windows(get_strategy(args)) == 2


def test_the_key_is_the_name_or_follows_fsdp() -> None:
    """`strategy` names the key; without it fsdp decides between fsdp2 and deepspeed."""
    assert chosen_key(SINGLE) == "single"
    assert chosen_key(StrategyConfig()) == "deepspeed"
    assert chosen_key(StrategyConfig(fsdp=True)) == "fsdp2"
    assert chosen_key(StrategyConfig(strategy="fake", fsdp=True)) == "fake"


def test_one_process_shards_over_one_rank() -> None:
    """With one process "fsdp2" is what it says, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy = get_strategy({"fsdp": True})
    model = strategy.prepare(nn.Linear(2, 2))
    assert {type(parameter.data).__name__ for parameter in model.parameters()} == {"DTensor"}
    strategy.teardown()


@pytest.mark.parametrize("key", ["fake", "single"])
def test_several_processes_are_refused_while_building(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a launcher of several processes a strategy of one process refuses, before anything is started."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UnsupportedError, match="WORLD_SIZE=4"):
        get_strategy({"strategy": key})


def test_unknown_strategies_are_listed_with_the_nearest() -> None:
    """A key that nobody registered is an error that names all keys and the nearest one."""
    with pytest.raises(
        ConfigError, match=r"strategy='sngle' is not registered; did you mean 'single'\? Known: deepspeed, fake"
    ):
        get_strategy({"strategy": "sngle"})


def test_registries_are_read_only() -> None:
    """Nothing can be registered by assignment."""
    for registry in (STRATEGIES, ENGINES, registered_strategies(), registered_engines()):
        with pytest.raises(TypeError):
            registry["mine"] = registry["single" if "single" in registry else "hf"]


def test_a_strategy_of_one_s_own_is_one_argument() -> None:
    """A user's builder is found through `registry=`, gets the whole config and may take parts of ours."""
    seen = []

    def build_mine(config: StrategyConfig) -> Strategy:
        seen.append(config)
        single = STRATEGIES["single"](config)
        return assemble(
            collectives=single, training=single, checkpointing=single, rollout=single, capabilities=single.capabilities
        )

    strategy = get_strategy(
        {"strategy": "mine", "train_batch_size": 2, "extra_args": {"option": 5}},
        registry={**STRATEGIES, "mine": build_mine},
    )
    assert windows(strategy) == 2
    assert seen[0].get_extra_arg("option", default=0) == 5
    with pytest.raises(ConfigError, match="Known: mine"):
        get_strategy({"strategy": "single"}, registry={"mine": build_mine})


def test_an_engine_of_one_s_own_is_one_argument() -> None:
    """A user's engine is found through `engines=`, for the strategy's engine_type and for an engine config."""
    seen = []

    def build_mine(config: EngineConfig) -> object:
        seen.append(config)
        return ENGINES["scripted"](config)

    strategy = get_strategy({"strategy": "single", "engine_type": "mine"}, engines={**ENGINES, "mine": build_mine})
    with strategy.setup_inference_engine(actor=nn.Linear(2, 2)) as engine:
        assert engine.status == "awake"
    with strategy.setup_inference_engine(EngineConfig(type="mine", batch_size=3), actor=nn.Linear(2, 2)):
        assert [config.batch_size for config in seen] == [EngineConfig().batch_size, 3]
    with pytest.raises(ConfigError, match=r"engine_type='mien' is not registered; did you mean 'mine'"):
        strategy.setup_inference_engine(EngineConfig(type="mien"), actor=nn.Linear(2, 2))


@pytest.mark.parametrize("engine", ["hf", "vllm", "scripted"])
def test_an_engine_without_a_server_refuses_its_address(engine: str) -> None:
    """A setting that would be ignored is refused, before the engine's package is looked for."""
    with pytest.raises(ConfigError, match=rf"url='http://a:1' is of a server and the engine '{engine}' has none"):
        ENGINES[engine](EngineConfig(type=engine, url="http://a:1"))


def test_a_server_is_in_a_process_of_its_own_already() -> None:
    """Another one around it is refused; the server's own package need not be installed here."""
    with pytest.raises(ConfigError, match="process='own' is for an engine that is started here"):
        ENGINES["sglang"](EngineConfig(type="sglang", url="http://a:1", process="own"))
    assert ENGINES["sglang"](EngineConfig(type="sglang", url="http://a:1")).capabilities == frozenset()


def test_unknown_engines_are_listed_with_the_nearest() -> None:
    """Without engines of one's own the registered ones are looked through."""
    strategy = get_strategy({"strategy": "single", "engine_type": "script"})
    with pytest.raises(
        ConfigError, match=r"engine_type='script' is not registered; did you mean 'scripted'\? Known: hf"
    ):
        strategy.setup_inference_engine(actor=nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:strategy=:UserWarning")
@pytest.mark.parametrize("key", sorted(STRATEGIES))
def test_every_field_matches_its_callback_protocol(key: str) -> None:
    """Every function of every registered strategy has the names, kinds and defaults of its contract."""
    strategy = get_strategy({"strategy": key})
    assert len(attrs.fields(Strategy)) > 30
    assert signature_differences_of_record(strategy) == []


@pytest.mark.parametrize("key", sorted(ENGINES))
def test_every_field_of_an_engine_matches_its_callback_protocol(key: str) -> None:
    """Every function of every registered engine has the names, kinds and defaults of its contract."""
    try:
        engine = ENGINES[key](EngineConfig())
    except MissingPackageError as error:
        pytest.skip(str(error))
    assert signature_differences_of_record(engine) == []


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that installs a package with entry points, as pip would lay it out."""
    installed = []

    def install_package(package: str, entry_points: str, source: str = "") -> None:
        site = tmp_path / f"site{len(installed)}"
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")
        (site / f"{package}.py").write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(site)
        installed.append(package)

    yield install_package
    for package in installed:
        sys.modules.pop(package, None)


PLUGIN = """
from lightrft.strategy import ENGINES, STRATEGIES

def build_strategy(config):
    return STRATEGIES["single"](config)

def build_engine(config):
    return ENGINES["scripted"](config)

number = 3
"""


def test_installed_packages_add_strategies_and_engines(install: Callable[..., None]) -> None:
    """Entry points of an installed package are listed without importing it, and imported when they are chosen."""
    install(
        "acme_plugin",
        "[lightrft.strategies]\nacme = acme_plugin:build_strategy\n"
        "[lightrft.engines]\nacme = acme_plugin:build_engine\n",
        PLUGIN,
    )
    assert set(registered_strategies()) == {*STRATEGIES, "acme"}
    assert set(registered_engines()) == {*ENGINES, "acme"}
    assert "acme_plugin" not in sys.modules
    strategy = get_strategy({"strategy": "acme", "engine_type": "acme", "train_batch_size": 2})
    assert "acme_plugin" in sys.modules
    assert windows(strategy) == 2
    with strategy.setup_inference_engine(actor=nn.Linear(2, 2)) as engine:
        assert engine.status == "awake"


def test_two_names_that_collide_are_an_error(install: Callable[..., None]) -> None:
    """A package may take neither a name of ours nor that of another package; both are named. A copy of itself may."""
    install("acme_plugin", "[lightrft.strategies]\nacme = acme_plugin:build_strategy\n", PLUGIN)
    install("acme_plugin", "[lightrft.strategies]\nacme = acme_plugin:build_strategy\n", PLUGIN)
    assert "acme" in registered_strategies()
    install("other_plugin", "[lightrft.strategies]\nacme = other_plugin:build_strategy\n", PLUGIN)
    with pytest.raises(ConfigError, match=r"'acme'.*also registered by (acme|other)_plugin"):
        registered_strategies()


@pytest.mark.parametrize(("group", "key"), [("strategies", "single"), ("engines", "hf")])
def test_names_of_ours_cannot_be_taken(install: Callable[..., None], group: str, key: str) -> None:
    """An installed package that registers one of our keys is an error as soon as somebody looks."""
    install("acme_plugin", f"[lightrft.{group}]\n{key} = acme_plugin:build\n")
    with pytest.raises(
        ConfigError, match=f"'{key}' \\(acme_plugin:build, package acme_plugin\\) is a name of lightrft's own"
    ):
        (registered_strategies if group == "strategies" else registered_engines)()


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        ("acme_plugin:missing", MissingPackageError, "cannot be imported.*install acme_plugin again"),
        ("acme_nowhere:build", MissingPackageError, "cannot be imported.*No module named 'acme_nowhere'"),
        ("acme_plugin:number", ConfigError, "no function that builds"),
    ],
)
def test_broken_entry_points_are_named_when_they_are_chosen(
    install: Callable[..., None], target: str, kind: type[Exception], words: str
) -> None:
    """A plugin that cannot be imported or called disturbs nobody until it is chosen, and is named then."""
    install("acme_plugin", f"[lightrft.strategies]\nacme = {target}\n", PLUGIN)
    assert windows(get_strategy(SINGLE)) == 2
    with pytest.raises(kind, match=words) as caught:
        get_strategy({"strategy": "acme"})
    assert isinstance(caught.value, LightRFTError)


def test_building_has_no_side_effect() -> None:
    """Building twice gives strategies that mean the same, and draws nothing from the random streams."""
    import random

    import torch

    before = (torch.get_rng_state(), random.getstate())
    first, second = get_strategy(SINGLE), get_strategy(SINGLE)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert windows(first) == windows(second)
    assert not torch.distributed.is_initialized()


def test_a_misspelt_key_of_a_mapping_is_an_error_that_names_the_nearest() -> None:
    """A mapping is held to the names of settings; an object with attributes may have others."""
    with pytest.raises(ConfigError, match=r"max_norn.*did you mean 'max_norm'"):
        get_strategy({"strategy": "single", "max_norn": 1.0})


def test_the_attributes_of_a_config_are_settings_again() -> None:
    """`vars(config)` builds the strategy that `config` builds."""
    config = StrategyConfig(strategy="single", max_norm=0.5, extra_args={"mine": 1})
    assert strategy_config(vars(config)) == config
    assert get_strategy(vars(config)).get_rank() == 0
