"""The sources of all tests here: checkpoints that raw torch and raw DeepSpeed write on one and two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parents[3]

sys.path.insert(0, str(FOLDER))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The directory of what so many ranks wrote; each is made when it is first asked for."""
    made: dict[int, Path] = {}

    def of(world_size: int) -> Path:
        if world_size not in made:
            directory = tmp_path_factory.mktemp(f"ranks-{world_size}")
            command = [sys.executable, str(FOLDER / "foreign_programs.py"), str(directory)]
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
            ranks = [
                subprocess.Popen(  # noqa: S603 (our own interpreter)
                    [*command, str(rank), str(world_size)],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                )
                for rank in range(world_size)
            ]
            said = [rank.communicate(timeout=240)[1].decode()[-3000:] for rank in ranks]
            assert [rank.returncode for rank in ranks] == [0] * world_size, said
            made[world_size] = directory
        return made[world_size]

    return of
