"""Every kind of bad input ends with one clear line and its exit code, and no checkpoint is lost."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_runs import Cli, EditRewards

from lightrft.tracking.files import channel_path

_QUICK = ("run.warmup_steps=0", "run.num_steps=1", "--quiet")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no configuration is given; name a TOML file"),
        (["missing.toml"], "config='missing.toml' does not exist"),
        (["."], "config='.' is a directory"),
        (["run.toml", "other.toml"], "config='other.toml' is a second configuration file"),
        (["broken.toml"], "config='broken.toml' is not TOML at line 2, column 8"),
        (
            ["run.toml", "strategy.sed=1"],
            "strategy.sed=1 is not a setting of strategy; did you mean 'seed'?",
        ),
        (["run.toml", "run.num_steps=2.7"], "num_steps=2.7"),
        (["run.toml", "run.threads=100000"], "run.threads=100000 is out of range; use an integer in [0, 1024]"),
        (["run.toml", "strategy.seed=9223372036854775808"], "strategy.seed=9223372036854775808 is too large"),
        (["run.toml", "run.dir="], "run.dir='' is empty"),
        (["run.toml", "--strategy="], "strategy.strategy='' is empty"),
        (["run.toml", "--strategy=it's"], 'strategy="it\'s" is not registered'),
        (["run.toml", "--strategy=sngle"], "strategy='sngle' is not registered; did you mean 'single'?"),
        (["run.toml", "--engine=vlm"], "engine_type='vlm' is not registered"),
        (["run.toml", "data.path=none.jsonl"], "path='none.jsonl' cannot be read (No such file or directory)"),
        (["run.toml", "data.path=empty.jsonl"], "path='empty.jsonl' is empty"),
        (["run.toml", "data.path=torn.jsonl"], "path='torn.jsonl' line 3 is not JSON"),
        (
            ["run.toml", "data.path=long.jsonl"],
            "has 17 tokens, and with engine.max_new_tokens(4) that is more",
        ),
        (["run.toml", "data.path=strange.jsonl"], "holds 'x', which the tokenizer does not know"),
        (["run.toml", "data.reward=rewards:missing"], "reward='rewards:missing' names no function of 'rewards'"),
        (["run.toml", "data.reward=exact_mtch"], "reward='exact_mtch' is not known; did you mean 'exact_match'?"),
        (["run.toml", "data.reward=no_module:f"], "importing 'no_module' raised"),
        (["task.toml"], "task='chain_summ' is not known; near ones: chain_sum"),
        (["run.toml", "run.dir=run.toml"], "run.dir='run.toml' cannot be written (File exists)"),
        (["run.toml", "run.dir=run.toml/deep"], "run.dir='run.toml/deep' cannot be written (Not a directory)"),
        (["run.toml", "strategy.train_batch_size=12"], "train_batch_size=12 does not divide"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(cli: Cli, workplace: Path, argv: list[str], words: str) -> None:
    """What can be known before the first step is refused with one line that names it, and nothing is trained."""
    good = (workplace / "problems.jsonl").read_text()
    (workplace / "broken.toml").write_text("[strategy]\nseed = \n")
    (workplace / "empty.jsonl").write_text("\n")
    (workplace / "torn.jsonl").write_text('{"prompt": "1", "answer": "1"}\n\n{"prompt": "1+\n')
    (workplace / "long.jsonl").write_text(good + f'{{"prompt": "{"1" * 17}", "answer": "1"}}\n')
    (workplace / "strange.jsonl").write_text(good + '{"prompt": "x", "answer": "1"}\n')
    (workplace / "task.toml").write_text(
        '[data]\ntask = "chain_summ"\ntrain_size = 4\n[strategy]\nstrategy = "single"\n'
    )
    outcome = cli("train", *argv)
    assert outcome.code == 2
    assert outcome.line.startswith("lightrft: error: ")
    assert words in outcome.line
    assert "Traceback" not in outcome.out
    assert not list(workplace.rglob("step-*"))


@pytest.mark.usefixtures("workplace")
def test_two_mistakes_are_two_lines(cli: Cli) -> None:
    """All wrong settings are said at once, a line each."""
    outcome = cli("train", "run.toml", "strategy.sed=1", "run.numsteps=2")
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("lightrft: error: command line: ") for line in lines)


@contextmanager
def _without_privileges() -> Generator[None]:
    """Let permissions count: they do not for root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_directory_without_permission_is_refused(cli: Cli, workplace: Path) -> None:
    """A run directory that this user may not write is refused before anything is computed."""
    (workplace / "closed").mkdir(mode=0o500)
    with _without_privileges():
        outcome = cli("train", "run.toml", "run.dir=closed/run")
    assert outcome.code == 2
    assert "Permission denied" in outcome.line


@pytest.mark.parametrize(
    ("reward", "words"),
    [("raises", "raised KeyError: 'no such rubric'"), ("not_a_number", "returned nan; return a finite number")],
)
def test_a_reward_that_fails_leaves_the_checkpoint_intact(cli: Cli, workplace: Path, reward: str, words: str) -> None:
    """A reward that raises or returns NaN is exit code 1 and one line, and the checkpoint stays."""
    outcome = cli("train", "run.toml", f"data.reward=rewards:{reward}", "--quiet")
    assert outcome.code == 1
    assert words in outcome.line
    assert outcome.line.endswith("The last checkpoint, of step 9 in run/checkpoints, is intact.")
    assert (workplace / "run" / "checkpoints" / "step-00000009" / "manifest.json").is_file()
    again = cli("train", "run.toml", f"data.reward=rewards:{reward}", "--quiet")
    assert "resumed from step 9" in again.out


@pytest.mark.usefixtures("workplace")
def test_a_failure_before_the_first_checkpoint_promises_none(cli: Cli) -> None:
    """Where nothing was saved yet the line does not speak of a checkpoint."""
    outcome = cli("train", "run.toml", "data.reward=rewards:raises", *_QUICK)
    assert outcome.code == 1
    assert "checkpoint" not in outcome.line


@contextmanager
def _largest_file(num_bytes: int) -> Generator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_grow_ends_the_run_and_loses_nothing(
    cli: Cli, workplace: Path, edit_rewards: EditRewards
) -> None:
    """When writing fails, the line names path and checkpoint; with room again the run ends as if undisturbed."""
    settings = ("train", "run.toml", "--quiet")
    assert cli(*settings, "run.dir=whole").code == 0
    rewards = (workplace / "rewards.py").read_text()
    edit_rewards(rewards.replace("return sum(", "1 / 0; return sum(", 1))
    assert cli(*settings).code == 1  # after the checkpoint of step 9
    edit_rewards(rewards)
    with _largest_file(512):
        outcome = cli(*settings)
    assert outcome.code == 1
    assert "File too large" in outcome.line
    assert "run/" in outcome.line
    assert outcome.line.endswith("The last checkpoint, of step 9 in run/checkpoints, is intact.")
    assert cli(*settings).code == 0
    assert channel_path("run", "metrics").read_bytes() == channel_path("whole", "metrics").read_bytes()


_FILL = """\
    with open("disk/ballast", "wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(512))
            except OSError:
                break
"""


@contextmanager
def _small_disk(path: Path) -> Generator[None]:
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)  # noqa: S603 (our own words)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here ({mounted.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)  # noqa: S603, S607 (as above)


def test_a_full_disk_ends_the_run_and_loses_nothing(cli: Cli, workplace: Path, edit_rewards: EditRewards) -> None:
    """A disk that fills up in the middle of a run costs the steps since the last checkpoint and nothing else."""
    rewards = (workplace / "rewards.py").read_text()
    head = "def share_of_odd_digits(prompt, completion, answer):\n"
    settings = ("train", "run.toml", "--quiet")
    with _small_disk(workplace / "disk"):
        assert cli(*settings, "run.dir=whole").code == 0
        edit_rewards(rewards.replace(head, head + _FILL))
        outcome = cli(*settings, "run.dir=disk/run")
        assert outcome.code == 1
        assert "No space left on device" in outcome.line
        assert "disk/run/" in outcome.line
        assert outcome.line.endswith("The last checkpoint, of step 9 in disk/run/checkpoints, is intact.")
        (workplace / "disk" / "ballast").unlink()
        edit_rewards(rewards)
        assert cli(*settings, "run.dir=disk/run").code == 0
        assert channel_path("disk/run", "metrics").read_bytes() == channel_path("whole", "metrics").read_bytes()


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("at", ["", "    "])
def test_a_user_module_that_exits_does_not_end_the_run_as_done(cli: Cli, edit_rewards: EditRewards, at: str) -> None:
    """`sys.exit(0)`, in the module or in the reward, is one line and no success."""
    edit_rewards(f"import sys\n\ndef reward(prompt, completion, answer):\n    pass\n{at}sys.exit(0)\n")
    outcome = cli("train", "run.toml", "data.reward=rewards:reward", *_QUICK)
    assert outcome.code == (1 if at else 2)
    assert "raised SystemExit: 0; " in outcome.line


def test_a_damaged_checkpoint_is_not_called_intact(cli: Cli, workplace: Path) -> None:
    """The line says which directory to remove; then the run goes on from the checkpoint before it."""
    settings = ("train", "run.toml", "--quiet")
    assert cli(*settings).code == 0
    newest = workplace / "run" / "checkpoints" / "step-00000024"
    (newest / "actor.state.json").write_text("{")
    outcome = cli(*settings)
    assert outcome.code == 1
    assert "intact" not in outcome.line
    assert outcome.line.endswith("To go on from the one before it, remove run/checkpoints/step-00000024.")
    shutil.rmtree(newest)
    again = cli(*settings)
    assert again.code == 0
    assert "resumed from step 21 of 24" in again.out
