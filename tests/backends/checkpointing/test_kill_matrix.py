from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import lightrft


@pytest.mark.parametrize("how", ["at once", "background"])
def test_a_writer_killed_at_any_operation_loses_nothing(how: str) -> None:
    """Whatever the operation before which a save dies, every committed checkpoint loads, and the next save succeeds.

    The newest committed one is what is found, a run that goes on from it goes on as the uninterrupted one, the oldest
    goes after its successor is there, and no rubbish stays.
    """
    # a file system in memory where there is one: what is tested is the order of operations, not the disk
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
    program = Path(__file__).with_name("kill_matrix_program.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lightrft.__file__).parents[1])}
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        done = subprocess.run(  # noqa: S603 (our own program)
            [sys.executable, str(program), directory, how], capture_output=True, text=True, env=environment, check=False
        )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    operations, committed = result["operations"], result["committed"]
    # the trace saw what a save must do; that it saw no less than this is what makes the matrix complete
    assert {"open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir", "flock"} <= set(operations)
    assert len(committed) == len(operations) + 1
    assert result["num_states"] > 20
    stages = [steps for index, steps in enumerate(committed) if index == 0 or steps != committed[index - 1]]
    assert stages == [[1, 2], [1, 2, 3], [2, 3]]
