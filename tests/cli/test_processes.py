"""Runs of several processes: started by `--nproc`, by torchrun and with SLURM's variables, and how they end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import psutil
import pytest
from cli_runs import REPOSITORY, Outcome
from torch._C._distributed_c10d import HashStore

from lightrft.cli import main
from lightrft.cli.voice import code_of_ranks, leave_word
from lightrft.tracking.files import channel_path

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
SHORT = ("run.warmup_steps=0", "run.num_steps=3", "run.evaluate_every=0", "strategy.timeout=30")
LONG = ("run.warmup_steps=0", "run.num_steps=1000", "run.evaluate_every=0", "--quiet")
THREE_PROMPTS = ("strategy.train_batch_size=24", "algorithm.prompts_per_step=3", "algorithm.num_samples=8")

REWARDS = """\
import os, time

import torch

RANK, FAILURE = os.environ.get("RANK"), os.environ.get("FAILURE", "")
calls = 0

def wait_where_it_learns(module, inputs):
    if torch.is_grad_enabled():
        time.sleep(3600)

if RANK == "1" and FAILURE == "waits inside":
    torch.nn.modules.module.register_module_forward_pre_hook(wait_where_it_learns)

def share_of_odd_digits(prompt, completion, answer):
    global calls
    calls += 1
    if RANK == "1" and calls == 6:  # in the middle of the first step
        if FAILURE == "killed":
            os.kill(os.getpid(), 9)
        if FAILURE == "raises":
            raise KeyError("no such rubric")
        if FAILURE == "waits":
            time.sleep(3600)
    if FAILURE == "all raise":  # each rank names a prompt of its own
        raise KeyError("no such rubric")
    if FAILURE == "slow":
        time.sleep(0.02)
    return sum(character in "13579" for character in completion) / 4
"""


class Start(Protocol):
    def __call__(
        self, *words: str, program: tuple[str, ...] = ..., command: str = ..., **variables: str
    ) -> subprocess.Popen[str]: ...


@pytest.fixture
def start(workplace: Path) -> Iterator[Start]:
    """Starts a run of the replicated strategy, which an entry point of the workplace names; none outlives its test."""
    about = workplace / "gloo_ranks-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: gloo-ranks\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[lightrft.strategies]\ngloo = lightrft.testing.replicated:build_gloo\n")
    (workplace / "rewards.py").write_text(REWARDS)
    started: list[subprocess.Popen[str]] = []

    def begin(
        *words: str, program: tuple[str, ...] = (), command: str = "train run.toml", **variables: str
    ) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        process = subprocess.Popen(  # noqa: S603 (our own interpreter)
            [sys.executable, *program, "-m", "lightrft", *command.split(), "strategy.strategy=gloo", *words],
            env={**inherited, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=120)
    return Outcome(code=process.returncode, out=out, err=err)


def lines_of_ours(outcome: Outcome) -> list[str]:
    """What torchrun itself has to say is left out."""
    return [line for line in outcome.err.splitlines() if line.startswith("lightrft: ")]


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def num_rows() -> int:
    path = channel_path("run", "metrics")
    return path.read_text().count("\n") if path.exists() else 0


def ended_on_two_tasks(start: Start, *words: str, of_rank_1: tuple[str, ...] = (), **variables: str) -> list[Outcome]:
    """What two processes say that SLURM has started."""
    of_both = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NODELIST": "localhost", **variables}
    processes = [
        start(*words, *(of_rank_1 if rank else ()), **of_both, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in range(2)
    ]
    return [ended(process) for process in processes]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


def test_both_ways_to_start_two_ranks_run_the_same(start: Start) -> None:
    """`--nproc 2` and torchrun log the same bits; rank 0 alone says what was decided, and how to resume."""
    own = ended(start(*SHORT, "--nproc=2"))
    assert (own.code, own.err) == (0, "")
    for line in (
        "ranks     2 on cpu",
        "window    8 samples = 2 ranks x 1 micro-batches x 4",
        "accuracy  ",
        "report    ",
    ):
        assert len(re.findall(f"^{line}", own.out, re.MULTILINE)) == 1, own.out
    assert "--nproc 2\n" in own.out
    under_torchrun = ended(start(*SHORT, "run.dir=other", program=TORCHRUN))
    assert under_torchrun.code == 0, under_torchrun.err
    assert channel_path("run", "metrics").read_bytes() == channel_path("other", "metrics").read_bytes()


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("killed", "error: rank 1 of 2 was ended by SIGKILL"),
        ("raises", "rank 1: error: reward='share_of_odd_digits' for prompt="),
        ("waits", "rank 0: error: "),
    ],
)
def test_one_rank_takes_the_others_down(start: Start, failure: str, words: str) -> None:
    """A rank that is killed, fails or waits for ever ends the run with one line that names it, and leaves nobody."""
    process = start(*SHORT, "--nproc=2", "strategy.timeout=3", FAILURE=failure)
    wait_until(lambda: len(ranks_of(process)) == 2)
    ranks = ranks_of(process)
    outcome = ended(process)
    assert outcome.code == 1
    assert outcome.line.startswith(f"lightrft: {words}")
    assert "rank 1" in outcome.line
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.parametrize("program", [(), TORCHRUN], ids=["nproc", "torchrun"])
def test_an_error_of_all_ranks_is_said_by_one(start: Start, program: tuple[str, ...]) -> None:
    """What every rank meets comes out once, even where each has words of its own for it."""
    own = () if program else ("--nproc=2",)
    outcome = ended(start(*SHORT, "--quiet", *own, program=program, FAILURE="all raise"))
    assert outcome.code == 1
    (said,) = lines_of_ours(outcome)
    assert "error: reward='share_of_odd_digits' for prompt=" in said


def test_one_word_is_left_first() -> None:
    """Of all who leave word one is told that it was the first, and its code is what the run ends with."""
    board = HashStore()
    assert code_of_ranks(board) is None
    assert [leave_word(board, code) for code in (2, 2, 1)] == [True, False, False]
    assert code_of_ranks(board) == 2


def test_a_rank_that_waits_inside_of_the_model_ends_the_run(start: Start) -> None:
    """No call of ours sees which rank it is; the line names the setting that bounds the wait, and nothing of gloo's."""
    words = ("--nproc=2", "--quiet", "strategy.strategy=fsdp2", "strategy.timeout=5")
    outcome = ended(start(*SHORT, *words, FAILURE="waits inside"))
    assert outcome.code == 1
    assert outcome.line.startswith("lightrft: rank 0: error: strategy.timeout=5.0 went by inside of the model, ")
    assert "gloo" not in outcome.line


def test_a_killed_rank_ends_a_run_of_torchrun(start: Start) -> None:
    """Under torchrun the rank that is left names the one that was killed, once, and torchrun's exit code is not 0."""
    outcome = ended(start(*SHORT, "--quiet", program=TORCHRUN, FAILURE="killed"))
    assert outcome.code == 1
    (said,) = lines_of_ours(outcome)
    assert said.startswith("lightrft: rank 0: error: ")
    assert "rank 1 did not enter it" in said


def test_a_signal_to_the_parent_stops_all_ranks_with_a_checkpoint(start: Start) -> None:
    """SIGTERM to the process that started the ranks ends the run at a step boundary, in one line, and it goes on.

    When the parent of the run that goes on is killed, so that it can say nothing to its ranks, they are gone at once.
    """
    process = start(*LONG, "--nproc=2")
    wait_until(lambda: num_rows() >= 3)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.code == 75
    assert stopped.line.startswith("lightrft: SIGTERM: stopped after step ")
    step = stopped.line.split("after step ")[1].split()[0]
    rows = num_rows()
    resumed = start(*LONG, "--nproc=2", FAILURE="slow")
    assert resumed.stdout is not None
    assert any(f"resumed from step {step} of 1000" in line for line in resumed.stdout)  # as soon as it is said
    wait_until(lambda: num_rows() > rows)
    ranks = ranks_of(resumed)
    assert len(ranks) == 2
    resumed.kill()
    assert psutil.wait_procs(ranks, timeout=60)[1] == []


def test_a_rank_with_another_configuration_is_named(start: Start) -> None:
    """Ranks that were started with other settings are told which, once; secrets are neither compared nor shown."""
    outcomes = ended_on_two_tasks(
        start,
        *SHORT,
        "strategy.extra_args.api_key=hunter2",
        of_rank_1=("algorithm.kl_coef=0.5", "strategy.extra_args.api_key=hunter3"),
        MASTER_PORT=free_port(),
    )
    assert [outcome.code for outcome in outcomes] == [2, 2]
    (line,) = "".join(outcome.err for outcome in outcomes).splitlines()
    assert "error: algorithm.kl_coef=0.5 on rank 1 is 0.01 on rank 0; start all ranks with the same" in line
    assert not any("hunter" in outcome.out + outcome.err for outcome in outcomes)


def test_a_world_size_that_does_not_divide_the_window_is_refused_once(start: Start) -> None:
    """The line is the same by `--nproc`, which starts nothing, and by torchrun, where one rank says it."""
    words = "train_batch_size=8 is not divisible by micro_train_batch_size(8) * world_size(2) = 16; use 16."
    own = ended(start("strategy.micro_train_batch_size=8", "--nproc=2"))
    assert (own.code, own.line) == (2, f"lightrft: error: {words}")
    under_torchrun = ended(start("strategy.micro_train_batch_size=8", program=TORCHRUN))
    (said,) = lines_of_ours(under_torchrun)
    assert said.endswith(words)
    assert not Path("run/config.toml").exists()


def test_two_ranks_show_an_evaluation_once(start: Start) -> None:
    """Under torchrun each rank scores its share, and rank 0 shows the whole; an error is said once."""
    assert main(["train", "run.toml", "run.warmup_steps=0", "run.num_steps=0", "--quiet"]) == 0
    shown = ended(start("--samples=1", program=TORCHRUN, command="evaluate run"))
    assert shown.code == 0, shown.err
    for name in ("weights", "accuracy", "reward", "prompt", "completion"):
        assert len(re.findall(f"^{name} ", shown.out, re.MULTILINE)) == 1 + (name == "reward"), shown.out
    failed = ended(start(program=TORCHRUN, command="evaluate run", FAILURE="all raise"))
    assert len(lines_of_ours(failed)) == 1


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((), "world_size=2 is more than strategy='single' supports, which is one process; set strategy.strategy="),
        (
            ("strategy.strategy=fsdp2", *THREE_PROMPTS),
            "algorithm.prompts_per_step=3 is not divisible by world_size(2); use 2 or 4.",
        ),
        (("strategy.strategy=fsdp2", "engine.type=nope"), "engine_type='nope' is not registered; Known: "),
    ],
)
def test_what_two_ranks_cannot_do_is_refused_before_they_start(
    capsys: pytest.CaptureFixture[str], settings: tuple[str, ...], words: str
) -> None:
    """The process that would start them says it, in the user's own terms, and nothing is written."""
    assert main(["train", "run.toml", "--nproc=2", *settings]) == 2
    assert words in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.usefixtures("workplace")
def test_what_a_rank_of_two_cannot_do_is_refused_before_they_meet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Under a launcher each rank sees it by itself: it neither waits for others nor writes a configuration."""
    monkeypatch.setenv(name, "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "run.toml", "--strategy=fsdp2", *THREE_PROMPTS]) == 2
    assert "algorithm.prompts_per_step=3 is not divisible by world_size(2); use 2 or 4." in capsys.readouterr().err
    assert not Path("run/config.toml").exists()


@pytest.mark.usefixtures("workplace")
def test_a_number_of_processes_that_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No processes at all, and processes of processes, are wrong input."""
    assert main(["train", "run.toml", "--nproc=0"]) == 2
    assert "--nproc=0 is no number of processes" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "run.toml", "--nproc=2"]) == 2
    assert "--nproc=2 is at odds with a launcher that has started 2 processes" in capsys.readouterr().err
