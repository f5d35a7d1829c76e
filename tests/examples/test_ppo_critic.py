"""Actor and critic by hand, on one process and on two."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "ppo_critic.py"
SMALL = ["--num_steps", "4", "--train_batch_size", "16", "--micro_train_batch_size", "4"]


def curve_of(printed: str) -> list[dict[str, float]]:
    """Return the numbers of each line that the example prints about a step."""
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    return [{name: float(value) for name, value in re.findall(r"(\w+) (\d+\.\d+)", line)} for line in lines]


def curve_of_single(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, float]]:
    """Return what the example prints in this process."""
    runpy.run_path(str(SCRIPT))["main"](list(words))
    return curve_of(capsys.readouterr().out)


@pytest.fixture(scope="module")
def small_curve() -> list[dict[str, float]]:
    """The curve of one process."""
    example = runpy.run_path(str(SCRIPT))
    args = example["parse_args"](SMALL)
    strategy = example["get_strategy"](args)
    curve: list[dict[str, float]] = example["train"](strategy, args)
    strategy.teardown()
    return curve


def test_actor_and_critic_learn(capsys: pytest.CaptureFixture[str]) -> None:
    """In twelve steps the reward triples, and what was printed in the first one is of models that have not learnt."""
    curve = curve_of_single(capsys, "--num_steps", "12")
    assert len(curve) == 12
    assert curve[0]["kl"] == 0
    assert curve[0]["value_loss"] > 0
    assert curve[-1]["reward"] > 3 * curve[0]["reward"] > 0


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed"])
def test_two_processes_have_the_curve_of_one(strategy: str, small_curve: list[dict[str, float]]) -> None:
    """Under torchrun, rank 0 alone prints, and every number of every step is that of "single"."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(SCRIPT), *SMALL, "--strategy", strategy]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=200)  # noqa: S603 (our own)
    assert done.returncode == 0, done.stderr
    seen = curve_of(done.stdout)
    assert len(seen) == len(small_curve) == 4
    for found, expected in zip(seen, small_curve, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)  # six digits are printed
    assert small_curve[-1]["kl"] > 1e-3  # so that the policies compared have moved
