"""What the launcher says, by torchrun's variables and by SLURM's."""

from __future__ import annotations

import pytest

from lightrft.backends.launch import (
    address_of_launch,
    local_rank_of_launch,
    rank_of_launch,
    require_one_process,
    world_size_of_launch,
)
from lightrft.errors import ConfigError, UnsupportedError

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "node[003-005,007]",
    "SLURM_LAUNCH_NODE_IPADDR": "192.168.0.1",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variable is set."""
    for name in (*TORCHRUN, *SLURM, "SLURM_NTASKS", "SLURM_NODELIST", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def set_all(environment: pytest.MonkeyPatch, *launches: dict[str, str]) -> None:
    for launch in launches:
        for name, value in launch.items():
            environment.setenv(name, value)


def place() -> tuple[int, tuple[str, int]]:
    return rank_of_launch(), address_of_launch()


def test_slurm_s_variables_make_a_launch(environment: pytest.MonkeyPatch) -> None:
    """Rank, size and local rank are those of the task; processes meet on the first node, at a port of the job's own."""
    set_all(environment, SLURM)
    assert (rank_of_launch(), local_rank_of_launch(), world_size_of_launch()) == (5, 2, 9)
    assert address_of_launch() == ("node003", 15000 + 4567)
    environment.setenv("MASTER_PORT", "4711")
    assert address_of_launch() == ("node003", 4711)


def test_torchrun_wins_over_slurm(environment: pytest.MonkeyPatch) -> None:
    """Under torchrun in a task of SLURM's, torchrun's variables say what counts."""
    set_all(environment, SLURM, TORCHRUN)
    assert (rank_of_launch(), local_rank_of_launch(), world_size_of_launch()) == (1, 0, 2)
    assert address_of_launch() == ("10.0.0.1", 4711)


def test_a_plain_process_is_alone(environment: pytest.MonkeyPatch) -> None:
    """Without a launcher there is one process, also in a shell of an allocation, which is none of its tasks."""
    assert (rank_of_launch(), local_rank_of_launch(), world_size_of_launch()) == (0, 0, 1)
    environment.setenv("SLURM_NTASKS", "4")
    assert (rank_of_launch(), world_size_of_launch()) == (0, 1)


def test_a_batch_script_is_alone(environment: pytest.MonkeyPatch) -> None:
    """It has a number as tasks have, and knows how many tasks there may be, but srun has started none of them."""
    of_script = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    set_all(environment, of_script)
    assert (rank_of_launch(), local_rank_of_launch(), world_size_of_launch()) == (0, 0, 1)
    set_all(environment, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"})  # by srun -n 2 in it
    assert (rank_of_launch(), local_rank_of_launch(), world_size_of_launch()) == (1, 1, 2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n7", "n7"),
        ("n7,n8", "n7"),
        ("n[7,9],m[1-3]", "n7"),
        ("gpu-[001-016]", "gpu-001"),
        ("rack[2-3]-n[04-09,11]b,login1", "rack2-n04b"),
    ],
)
def test_the_first_node_of_a_list(environment: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    """Ranges, lists, leading zeros and several brackets are read as SLURM writes them."""
    set_all(environment, {**SLURM, "SLURM_JOB_NODELIST": nodes})
    assert address_of_launch()[0] == first


def test_the_nodes_of_the_step_come_first(environment: pytest.MonkeyPatch) -> None:
    """A step on some nodes of its job meets on its own first node; without any list, where srun was called."""
    set_all(environment, {**SLURM, "SLURM_STEP_NODELIST": "node005"})
    assert address_of_launch()[0] == "node005"
    environment.delenv("SLURM_STEP_NODELIST")
    environment.delenv("SLURM_JOB_NODELIST")
    assert address_of_launch()[0] == "192.168.0.1"


@pytest.mark.parametrize(
    ("name", "written", "words"),
    [
        ("SLURM_PROCID", "9", "SLURM_PROCID='9' is not an integer from 0 to 8"),
        ("SLURM_STEP_NUM_TASKS", "many", "SLURM_STEP_NUM_TASKS='many' is not an integer from 1 up"),
        ("SLURM_JOB_ID", None, "MASTER_PORT is not set and SLURM_STEP_NUM_TASKS=9"),
        ("SLURM_JOB_ID", "job", "SLURM_JOB_ID='job' is not an integer"),
        ("MASTER_PORT", "70000", "MASTER_PORT='70000' is not an integer from 0 to 65535"),
    ],
)
def test_what_makes_no_sense_is_named(
    environment: pytest.MonkeyPatch, name: str, written: str | None, words: str
) -> None:
    """A variable that is missing or no number is a ConfigError that shows it."""
    set_all(environment, SLURM)
    if written is None:
        environment.delenv(name)
    else:
        environment.setenv(name, written)
    with pytest.raises(ConfigError, match=words):
        place()


def test_a_strategy_of_one_process_says_what_takes_more(environment: pytest.MonkeyPatch) -> None:
    """Whoever wanted several processes is told of the strategies for them, not only of the launcher's variable."""
    require_one_process("single")
    set_all(environment, TORCHRUN)
    with pytest.raises(
        UnsupportedError, match=r"^WORLD_SIZE=2 is more .* or set strategy\.strategy=fsdp2 or deepspeed\.$"
    ):
        require_one_process("single")
