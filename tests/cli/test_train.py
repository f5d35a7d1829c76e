"""Whole runs through `lightrft train`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from cli_runs import Cli

from lightrft.cli.run_dir import open_run_dir
from lightrft.config import load_config, to_toml
from lightrft.tracking.files import channel_path, read_rows


def numbers_of(row: Mapping[str, object]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, (int, float))}


def test_a_run_from_beginning_to_end_and_again(cli: Cli, workplace: Path) -> None:
    """A run says what it is, logs every step, leaves a model and a report, and again it does nothing."""
    outcome = cli("train", "run.toml")
    assert (outcome.code, outcome.err) == (0, "")
    for words in ("single on cpu (1 thread)", "hf", "3,", "24 to learn from, 6 held out", "new run of 24 steps"):
        assert words in outcome.out
    rows = list(read_rows(channel_path("run", "metrics")))
    assert [row["step"] for row in rows if row["kind"] == "warmup"] == list(range(1, 13))
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(13, 25))
    first, last = ([row for row in rows if row["kind"] == "evaluation"][index] for index in (0, -1))
    assert f"accuracy  {first['accuracy']:.1%} before reinforcement, {last['accuracy']:.1%} after" in outcome.out
    assert "resume    lightrft train run.toml\n" in outcome.out
    assert "evaluate  lightrft evaluate run\n" in outcome.out
    assert (workplace / "run" / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (workplace / "run" / "model" / "model.safetensors").is_file()

    logged = channel_path("run", "metrics").read_bytes()
    again = cli("train", "run.toml", "--quiet")
    assert (again.code, again.err) == (0, "")
    assert "resumed from step 24 of 24 steps" in again.out
    assert channel_path("run", "metrics").read_bytes() == logged

    measured = cli("evaluate", "run", "--samples=1")
    assert measured.code == 0
    assert f"{last['accuracy']:.1%} of 6 held-out problems" in measured.out
    assert f"reward    {last['reward']:.4f} on average" in measured.out
    assert "step 24" in measured.out
    assert measured.out.count("completion  ") == 1


@pytest.mark.usefixtures("workplace")
def test_a_checked_run_is_the_same(cli: Cli) -> None:
    """`--checked` holds a run to the laws and changes no bit of what it logs; the line that resumes keeps it."""
    short = ("run.warmup_steps=2", "run.num_steps=2", "run.evaluate_every=1")
    assert cli("train", "run.toml", *short).code == 0
    checked = cli("train", "run.toml", *short, "run.dir=held", "--checked")
    assert (checked.code, checked.err) == (0, "")
    assert channel_path("held", "metrics").read_bytes() == channel_path("run", "metrics").read_bytes()
    assert "resume    lightrft train run.toml" in checked.out
    assert "--checked\n" in checked.out


@pytest.mark.usefixtures("workplace")
def test_what_would_change_a_resumed_run_is_refused(cli: Cli) -> None:
    """Settings that differ from those of the checkpoint are named with both values; some may change."""
    short = ("run.warmup_steps=0", "run.num_steps=1")
    assert cli("train", "run.toml", *short).code == 0
    changes = ("strategy.seed=4", "strategy.l2=0.1", "algorithm.dual_clip=3", "data.train_size=5")
    refused = cli("train", "run.toml", *short, *changes)
    assert refused.code == 2
    for words in (
        "strategy.seed=4 (was 3), strategy.l2=0.1 (was 0.0), algorithm.dual_clip=3.0 (was not set) and 1 more",
        "set what run/config.toml says",
    ):
        assert words in refused.line
    assert cli("train", "run.toml", *short, "checkpoint.save_every=7", "run.threads=2").code == 0


@pytest.mark.usefixtures("workplace")
def test_a_run_goes_on_by_other_means(cli: Cli) -> None:
    """Strategy, sharding, micro-batches and timeout may change while a run lasts: what it logs is the same."""
    short = ("run.warmup_steps=0", "run.num_steps=3", "checkpoint.save_every=1", "--quiet")
    assert cli("train", "run.toml", *short).code == 0
    before = list(read_rows(channel_path("run", "metrics")))
    for directory in (max(Path("run/checkpoints").glob("step-*")), Path("run/model")):
        shutil.rmtree(directory)
    means = (
        "strategy.strategy=fsdp2",
        "strategy.fsdp_reshard_after_forward=false",
        "strategy.zero_stage=1",
        "strategy.gradient_checkpointing=true",
        "strategy.micro_train_batch_size=2",
        "strategy.enable_engine_sleep=true",
        "strategy.timeout=60",
        "engine.batch_size=3",
    )
    outcome = cli("train", "run.toml", *short, *means)
    assert (outcome.code, outcome.err) == (0, "")
    assert "resumed from step 2 of 3" in outcome.out
    after = list(read_rows(channel_path("run", "metrics")))
    assert [row["kind"] for row in after] == [row["kind"] for row in before]
    assert numbers_of(after[-1]) == pytest.approx(numbers_of(before[-1]), rel=1e-4, abs=1e-6)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("change", ["strategy.bf16=true", "strategy.train_batch_size=4", "engine.type=scripted"])
def test_the_mathematics_of_a_run_stay(cli: Cli, change: str) -> None:
    """What is computed, and in which precision, is bound to the run."""
    short = ("run.warmup_steps=0", "run.num_steps=0", "--quiet")
    assert cli("train", "run.toml", *short).code == 0
    refused = cli("train", "run.toml", *short, change)
    assert refused.code == 2
    assert "would change a run that goes on from a checkpoint" in refused.line


def test_a_finished_model_without_a_checkpoint_is_not_passed_off_as_new(cli: Cli, workplace: Path) -> None:
    """A directory whose checkpoints were removed, but not its model, is refused."""
    (workplace / "run" / "model").mkdir(parents=True)
    outcome = cli("train", "run.toml")
    assert outcome.code == 2
    assert "run.dir='run' holds a finished model" in outcome.line


def test_a_damaged_configuration_of_the_run_is_named(cli: Cli, workplace: Path) -> None:
    """A run whose config.toml was damaged does not go on with settings that nobody can compare."""
    short = ("run.warmup_steps=0", "run.num_steps=0")
    assert cli("train", "run.toml", *short).code == 0
    (workplace / "run" / "config.toml").write_text("[")
    outcome = cli("train", "run.toml", *short)
    assert outcome.code == 2
    assert "config='run/config.toml' cannot be read" in outcome.line


def test_options_may_stand_anywhere(cli: Cli, workplace: Path) -> None:
    """Options between settings, and the short forms of strategy and engine, mean the same as settings."""
    printed = cli("train", "--engine", "scripted", "run.toml", "strategy.seed=9", "--print-config", "run.num_steps=2")
    expected = load_config("run.toml", ["engine.type=scripted", "strategy.seed=9", "run.num_steps=2"])
    assert (printed.code, printed.out) == (0, to_toml(expected))
    fake = cli("train", "run.toml", "--strategy=fake", "--print-config")
    assert 'strategy = "fake"' in fake.out
    assert not (workplace / "run").exists()


def test_when_to_save_has_short_forms(cli: Cli, workplace: Path) -> None:
    """They mean the settings, stand in the command to resume, and a value that is none is refused by its setting."""
    printed = cli("train", "run.toml", "--save-every", "7", "--save-minutes=2.5", "--print-config")
    assert printed.out == to_toml(load_config("run.toml", ["checkpoint.save_every=7", "checkpoint.save_minutes=2.5"]))
    for option, reason in (
        ("--save-every=-1", "save_every=-1 is too small; use 0 or more"),
        ("--save-minutes=nan", "save_minutes"),
        ("--save-every=often", "argument --save-every: invalid int value: 'often'"),
    ):
        refused = cli("train", "run.toml", option)
        assert refused.code == 2
        assert reason in refused.line
    short = ("run.warmup_steps=0", "run.num_steps=2")
    outcome = cli("train", "run.toml", *short, "--save-every", "1", "--save-minutes", "60", "--quiet")
    assert outcome.code == 0
    assert f"lightrft train run.toml {' '.join(short)} --save-every 1 --save-minutes 60.0\n" in outcome.out
    assert [path.name for path in sorted((workplace / "run" / "checkpoints").iterdir())] == [
        "step-00000001",
        "step-00000002",
    ]


def test_the_printed_configuration_reads_back_equal(cli: Cli, workplace: Path) -> None:
    """What `--print-config` writes is a TOML file with the same configuration."""
    (workplace / "whole.toml").write_text(cli("train", "run.toml", "--print-config").out)
    assert load_config("whole.toml") == load_config("run.toml")


@pytest.mark.usefixtures("workplace")
def test_a_sharded_run_of_one_process_is_resumed_by_its_own_name(cli: Cli) -> None:
    """One process trains under "fsdp2" without a word about it, and is told how to go on."""
    outcome = cli("train", "run.toml", "--strategy=fsdp2", "run.warmup_steps=0", "run.num_steps=0", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert "resume    lightrft train run.toml run.warmup_steps=0 run.num_steps=0 --strategy fsdp2\n" in outcome.out


@pytest.mark.usefixtures("workplace")
def test_the_command_to_resume_shows_no_secret(cli: Cli) -> None:
    """A secret among the overrides is neither in what a run prints nor in what it keeps."""
    outcome = cli(
        "train",
        "run.toml",
        "run.num_steps=0",
        "run.warmup_steps=0",
        "strategy.extra_args.api_key=hunter2",
        "strategy.extra_args.more={hub_token = 'hunter2'}",
        "strategy.extra_args.plain=1",
    )
    assert outcome.code == 0
    assert "strategy.extra_args.api_key=***" in outcome.out.replace("'", "")
    assert "strategy.extra_args.plain=1" in outcome.out
    kept = [path.read_bytes() for path in Path("run").rglob("*") if path.is_file()]
    assert not any(b"hunter2" in text for text in [outcome.out.encode(), outcome.err.encode(), *kept])


@pytest.mark.usefixtures("workplace")
def test_a_directory_in_use_is_refused(cli: Cli) -> None:
    """Two runs never write to one directory at a time."""
    with open_run_dir("run"):
        outcome = cli("train", "run.toml")
    assert outcome.code == 2
    assert "run.dir='run' is in use by another process" in outcome.line


def test_a_task_of_reasoning_gym_by_name(cli: Cli, workplace: Path) -> None:
    """`data.task` makes problems and scores answers with the task's own verifier."""
    (workplace / "task.toml").write_text(
        (workplace / "run.toml").read_text().split("[data]")[0]
        + '[data]\ntask = "chain_sum"\ntrain_size = 8\nheldout_size = 4\n'
        "[data.task_options]\nmax_terms = 2\nmax_digits = 1\n"
        "[engine]\nmax_new_tokens = 4\n[algorithm]\nprompts_per_step = 2\nnum_samples = 4\n[run]\nnum_steps = 1\n"
    )
    outcome = cli("train", "task.toml", "model.alphabet=''", "model.max_length=128", "run.dir=run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "8 to learn from, 4 held out" in outcome.out


@pytest.mark.usefixtures("workplace")
def test_a_run_of_many_ranks_is_evaluated_in_one(cli: Cli) -> None:
    """Copies of shards, which one process cannot have, are no reason to refuse the run that had them."""
    assert cli("train", "run.toml", "run.warmup_steps=0", "run.num_steps=0", "--quiet").code == 0
    plain = cli("evaluate", "run")
    copied = cli("evaluate", "run", "strategy.strategy=fsdp2", "strategy.fsdp_replicate=2", "strategy.zero_hpz=2")
    assert (copied.code, copied.err) == (0, "")
    assert copied.out == plain.out


def test_a_finished_model_can_be_evaluated_without_its_checkpoints(cli: Cli, workplace: Path) -> None:
    """Where there is no checkpoint, `evaluate` takes the exported model, and says so."""
    import shutil

    assert cli("train", "run.toml", "run.warmup_steps=2", "run.num_steps=1", "algorithm.kl_coef=0.0").code == 0
    from_checkpoint = cli("evaluate", "run")
    shutil.rmtree("run/checkpoints")
    before = {path: path.stat().st_mtime_ns for path in workplace.rglob("*") if "__pycache__" not in str(path)}
    from_model = cli("evaluate", "run")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert from_model.code == 0
    assert from_model.out.splitlines()[0] == "weights   run/model"
    assert from_model.out.splitlines()[1:] == from_checkpoint.out.splitlines()[1:]
    shutil.rmtree("run/model")
    nothing = cli("evaluate", "run")
    assert nothing.code == 2
    assert "holds neither a checkpoint nor a model" in nothing.line


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_commands_about_a_run_want_one(cli: Cli, tmp_path: Path, command: str) -> None:
    """Without a directory, with two, and with one that is no run, the line says what to name."""
    for argv in ([], ["a", "b"], [str(tmp_path / "none")]):
        outcome = cli(command, *argv)
        assert outcome.code == 2
        assert "name" in outcome.line


def test_the_report_goes_where_it_is_asked_to(cli: Cli, workplace: Path) -> None:
    """`--output` names the file; a place that cannot be is refused."""
    (workplace / "empty").mkdir()
    outcome = cli("report", "empty", "--output", "page.html")
    assert (outcome.code, outcome.out) == (0, "page.html\n")
    assert "No evaluation yet" in (workplace / "page.html").read_text()
    refused = cli("report", "empty", "--output", "nowhere/page.html")
    assert refused.code == 2
    assert "output='nowhere/page.html' cannot be written" in refused.line
    assert cli("report", "empty").out == "empty/report.html\n"
