"""Settings of different sections that contradict one another."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from runs import parts_of, tiny_config

from lightrft.config.root import Config
from lightrft.errors import ConfigError
from lightrft.loops.checks import check_settings
from lightrft.loops.train import checkpoint_dir, train
from lightrft.strategy import get_strategy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlong_buffer": 4}, r"algorithm\.overlong_buffer=4 is more than engine\.max_new_tokens\(3\)"),
        ({"dual_clip": 3.0, "loss": "cispo"}, r"algorithm\.dual_clip=3\.0 has no meaning for loss='cispo'"),
        ({"dual_clip": 3.0, "loss": "gspo"}, r"algorithm\.dual_clip=3\.0 has no meaning for loss='gspo'"),
        ({"dual_clip": 1.0}, r"algorithm\.dual_clip=1\.0 is not above 1"),
        ({"reward_running_norm_minus_mean": True}, "has no effect without algorithm.reward_running_norm"),
    ],
)
def test_contradictions_are_said_before_anything_is_computed(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    """What the first rollout or step would refuse is refused at once: nothing is trained or written before it."""
    config = tiny_config(tmp_path, **settings)
    parts = parts_of(config)
    before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        train(get_strategy(config), config, parts)
    assert all(tensor.equal(before[name]) for name, tensor in parts.model.state_dict().items())
    assert not checkpoint_dir(config).exists()


def test_settings_at_their_limits_pass(tmp_path: Path) -> None:
    """Bounds that are just reached, and a dual clip for the loss that has one, are no contradiction."""
    check_settings(tiny_config(tmp_path, overlong_buffer=3, dual_clip=1.5, reward_running_norm=True))
    check_settings(Config())


def test_two_names_for_the_engine_are_refused(tmp_path: Path) -> None:
    """A run takes `engine.type`; another name under `strategy` would be ignored, so it is an error."""
    config = tiny_config(tmp_path)
    other = attrs.evolve(config, strategy=attrs.evolve(config.strategy, engine_type="scripted"))
    with pytest.raises(ConfigError, match=r"engine_type='scripted' is not engine\.type='hf'"):
        check_settings(other)
    check_settings(attrs.evolve(other, engine=attrs.evolve(config.engine, type="scripted")))
