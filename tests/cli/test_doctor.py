"""The doctor tries things out on this very machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from cli_runs import Cli

from lightrft.cli.checks import CHECKS, Check
from lightrft.cli.doctor import examine
from lightrft.cli.engine_life import STEPS, live
from lightrft.cli.trial import tiny_strategy
from lightrft.config import EngineConfig
from lightrft.errors import MissingPackageError, UnsupportedError
from lightrft.strategy import Completion, EngineHandle, StepResult, Strategy, get_strategy
from lightrft.strategy.protocols.rollout import Engine, SyncReport
from lightrft.weight_sync import Probe

CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")


def test_this_machine_is_well(cli: Cli) -> None:
    """On the machine of the tests every check passes: step, checkpoint round trip, engine, collective."""
    outcome = cli("doctor")
    rows = {line.split()[0]: line.split()[1] for line in outcome.out.splitlines()[1:]}
    assert rows == dict.fromkeys([check.name for check in CHECKS], "ok")
    assert (outcome.code, outcome.err) == (0, "")


def _absent() -> str:
    raise MissingPackageError("x is not installed")


def _broken() -> str:
    raise RuntimeError("it\nbroke")


def _well() -> str:
    return "fine"


def test_what_is_absent_is_no_failure_and_what_fails_stops_nothing() -> None:
    """A missing optional package is absent; an exception of any kind is a failure; the rest is still tried."""
    checks = [Check(name="a", look=_broken), Check(name="b", look=_absent), Check(name="c", look=_well)]
    rows, num_failed = examine(checks)
    assert rows == [
        ("a", "failed", "RuntimeError: it broke"),
        ("b", "absent", "x is not installed"),
        ("c", "ok", "fine"),
    ]
    assert num_failed == 1


def test_a_failure_is_the_exit_code(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """One failed check makes the exit code 1 and is counted under the table."""
    monkeypatch.setattr("lightrft.cli.checks.CHECKS", (Check(name="a", look=_broken), Check(name="c", look=_well)))
    outcome = cli("doctor")
    assert outcome.code == 1
    assert outcome.out.endswith("1 of 2 checks failed.\n")


def test_packages_that_are_missing_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optional package that is missing is absent, a required one is a failure."""
    monkeypatch.setattr("importlib.metadata.version", _not_found)
    rows, num_failed = examine([check for check in CHECKS if check.name in {"rich", "reasoning-gym"}])
    assert [row[:2] for row in rows] == [("rich", "failed"), ("reasoning-gym", "absent")]
    assert num_failed == 1


def _not_found(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("name", "broken_functions", "words"),
    [
        ("collective", {"all_reduce": "no_sum"}, "the sum of 1 * 3 ones is 0.0"),
        ("training", {"optimizer_step": "no_step"}, "did not step (frozen)"),
        ("training", {"optimizer_step": "empty_step"}, "in one step"),
        ("checkpoint", {"load_ckpt": "no_load"}, "after loading and was"),
        ("engine", {"gather_and_generate": "nothing"}, "0 completions came, and not 2 of each of 3 prompts"),
    ],
)
def test_a_strategy_that_does_not_do_its_work_fails(
    monkeypatch: pytest.MonkeyPatch, name: str, broken_functions: dict[str, str], words: str
) -> None:
    """Wrong sums, steps that do nothing, checkpoints that do not restore and engines that differ are found."""
    broken = attrs.evolve(
        get_strategy({"strategy": "single"}), **{field: _BROKEN[kind] for field, kind in broken_functions.items()}
    )

    def get_broken(config: object) -> Strategy:
        del config
        return broken

    monkeypatch.setattr("lightrft.cli.trial.get_strategy", get_broken)
    rows, num_failed = examine([check for check in CHECKS if check.name == name])
    assert num_failed == 1
    assert words in rows[0][2]


def _no_sum(data: torch.Tensor, op: str = "mean") -> torch.Tensor:
    del op
    return torch.zeros_like(data)


def _no_step(*handles: object, is_boundary: bool | None = None) -> StepResult:
    del handles, is_boundary
    return StepResult(stepped=False, grad_norm=None, learning_rate=0.0, skipped_reason="frozen")


def _no_load(*handles: object, **options: object) -> None:
    del handles, options


def _empty_step(*handles: object, is_boundary: bool | None = None) -> StepResult:
    del handles, is_boundary
    return StepResult(stepped=True, grad_norm=1.0, learning_rate=0.0, skipped_reason=None)


def _nothing(*arguments: object) -> list[object]:
    del arguments
    return []


_BROKEN = {
    "no_sum": _no_sum,
    "no_step": _no_step,
    "empty_step": _empty_step,
    "no_load": _no_load,
    "nothing": _nothing,
}


@pytest.mark.parametrize("engine", ["hf", "scripted"])
def test_an_engine_goes_through_its_life(cli: Cli, engine: str) -> None:
    """Each step of a life has its row, with what was seen of it and seconds."""
    outcome = cli("doctor", "--engine", engine, "batch_size=2")
    rows = [re.split(r" {2,}", line) for line in outcome.out.splitlines()]
    assert [row[0] for row in rows] == ["step", *STEPS]
    assert all(float(seconds) >= 0 for _, _, seconds in rows[1:])
    seen = {step: words for step, words, _ in rows}
    assert seen["generate"] == "6 completions of 3 prompts, 36 tokens"
    assert seen["sync"].endswith("weight version 1")
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "hff"), "--engine='hff' is not registered; did you mean 'hf'?"),
        (("--engine", "hf", "batch_size=0"), "engine.batch_size=0 is too small; use 1 or more."),
        (("--engine", "hf", "type=vllm"), "argument='type=vllm' is no setting of the engine 'hf'"),
        (("--engine", "hf", "small"), "argument='small' is no setting of the engine 'hf'"),
        (("batch_size=1",), "argument='batch_size=1' is a setting of no engine"),
    ],
)
def test_an_engine_that_cannot_be_chosen_is_wrong_input(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    """An unknown engine and what is no setting of one are said in a line, before anything is started."""
    outcome = cli("doctor", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.line


def test_a_package_that_is_not_there_is_wrong_input(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's package is asked for with the command that installs it."""
    monkeypatch.setattr("lightrft.backends.rollout.vllm.package.require_vllm", _absent)
    outcome = cli("doctor", "--engine", "vllm")
    assert (outcome.code, outcome.out, outcome.line) == (2, "", "lightrft: error: x is not installed")


def _with_engine(monkeypatch: pytest.MonkeyPatch, change: Callable[[Engine], Engine]) -> None:
    """Let the doctor meet an engine that was changed."""
    strategy = tiny_strategy()

    def setup_inference_engine(*arguments: object, **names: object) -> EngineHandle:
        handle = strategy.setup_inference_engine(*arguments, **names)  # type: ignore[arg-type]
        handle.engine = change(handle.engine)
        return handle

    _with_strategy(monkeypatch, attrs.evolve(strategy, setup_inference_engine=setup_inference_engine))


def _with_strategy(monkeypatch: pytest.MonkeyPatch, strategy: Strategy) -> None:
    def get_changed() -> Strategy:
        return strategy

    monkeypatch.setattr("lightrft.cli.engine_life.tiny_strategy", get_changed)


def _fails(cli: Cli, step: str, words: str) -> None:
    outcome = cli("doctor", "--engine", "scripted")
    rows = [line.split()[:2] for line in outcome.out.splitlines()]
    assert [row[0] for row in rows[1:]] == list(STEPS[: STEPS.index(step) + 1])
    assert rows[-1][1] == "failed"
    assert f"engine='scripted' fails at {step!r}: " in outcome.line
    assert words in outcome.line
    assert outcome.code == 1


def test_an_engine_that_does_not_start_fails(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the model, and not with the command, is a failed step."""

    def setup_inference_engine(*arguments: object, **names: object) -> EngineHandle:
        del arguments, names
        raise UnsupportedError("no such model")

    strategy = attrs.evolve(tiny_strategy(), setup_inference_engine=setup_inference_engine)
    _with_strategy(monkeypatch, strategy)
    _fails(cli, "start", "UnsupportedError: no such model")


def test_weights_that_the_engine_was_not_given_are_found(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that computes with the trainer's own weights follows them without a sync."""

    def probe_engine(*arguments: object) -> Probe:
        del arguments
        return Probe(difference=0.0, scale=1.0, bound=1e-5, agrees=True)

    monkeypatch.setattr("lightrft.cli.engine_life.probe_engine", probe_engine)
    _fails(cli, "sync", "new weights that it was not given")


def test_a_sync_that_does_nothing_is_found(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe sees old weights, whatever the sync reports."""

    def update_engine_weights(*arguments: object) -> SyncReport:
        del arguments
        return SyncReport(weight_version=1, num_tensors=1, num_bytes=1, max_logprob_difference=0.0)

    strategy = attrs.evolve(tiny_strategy(), update_engine_weights=update_engine_weights)
    _with_strategy(monkeypatch, strategy)
    _fails(cli, "verify", "nats from the trainer's (bound ")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("sleep", "the engine is 'awake' and must be 'asleep'"),
        ("wake", "the engine is 'asleep' and must be 'awake'"),
        ("close", "the engine is 'awake' and must be 'closed'"),
    ],
)
def test_a_step_that_is_left_out_is_found(cli: Cli, monkeypatch: pytest.MonkeyPatch, step: str, words: str) -> None:
    """An engine that does not sleep, wake or close, and says nothing, fails there."""

    def nothing(handle: EngineHandle) -> None:
        del handle

    def change(engine: Engine) -> Engine:
        return attrs.evolve(engine, **{step: nothing})

    _with_engine(monkeypatch, change)
    _fails(cli, step, words)


def test_an_engine_that_generates_in_its_sleep_is_found(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A status alone is no sleep: a request must be refused."""

    def sleep(handle: EngineHandle) -> None:
        handle.status = "asleep"

    def change(engine: Engine) -> Engine:
        def generate(handle: EngineHandle, *request: object) -> list[Completion]:
            before, handle.status = handle.status, "awake"
            try:
                return engine.generate(handle, *request)  # type: ignore[arg-type]
            finally:
                handle.status = before

        return attrs.evolve(engine, generate=generate, sleep=sleep)

    _with_engine(monkeypatch, change)
    _fails(cli, "sleep", "is 'asleep' and generates all the same")


def test_an_engine_that_wakes_as_another_is_found(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens after waking are those of before, or the step fails."""

    def change(engine: Engine) -> Engine:
        awoken = False

        def wake(handle: EngineHandle) -> None:
            nonlocal awoken
            awoken = True
            engine.wake(handle)

        def generate(handle: EngineHandle, *request: object) -> list[Completion]:
            made = engine.generate(handle, *request)  # type: ignore[arg-type]
            return [attrs.evolve(completion, token_ids=(0,)) for completion in made] if awoken else made

        return attrs.evolve(engine, wake=wake, generate=generate)

    _with_engine(monkeypatch, change)
    _fails(cli, "wake", "is not what the same request gave before sleeping")


def test_a_logprob_that_is_no_number_is_found(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions of weights that are not finite fail where they are made."""

    def change(engine: Engine) -> Engine:
        def generate(handle: EngineHandle, *request: object) -> list[Completion]:
            made = engine.generate(handle, *request)  # type: ignore[arg-type]
            return [attrs.evolve(one, logprobs=(float("nan"),) * len(one.token_ids)) for one in made]

        return attrs.evolve(engine, generate=generate)

    _with_engine(monkeypatch, change)
    _fails(cli, "generate", "a logprob is not finite")


@pytest.mark.skipif(not CHILDREN.exists(), reason="the system does not list the children of a process")
def test_a_process_that_is_left_is_found(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed engine whose process goes on has not been closed; its number is named."""
    started: list[subprocess.Popen[bytes]] = []

    def change(engine: Engine) -> Engine:
        waiting = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        started.append(subprocess.Popen(waiting, stdin=subprocess.PIPE))  # noqa: S603 (our own interpreter)
        return engine

    _with_engine(monkeypatch, change)
    try:
        _fails(cli, "close", "are left")
    finally:
        for process in started:
            process.communicate()


def test_what_a_failed_step_leaves_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stops in the middle of a life leaves no engine behind."""
    handles: list[EngineHandle] = []

    def change(engine: Engine) -> Engine:
        def close(handle: EngineHandle) -> None:
            handles.append(handle)
            engine.close(handle)

        return attrs.evolve(engine, close=close)

    _with_engine(monkeypatch, change)
    life = live(EngineConfig(type="scripted"))
    next(life)
    life.close()
    assert [handle.status for handle in handles] == ["closed"]
