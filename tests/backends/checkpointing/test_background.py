"""Saves in the background; that they save what they should is a law, and what a kill leaves is in the kill matrices."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import attrs
import pytest
import torch
from torch import Tensor, nn

import lightrft
from lightrft.backends.collectives import simulated
from lightrft.backends.copying import await_copy
from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy import BackgroundSaves, Strategy, StrategyConfig, Trainable, background_saves, get_strategy
from lightrft.strategy.protocols import BuildStrategy
from lightrft.testing.laws.checkpoint.held import held_copying
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.replicated import build_gloo, build_simulated
from lightrft.testing.subject import subject_of


class Counting(nn.Module):
    """A layer with a buffer that every forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("passes", torch.zeros(4))

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        return self.linear(inputs)


class Hookless(torch.optim.Optimizer):
    """An optimizer that did not call what torch's own does when it is made."""

    def __init__(self, model: nn.Module) -> None:
        self.defaults, self.state = {}, defaultdict(dict)
        self.param_groups = [{"params": [*model.parameters()]}]


def fused_adamw(parameters: Iterator[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # workers get this path
    yield importlib.import_module("background_programs")
    sys.path.remove(folder)


@pytest.fixture
def strategy() -> Strategy:
    return get_strategy(StrategyConfig(strategy="single", micro_train_batch_size=1, train_batch_size=2))


@pytest.fixture
def gate() -> threading.Event:
    """Closed."""
    return threading.Event()


@contextmanager
def opening(strategy: Strategy, gate: threading.Event) -> Iterator[BackgroundSaves]:
    """Saves in the background, and a gate that is open before they are waited for, also in a test that fails."""
    with background_saves(strategy) as background:
        try:
            yield background
        finally:
            gate.set()


def made(strategy: Strategy, model: nn.Module | None = None) -> Trainable:
    model = model or nn.Linear(3, 2)
    return strategy.prepare((model, strategy.create_optimizer(model, lr=0.1), None))


def learn(strategy: Strategy, trainable: Trainable) -> None:
    model, optimizer, scheduler = trainable
    strategy.backward(model(torch.ones(1, 3)).sum(), model, optimizer)
    strategy.optimizer_step(optimizer, model, scheduler)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def opened(gate: threading.Event) -> threading.Timer:
    """Open a gate a little later; what does not wait for it comes first."""
    timer = threading.Timer(0.2, gate.set)
    timer.start()
    return timer


def is_waiting(thread: threading.Thread) -> bool:
    """Whether a thread waits for an event."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code is not threading.Event.wait.__code__:
        frame = frame.f_back
    return frame is not None


def test_the_call_returns_before_anything_is_made(tmp_path: Path, strategy: Strategy, gate: threading.Event) -> None:
    """The path of the checkpoint is known at once, and nothing but its place is on the disk before it is copied."""
    with opening(strategy, gate) as background:
        path = strategy.save_ckpt(nn.Linear(2, 1), tmp_path / "a" / "b", background=held_copying(background, gate))
        assert path == tmp_path / "a" / "b" / "step-00000001"
        reserved = [*path.parent.iterdir()]
        assert [re.sub("[0-9a-f]{16}$", "", place.name) for place in reserved] == [".step-00000001.tmp-"]
        assert [*reserved[0].iterdir()] == []
        gate.set()
        background.wait()
        assert strategy.latest_ckpt(tmp_path / "a" / "b") == 1


def test_an_optimizer_of_the_user_waits_too(tmp_path: Path, strategy: Strategy, gate: threading.Event) -> None:
    """`optimizer.step()` waits for the copy of what it changes, and is done afterwards."""
    trainable = made(strategy)
    learn(strategy, trainable)
    learn(strategy, trainable)
    before = bits(trainable.model)
    with opening(strategy, gate) as background:
        strategy.save_ckpt(trainable, tmp_path, background=held_copying(background, gate))
        trainable.model(torch.ones(1, 3)).sum().backward()
        timer = opened(gate)
        trainable.optimizer.step()
        timer.join()
    assert not same(bits(trainable.model), before)
    strategy.load_ckpt(trainable, tmp_path)
    assert same(bits(trainable.model), before)


@pytest.mark.parametrize("build", [fused_adamw, torch.optim.SGD])
@pytest.mark.parametrize("shared", ["the model", "its trunk"])
def test_an_optimizer_that_is_not_saved_waits_too(
    tmp_path: Path,
    strategy: Strategy,
    gate: threading.Event,
    shared: str,
    build: Callable[..., torch.optim.Optimizer],
) -> None:
    """Torch's own `step` of what is saved, or of a part of it, waits for the copy, fused kernels or not."""
    actor = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    stepped = actor if shared == "the model" else nn.Sequential(actor[0], nn.Linear(2, 1))
    optimizer = build(stepped.parameters(), lr=0.1)
    was_open: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: was_open.append(gate.is_set()))
    stepped(torch.ones(1, 3)).sum().backward()
    before = bits(actor)
    with opening(strategy, gate) as background:
        strategy.save_ckpt(actor, tmp_path, background=held_copying(background, gate))
        timer = opened(gate)
        optimizer.step()
        timer.join()
    assert was_open == [True]
    assert not same(bits(actor), before)
    strategy.load_ckpt(actor, tmp_path)
    assert same(bits(actor), before)


def test_a_step_that_waits_is_not_disturbed_by_other_saves(
    tmp_path: Path, strategy: Strategy, gate: threading.Event
) -> None:
    """A thread that waits to step goes on when its own copy is there, whatever is saved and changed meanwhile."""
    trainable, other = made(strategy), nn.Linear(3, 2)
    trainable.model(torch.ones(1, 3)).sum().backward()
    before, errors = bits(trainable.model), list[BaseException]()

    def step() -> None:
        try:
            trainable.optimizer.step()
        except BaseException as error:  # noqa: BLE001 (of a thread, which nobody else would see)
            errors.append(error)

    thread = threading.Thread(target=step)
    with opening(strategy, gate) as background, background_saves(strategy) as second:
        strategy.save_ckpt(trainable, tmp_path / "first", background=held_copying(background, gate))
        strategy.save_ckpt(other, tmp_path / "second", background=second)
        thread.start()
        while thread.is_alive() and not is_waiting(thread):
            time.sleep(0.01)
        second.wait()
        strategy.load_ckpt(other, tmp_path / "second")
        strategy.save_ckpt(nn.Linear(3, 2), tmp_path / "second", background=second)
        gate.set()
        thread.join()
    assert errors == []
    assert not same(bits(trainable.model), before)
    strategy.load_ckpt(trainable, tmp_path / "first")
    assert same(bits(trainable.model), before)


def test_an_optimizer_without_hooks_is_saved(tmp_path: Path, strategy: Strategy) -> None:
    """An optimizer that nobody can hook into is saved like others, and what it steps may be changed afterwards."""
    model = nn.Linear(3, 2)
    with background_saves(strategy) as background:
        strategy.save_ckpt(Trainable(model, Hookless(model), None), tmp_path, background=background)
        learn(strategy, made(strategy, model))
    assert strategy.latest_ckpt(tmp_path) == 1


def test_what_a_pass_changes_is_copied_at_once(tmp_path: Path, strategy: Strategy, gate: threading.Event) -> None:
    """Buffers and the gradients of an open window are those at the call, though passes go on before the copy."""
    trainable = made(strategy, Counting())
    learn(strategy, trainable)  # half a window
    gradient = trainable.model.get_parameter("linear.weight").grad
    assert gradient is not None
    before, gradient = bits(trainable.model), gradient.clone()
    with opening(strategy, gate) as background:
        strategy.save_ckpt(trainable, tmp_path, background=held_copying(background, gate))
        strategy.backward(trainable.model(torch.ones(1, 3)).sum(), trainable.model, trainable.optimizer)
        gate.set()
    assert not same(bits(trainable.model), before)
    strategy.load_ckpt(trainable, tmp_path)
    assert same(bits(trainable.model), before)
    restored = trainable.model.get_parameter("linear.weight").grad
    assert restored is not None
    assert torch.equal(restored, gradient)


def test_a_change_behind_its_back_is_noticed(tmp_path: Path, strategy: Strategy, gate: threading.Event) -> None:
    """A tensor that somebody writes to while it is copied fails the save, and is named; the one before stays."""
    model = nn.Linear(2, 1)
    with opening(strategy, gate) as background:
        strategy.save_ckpt(model, tmp_path, background=background)
        strategy.save_ckpt(model, tmp_path, background=held_copying(background, gate))
        with torch.no_grad():
            model.bias.add_(1)
        gate.set()
        with pytest.raises(CheckpointError, match=r"step=2 .*bias was changed while it was copied"):
            background.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_tensors_that_torch_does_not_count_are_copied_too(
    tmp_path: Path, strategy: Strategy, gate: threading.Event
) -> None:
    """A tensor of inference mode, whose changes nobody counts, is copied by the call, and may be changed after it."""
    with torch.inference_mode():
        model = nn.Linear(2, 1)
        before = bits(model)
        with opening(strategy, gate) as background:
            strategy.save_ckpt(model, tmp_path, background=held_copying(background, gate))
            model.weight.add_(1)
            gate.set()
        strategy.load_ckpt(model, tmp_path)
        assert same(bits(model), before)


def test_copies_of_a_handle_wait_for_nothing(tmp_path: Path, strategy: Strategy, gate: threading.Event) -> None:
    """A model and an optimizer may be copied and pickled while they are saved; copies may be changed at once."""
    trainable = made(strategy)
    with opening(strategy, gate) as background:
        strategy.save_ckpt(trainable, tmp_path, background=held_copying(background, gate))
        for copied in (*copy.deepcopy(tuple(trainable)), pickle.loads(pickle.dumps(trainable.model))):  # noqa: S301 (our own)
            if copied is not None:
                await_copy(copied)
        gate.set()


def test_an_existing_step_is_refused_by_the_call(tmp_path: Path, strategy: Strategy) -> None:
    """What can be refused is refused before the call returns, and the handle goes on."""
    with background_saves(strategy) as background:
        strategy.save_ckpt(nn.Linear(2, 1), tmp_path, step=3, background=background)
        with pytest.raises(CheckpointError, match="step=3 exists already"):
            strategy.save_ckpt(nn.Linear(2, 1), tmp_path, step=3, background=background)
        with pytest.raises(ConfigError, match="max_num=0"):
            strategy.save_ckpt(nn.Linear(2, 1), tmp_path, step=4, max_num=0, background=background)
        strategy.save_ckpt(nn.Linear(2, 1), tmp_path, background=background)
    assert strategy.latest_ckpt(tmp_path) == 4


def fail(strategy: Strategy, directory: Path, background: BackgroundSaves) -> None:
    """Begin a save whose place is taken before it is written."""
    gate = threading.Event()
    path = strategy.save_ckpt(nn.Linear(2, 1), directory, step=7, background=held_copying(background, gate))
    (path / "notes").mkdir(parents=True)
    gate.set()


def test_an_error_on_its_way_has_the_failed_save_as_a_note(tmp_path: Path, strategy: Strategy) -> None:
    """An error of the run stays what it is, and says that the last save failed, too."""

    def run() -> None:
        with background_saves(strategy) as background:
            fail(strategy, tmp_path, background)
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        run()
    assert any("step=7" in note for note in caught.value.__notes__)


def test_an_exit_does_not_hide_a_failed_save(tmp_path: Path, strategy: Strategy) -> None:
    """A program that ends itself inside of the context ends in the error of the save."""

    def run() -> None:
        with background_saves(strategy) as background:
            fail(strategy, tmp_path, background)
            raise SystemExit(0)

    with pytest.raises(CheckpointError, match="step=7") as caught:
        run()
    assert isinstance(caught.value.__context__, SystemExit)


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
def test_a_thread_that_is_ended_is_a_failed_save(tmp_path: Path, strategy: Strategy, end: type[BaseException]) -> None:
    """What ends the thread, and is no error to Python, is raised by who waits, once."""

    def ended(_: object) -> None:
        raise end

    with background_saves(strategy) as background:
        ending = attrs.evolve(background, collectives=attrs.evolve(background.collectives, all_gather=ended))  # type: ignore[misc]
        strategy.save_ckpt(nn.Linear(2, 1), tmp_path, background=ending)
        with pytest.raises(CheckpointError, match=f"a save in the background ended in {end.__name__}"):
            background.wait()
        strategy.save_ckpt(nn.Linear(2, 1), tmp_path, background=background)
    assert strategy.latest_ckpt(tmp_path) == 1


def test_a_handle_that_was_left_is_refused(tmp_path: Path, strategy: Strategy) -> None:
    """A save by a handle whose context was left is an error, nothing is written, and nothing waits for a copy."""
    with background_saves(strategy) as background:
        pass
    trainable = made(strategy)
    with pytest.raises(CheckpointError, match="was left"):
        strategy.save_ckpt(trainable, tmp_path, background=background)
    await_copy(*trainable[:2])
    assert list(tmp_path.iterdir()) == []


def test_a_relative_directory_is_that_of_the_call(
    tmp_path: Path, strategy: Strategy, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that goes elsewhere while it is saved finds the checkpoint where it was at the call."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with opening(strategy, gate) as background:
        path = strategy.save_ckpt(nn.Linear(2, 1), "run", background=held_copying(background, gate))
        monkeypatch.chdir(tmp_path / "elsewhere")
        gate.set()
    assert path == Path("run/step-00000001")
    assert strategy.latest_ckpt(tmp_path / "run") == 1
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("how", ["fine", "full"])
def test_a_process_that_ends_without_leaving_completes_the_save(tmp_path: Path, programs: ModuleType, how: str) -> None:
    """The save is committed although the program is over, or its error is printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lightrft.__file__).parents[1])}
    done = subprocess.run(  # noqa: S603 (our own program)
        [sys.executable, str(programs.__file__), str(tmp_path), how],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    committed = (tmp_path / "step-00000001" / "manifest.json").exists()
    assert committed == (how == "fine")
    assert done.stderr.startswith("lightrft: saving step=1 in the background: ") == (how == "full"), done.stderr


@pytest.mark.parametrize("target", [build_gloo, "fsdp2"])
def test_ranks_save_over_a_group_of_their_own(
    tmp_path: Path, programs: ModuleType, spawn: SpawnRank, target: str | BuildStrategy
) -> None:
    """Two processes save while they reduce; neither the group nor a thread is left, and an error of one is of both.

    Where all groups were destroyed inside of the context, leaving has nothing left to destroy, and no error.
    """
    subject = subject_of(target, "strategy", config=StrategyConfig(timeout=40))
    with processes(subject, 2, timeout=60, spawn=spawn) as run:
        fine = run(programs.save_on_ranks, programs.Job(directory=str(tmp_path / "fine")))
        changed = run(programs.save_on_ranks, programs.Job(directory=str(tmp_path / "changed"), changed=0))
        assert run(programs.tear_down_inside, programs.Job(directory=str(tmp_path / "torn down"))) == [1, 1]
    for seen in (*fine, *changed):
        assert seen.groups[0] == seen.groups[1]
        assert seen.threads[0] == seen.threads[1]
        assert seen.timeouts[0] == seen.timeouts[1]
    assert [(seen.errors, seen.newest) for seen in fine] == [([], 2)] * 2
    assert [seen.newest for seen in changed] == [1, 1]
    for seen in changed:
        assert "weight was changed while it was copied" in seen.errors[0]
        assert seen.errors[0].startswith("saving step=2 in the background: ")


def test_ranks_that_are_not_of_torch_need_collectives() -> None:
    """Simulated ranks have no process group, so they are asked for collectives of a second thread."""

    def program(rank: int) -> str:
        del rank
        with pytest.raises(ConfigError, match="apart=None"), background_saves(build_simulated(StrategyConfig())):
            pass
        return ""

    simulated.run_simulated(2, program)


def test_saves_without_a_step_beside_one_another_take_different_ones(
    tmp_path: Path, strategy: Strategy, gate: threading.Event
) -> None:
    """Who asks for the next step gets the one after those that are being written, by this handle or another."""
    models = [nn.Linear(2, 1) for _ in range(4)]
    with opening(strategy, gate) as background, background_saves(strategy) as second:
        first = strategy.save_ckpt(models[0], tmp_path, background=held_copying(background, gate))
        paths = [
            first,
            strategy.save_ckpt(models[1], tmp_path),
            strategy.save_ckpt(models[2], tmp_path, background=second),
            strategy.save_ckpt(models[3], tmp_path),
        ]
        second.wait()
        gate.set()
    assert [path.name for path in paths] == [f"step-{step:08d}" for step in (1, 2, 3, 4)]
    for step, model in enumerate(models, start=1):
        loaded = nn.Linear(2, 1)
        strategy.load_ckpt(loaded, tmp_path, step=step)
        assert same(bits(loaded), bits(model))
    assert sorted(tmp_path.iterdir()) == paths


def test_saves_of_two_models_do_not_hold_one_another_up(
    tmp_path: Path, strategy: Strategy, gate: threading.Event
) -> None:
    """A model that is not saved is stepped while another one is copied."""
    saved, other = made(strategy), made(strategy)
    before = bits(other.model)
    with opening(strategy, gate) as background:
        strategy.save_ckpt(saved, tmp_path, background=held_copying(background, gate))
        learn(strategy, other)
        learn(strategy, other)
        assert not gate.is_set()
        gate.set()
    assert not same(bits(other.model), before)
    assert attrs.asdict(background, recurse=False).keys() == {"collectives", "start", "wait"}
