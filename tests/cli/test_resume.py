"""Killed or asked to stop, and started again: the metrics are those of an undisturbed run, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from cli_runs import Cli, Launch

from lightrft.tracking.files import channel_path


@pytest.fixture
def undisturbed(cli: Cli, workplace: Path) -> dict[str, bytes]:
    """Metrics and samples of a run from beginning to end."""
    assert cli("train", "run.toml", "run.dir=undisturbed", "--quiet").code == 0
    return _logged(workplace / "undisturbed")


def _logged(run_dir: Path) -> dict[str, bytes]:
    return {channel: channel_path(run_dir, channel).read_bytes() for channel in ("metrics", "samples")}


@pytest.mark.parametrize("how", ["false", "true"])
def test_a_killed_run_goes_on_bit_for_bit(
    cli: Cli, launch: Launch, workplace: Path, undisturbed: dict[str, bytes], how: str
) -> None:
    """SIGKILL before the first checkpoint, in the warm-up and in reinforcement costs nothing but time.

    So it is where checkpoints are written while steps go on.
    """
    command = ("train", "run.toml", f"checkpoint.save_in_background={how}")
    for rows in (2, 8, 19):
        killed = launch(*command, cwd=workplace, signal_at=f"{rows}:{signal.SIGKILL.value}")
        assert killed.code == -signal.SIGKILL, killed
    final = cli(*command, "--quiet")
    assert (final.code, final.err) == (0, "")
    assert "resumed from step " in final.out
    assert _logged(workplace / "run") == undisturbed


@pytest.mark.parametrize(
    ("number", "rows", "how"),
    [(signal.SIGTERM, 5, "false"), (signal.SIGINT, 16, "false"), (signal.SIGTERM, 17, "true")],
)
def test_a_run_that_is_asked_to_stop_goes_on_bit_for_bit(
    cli: Cli,
    launch: Launch,
    workplace: Path,
    undisturbed: dict[str, bytes],
    number: signal.Signals,
    rows: int,
    how: str,
) -> None:
    """SIGTERM and SIGINT end at a step boundary with a checkpoint and exit code 75; the same command goes on."""
    command = ("train", "run.toml", f"checkpoint.save_in_background={how}")
    stopped = launch(*command, cwd=workplace, signal_at=f"{rows}:{number.value}")
    assert stopped.code == 75, stopped
    assert stopped.line.startswith(f"lightrft: {number.name}: stopped after step ")
    assert "run the same command to go on." in stopped.line
    metrics = channel_path(workplace / "run", "metrics").read_bytes()
    assert undisturbed["metrics"].startswith(metrics)
    assert len(metrics) < len(undisturbed["metrics"])
    final = cli(*command, "--quiet")
    assert (final.code, final.err) == (0, "")
    step = stopped.line.split("after step ")[1].split()[0]
    assert f"resumed from step {step} of 24" in final.out
    assert _logged(workplace / "run") == undisturbed


def test_a_run_whose_save_in_the_background_failed_says_so(launch: Launch, workplace: Path) -> None:
    """A file that cannot be written while steps go on ends the run in one line, with an exit code of its own."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))\n"
    source = (workplace / "rewards.py").read_text()
    (workplace / "rewards.py").write_text(
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + limit + source
    )
    ended = launch("train", "run.toml", "checkpoint.save_in_background=true", "--quiet", cwd=workplace)
    assert ended.code == 1
    assert "in the background: save_dir=" in ended.err, ended
    assert "File too large" in ended.err
    assert not list((workplace / "run" / "checkpoints").iterdir())


def test_a_signal_during_a_step_ends_after_it(cli: Cli, workplace: Path) -> None:
    """One SIGTERM in the middle of a rollout: exit code 75 after that step, and the handlers are as before."""
    before = signal.getsignal(signal.SIGTERM)
    source = (workplace / "rewards.py").read_text()
    head = "def share_of_odd_digits(prompt, completion, answer):\n"
    once = "    if not os.path.exists('sent'):\n        open('sent', 'w').close()\n        os.kill(os.getpid(), 15)\n"
    (workplace / "rewards.py").write_text(source.replace(head, head + once))
    outcome = cli("train", "run.toml", "--quiet")
    assert outcome.code == 75
    assert outcome.line.startswith("lightrft: SIGTERM: stopped after step 12 with a checkpoint in run/checkpoints")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_the_run_at_once(cli: Cli, workplace: Path) -> None:
    """Whoever presses Ctrl-C twice does not wait for the step; the last checkpoint is there."""
    source = (workplace / "rewards.py").read_text()
    head = "def share_of_odd_digits(prompt, completion, answer):\n"
    twice = "    os.kill(os.getpid(), signal.SIGINT)\n    os.kill(os.getpid(), signal.SIGINT)\n"
    (workplace / "rewards.py").write_text(source.replace(head, head + twice))
    outcome = cli("train", "run.toml", "--quiet")
    assert outcome.code == 130
    assert outcome.line == (
        "lightrft: error: interrupted at once, in the middle of a step. "
        "The last checkpoint, of step 9 in run/checkpoints, is intact."
    )
