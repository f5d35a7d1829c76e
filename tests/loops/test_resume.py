"""Where a run goes on when its directory or its seed is unusual."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from runs import parts_of, tiny_config

from lightrft.config.root import Config
from lightrft.errors import CheckpointError
from lightrft.loops.train import Summary, checkpoint_dir, train
from lightrft.strategy import get_strategy
from lightrft.tracking.files import build_file_tracker, channel_path


def run(config: Config) -> Summary:
    """Run to the end, with rows in files."""
    return train(get_strategy(config), config, parts_of(config), tracker=build_file_tracker(config.run.dir))


def test_a_run_whose_only_checkpoint_lost_its_manifest_does_not_begin_anew(tmp_path: Path) -> None:
    """The damaged checkpoint is named and refused, and no row that was logged before is lost."""
    config = tiny_config(tmp_path)
    config = attrs.evolve(config, checkpoint=attrs.evolve(config.checkpoint, max_num=1))
    run(config)
    (checkpoint,) = checkpoint_dir(config).iterdir()
    (checkpoint / "manifest.json").unlink()
    before = channel_path(config.run.dir, "metrics").read_bytes()
    with pytest.raises(CheckpointError, match=r"step-00000007/manifest\.json cannot be read"):
        run(config)
    assert channel_path(config.run.dir, "metrics").read_bytes() == before
    assert [path.name for path in checkpoint_dir(config).iterdir()] == ["step-00000007"]


def test_the_largest_seed_is_a_seed(tmp_path: Path) -> None:
    """Seeds of rollouts are made from the run's seed, and every one of those is taken."""
    config = tiny_config(tmp_path)
    config = attrs.evolve(config, strategy=attrs.evolve(config.strategy, seed=2**63 - 1))
    assert run(config).step == 7
