"""`lightrft plan`: the table for machines that are not here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_runs import Cli

MANY = (
    "--world-size",
    "64",
    "strategy.strategy=fsdp2",
    "strategy.train_batch_size=512",
    "algorithm.prompts_per_step=128",
)


def rows_of(out: str) -> dict[str, list[str]]:
    """Return the columns of each row of the second table, by the name in its first one."""
    lines = out.partition("\n\n")[2].splitlines()
    cells = [re.split(r"  +", line) for line in lines]
    assert cells[0][:3] == ["memory of a rank", "where", "estimate"]
    return {row[0]: row[1:] for row in cells[1:]}


@pytest.mark.usefixtures("workplace")
def test_a_run_on_64_ranks_is_planned_here(cli: Cli) -> None:
    """The decisions are those of 64 ranks, and each part of the memory has a line with its formula."""
    outcome = cli("plan", "run.toml", *MANY)
    assert (outcome.code, outcome.err) == (0, "")
    for line in (
        "strategy  fsdp2",
        "ranks     64 on cuda",
        "sharding  optimizer state, gradients, parameters; mesh of dp_replicate(1) x dp_shard(64)",
        "precision float32",
        "window    512 samples = 64 ranks x 2 micro-batches x 4",
        "lengths   4 tokens of the longest prompt and 4 of a completion",
    ):
        assert f"{line}\n" in outcome.out
    rows = rows_of(outcome.out)
    for name in ("parameters", "gradients", "optimizer state", "gathered layers", "reference model", "logits chunk"):
        assert rows[name][0] == "cuda"
        assert " B x " in rows[name][2]
    assert rows["activations, recomputed"][0] == "not counted"
    assert not Path("run").exists()


@pytest.mark.usefixtures("workplace")
def test_what_is_offloaded_is_said(cli: Cli) -> None:
    """A line of the decisions names it, and it is summed apart; on a CPU there is nothing to offload."""
    words = (*MANY, "strategy.fsdp_cpu_offload=true", "strategy.fsdp_replicate=2")
    out = cli("plan", "run.toml", *words).out
    assert "offload   gradients, optimizer state, parameters in main memory\n" in out
    assert "mesh of dp_replicate(2) x dp_shard(32)\n" in out
    assert re.search(r"^memory    about .* on cuda, .* in main memory a rank$", out, re.MULTILINE)
    assert rows_of(out)["parameters"][0] == "main memory"
    on_cpu = cli("plan", "run.toml", *words, "--device=cpu").out
    assert "offload" not in on_cpu
    assert rows_of(on_cpu)["parameters"][0] == "cpu"


def test_train_prints_the_same_decisions(cli: Cli, workplace: Path) -> None:
    """What is planned for one rank on this CPU is what the run says when it starts."""
    del workplace
    planned = cli("plan", "run.toml", "--device=cpu").out.partition("\n\n")[0].splitlines()
    begun = cli("train", "run.toml", "run.warmup_steps=0", "run.num_steps=1", "--quiet").out.splitlines()
    shared = [line for line in planned if line.split()[0] in {"ranks", "precision", "window", "engine", "model"}]
    assert len(shared) == 5
    assert [line for line in begun if line in shared] == shared
    (memory,) = [line for line in planned if line.startswith("memory")]
    assert f"{memory}; lightrft plan shows its parts" in begun


@pytest.mark.usefixtures("workplace")
def test_the_length_of_prompts_may_be_given(cli: Cli) -> None:
    """With it no problem is read; without it the problems of the configuration are."""
    given = cli("plan", "run.toml", "--prompt-tokens=9", "data.path=none.jsonl")
    assert "lengths   9 tokens of the longest prompt and 4 of a completion\n" in given.out
    assert rows_of(given.out)["activations"][2].startswith("48 positions x (")
    assert "cannot be read" in cli("plan", "run.toml", "data.path=none.jsonl").line


@pytest.mark.usefixtures("workplace")
def test_a_step_is_measured_beside_the_estimate(cli: Cli) -> None:
    """`--measure` takes one step here: what it held of parameters, gradients and state is what was estimated."""
    outcome = cli("plan", "run.toml", "--measure")
    assert outcome.code == 0, outcome.err
    rows = rows_of(outcome.out)
    for name in ("parameters", "gradients", "optimizer state", "reference model"):
        _, estimate, measured, _ = rows[name]
        assert measured == estimate
    assert rows["logits chunk"][2] == "-"


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no configuration is given; name a TOML file: lightrft plan run.toml"),
        (["run.toml", "other.toml"], "config='other.toml' is a second configuration file"),
        (["missing.toml"], "config='missing.toml' does not exist"),
        (["run.toml", "--world-size=0"], "world_size=0 is no number of ranks; use 1 or more."),
        (["run.toml", "--world-size=two"], "argument --world-size: invalid int value: 'two'"),
        (["run.toml", "--world-size=2"], "world_size=2 is more than strategy='single' supports"),
        (
            ["run.toml", "--world-size=3", "strategy.strategy=fsdp2"],
            "train_batch_size=8 is not divisible by micro_train_batch_size(4) * world_size(3) = 12; use 12.",
        ),
        (["run.toml", "--prompt-tokens=0"], "--prompt-tokens=0 is no number of tokens; use 1 or more."),
        (["run.toml", "--device=tpu"], "argument --device: invalid choice: 'tpu'"),
        (["run.toml", "--measure", "--world-size=2"], "--measure takes a step in one process, and there are 2"),
        (["run.toml", "strategy.strategy=fsdp2", "strategy.fsdp_wrap=['Blok']"], "fsdp_wrap=('Blok',) names no module"),
    ],
)
def test_bad_input_is_one_line(cli: Cli, argv: list[str], words: str) -> None:
    """What makes no sense is refused in one line, and nothing is printed."""
    outcome = cli("plan", *argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.line
