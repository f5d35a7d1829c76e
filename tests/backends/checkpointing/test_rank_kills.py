from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightrft
from lightrft.testing.ranks.here import scratch_directory


@pytest.mark.parametrize("how", ["at once", "background"])
@pytest.mark.parametrize(("strategy", "stage"), [("fsdp2", 0), ("deepspeed", 3)])
def test_ranks_killed_at_any_operation_lose_nothing(strategy: str, stage: int, how: str) -> None:
    """Whichever rank dies, or all, and wherever, what is committed is whole and loads, and the next save succeeds.

    A rank that is left is told; it says neither that it saved what is not there, nor waits.
    """
    program = Path(__file__).with_name("rank_kill_program.py")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(lightrft.__file__).parents[1]), str(program.parent)]),
    }
    with scratch_directory() as directory:
        done = subprocess.run(  # noqa: S603 (our own program)
            [sys.executable, str(program), str(directory), strategy, str(stage), how],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        result = json.loads((directory / "result.json").read_text())
    first, second = result["operations"]
    # the trace saw what a save must do; that it saw no less than this is what makes the matrix complete
    assert {"open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir"} <= set(first)
    assert second[:3] == ["open", "write", "fsync"]
    for kill in result["kills"]:
        said, committed = kill["said"], kill["committed"]
        is_survived = kill["at"] == len(result["operations"][kill["rank"]]) - 1  # nobody died
        killed = set() if is_survived else {"0", "1"} if kill["takes_all"] else {str(kill["rank"])}
        assert set(said) == {"0", "1"} - killed, kill
        assert committed in ([1, 2], [1, 2, 3])
        for words in said.values():
            assert words == "saved" if is_survived else "closed by peer" in words or "reset by peer" in words, kill
        assert committed == [1, 2, 3] or not is_survived
    stages = [kill["committed"] for kill in result["kills"] if kill["rank"] == 0]
    assert stages == sorted(stages)  # once committed, it stays so
    assert stages[0] == [1, 2]
    assert len(stages) > 15
    assert {kill["takes_all"] for kill in result["kills"]} == {True, False}
