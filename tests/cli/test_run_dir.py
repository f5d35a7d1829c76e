"""What a run that goes on from a checkpoint is bound to, as far as the engine's server is concerned."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightrft.cli.run_dir import bind_config
from lightrft.config import Config, EngineConfig
from lightrft.errors import ConfigError


def _config(url: str) -> Config:
    return Config(engine=EngineConfig(type="sglang", url=url))


@pytest.mark.parametrize(("before", "now"), [("", "http://127.0.0.1:1"), ("http://127.0.0.1:1", "")])
def test_a_run_does_not_change_between_a_server_and_an_engine_here(tmp_path: Path, before: str, now: str) -> None:
    """A server draws by no seed of ours, so the run would not be the same."""
    bind_config(tmp_path, _config(before), is_resumed=False)
    with pytest.raises(ConfigError, match=rf"engine\.url='{now}' \(was '{before}'\) would change a run"):
        bind_config(tmp_path, _config(now), is_resumed=True)


def test_a_run_of_an_older_release_had_no_server(tmp_path: Path) -> None:
    """A configuration that says nothing of a server is one without."""
    bind_config(tmp_path, _config(""), is_resumed=False)
    path = tmp_path / "config.toml"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "url =" not in line))
    bind_config(tmp_path, _config(""), is_resumed=True)
    with pytest.raises(ConfigError, match=r"engine\.url='http://127\.0\.0\.1:1' \(was ''\) would change a run"):
        bind_config(tmp_path, _config("http://127.0.0.1:1"), is_resumed=True)


def test_a_server_may_have_another_address(tmp_path: Path) -> None:
    """It is given the weights anyway."""
    bind_config(tmp_path, _config("http://127.0.0.1:1"), is_resumed=False)
    bind_config(tmp_path, _config("http://127.0.0.1:2"), is_resumed=True)
