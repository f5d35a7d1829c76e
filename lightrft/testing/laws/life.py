"""The life of a strategy: legal calls in any order lead where they must, and illegal ones change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import attrs
import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from lightrft.errors import CheckpointError, ConfigError, LawError, LightRFTError, StepError
from lightrft.strategy.protocols import Trainable
from lightrft.strategy.protocols.collectives import World
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.models import ModelCase, build_model
from lightrft.testing.law import Harness, Law
from lightrft.testing.ranks.here import scratch_directory, strategies_torn_down
from lightrft.testing.reference.digests import changed_names, digests

__all__ = ["LAWS", "strategy_machine"]

_STEPS = 20  # calls of one life; most of what can go wrong needs few
_RATE = 0.125
_DECAY = 0.5
_TOLERANCE = 1e-5  # what single precision leaves of a few steps, should a backend sum in another order


@attrs.frozen(kw_only=True, eq=False)
class _Twin:
    """The same training in plain torch: what a model of the strategy's state is compared with."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: ExponentialLR


@attrs.frozen(kw_only=True, eq=False)
class _Saved:
    """What a checkpoint must bring back."""

    seen: dict[str, str]
    twin: tuple[dict[str, Tensor], dict[str, Tensor | None], object, object]
    position: int
    is_pending: bool


@attrs.define(kw_only=True, eq=False)
class _Life:
    """A strategy, what it trains, and what is known of both."""

    strategy: Strategy
    directory: Path
    world: World
    trainable: Trainable
    average: nn.Module
    twin: _Twin
    window: int
    position: int = 0
    is_pending: bool = False
    saved: dict[int, _Saved] = attrs.field(factory=dict[int, _Saved])


def _begin(strategy: Strategy, directory: Path, case: ModelCase, window: int) -> _Life:
    world = strategy.setup_distributed()
    model, plain = build_model(case), build_model(case)
    optimizer, other = strategy.create_optimizer(model, lr=_RATE), strategy.create_optimizer(plain, lr=_RATE)
    return _Life(
        strategy=strategy,
        directory=directory,
        world=world,
        trainable=strategy.prepare((model, optimizer, ExponentialLR(optimizer, _DECAY))),
        average=strategy.prepare(build_model(attrs.evolve(case, seed=case.seed + 1))),
        twin=_Twin(model=plain, optimizer=other, scheduler=ExponentialLR(other, _DECAY)),
        window=window,
    )


def _fingerprints(life: _Life) -> dict[str, str]:
    named = {f"model.{name}": tensor for name, tensor in life.strategy.named_tensors(life.trainable.model)}
    averages = {f"average.{name}": tensor for name, tensor in life.strategy.named_tensors(life.average)}
    return digests({**named, **averages}.items())


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _require(is_right: bool, what: str) -> None:
    if not is_right:
        raise LawError(what)


def _require_unchanged(before: dict[str, str], life: _Life, what: str) -> None:
    changed = changed_names(before, _fingerprints(life))
    _require(not changed, f"{what} must change no parameter, and {changed} are others.")


def _require_refusal(life: _Life, call: Callable[[], object], error: type[LightRFTError], what: str) -> None:
    before, files = _fingerprints(life), _files(life.directory)
    try:
        result = call()
    except error:
        pass
    else:
        raise LawError(f"{what} must raise {error.__name__}, and returned {result!r}.")
    _require_unchanged(before, life, f"{what}, refused,")
    _require(_files(life.directory) == files, f"{what}, refused, must leave every file as it is.")


def _loss(model: nn.Module, token: int) -> Tensor:
    logits_BTV: Tensor = model(torch.tensor([[token]]))
    return (logits_BTV - 1.0).square().mean()


def _backward(life: _Life, token: int) -> None:
    before = _fingerprints(life)
    model, optimizer, _ = life.trainable
    life.strategy.backward(_loss(model, token), model, optimizer)
    (_loss(life.twin.model, token) * (1.0 / life.window)).backward()  # type: ignore[no-untyped-call]  # so in torch
    life.is_pending = True
    _require_unchanged(before, life, "backward")


def _step(life: _Life) -> None:
    model, optimizer, scheduler = life.trainable
    if not life.is_pending:
        _require_refusal(
            life,
            lambda: life.strategy.optimizer_step(optimizer, model, scheduler),
            StepError,
            "optimizer_step without a backward",
        )
        return
    before, rate = _fingerprints(life), life.twin.optimizer.param_groups[0]["lr"]
    result = life.strategy.optimizer_step(optimizer, model, scheduler)
    life.is_pending, life.position = False, (life.position + 1) % life.window
    is_last = life.position == 0
    _require(
        (result.stepped, result.grad_norm is not None, result.learning_rate) == (is_last, is_last, rate),
        f"micro-batch {life.position or life.window} of {life.window} at rate {rate} came to {result}.",
    )
    if is_last:
        life.twin.optimizer.step()
        life.twin.optimizer.zero_grad()
        life.twin.scheduler.step()
        _require_twin(life)
    else:
        _require_unchanged(before, life, "optimizer_step inside of a window")


def _require_twin(life: _Life) -> None:
    plain = life.twin.model.state_dict()
    for name, tensor in life.strategy.named_tensors(life.trainable.model):
        is_close = torch.allclose(tensor, plain[name], rtol=_TOLERANCE, atol=_TOLERANCE)
        _require(is_close, f"{name!r} is {tensor.tolist()}, and in a plain loop {plain[name].tolist()}.")


def _twin_state(twin: _Twin) -> tuple[dict[str, Tensor], dict[str, Tensor | None], object, object]:
    gradients = {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in twin.model.named_parameters()
    }
    tensors = {name: tensor.clone() for name, tensor in twin.model.state_dict().items()}
    return tensors, gradients, copy.deepcopy(twin.optimizer.state_dict()), copy.deepcopy(twin.scheduler.state_dict())


def _restore_twin(twin: _Twin, saved: _Saved) -> None:
    tensors, gradients, optimizer, scheduler = copy.deepcopy(saved.twin)
    twin.model.load_state_dict(tensors)
    for name, parameter in twin.model.named_parameters():
        parameter.grad = gradients[name]
    twin.optimizer.load_state_dict(optimizer)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    twin.scheduler.load_state_dict(scheduler)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def _save(life: _Life, step: int) -> None:
    def save() -> object:
        return life.strategy.save_ckpt(life.trainable, life.directory, step=step, client_state={"step": step})

    if step in life.saved:
        _require_refusal(life, save, CheckpointError, f"saving step {step}, which exists,")
        return
    before = _fingerprints(life)
    save()
    _require_unchanged(before, life, "save_ckpt")
    latest, newest = life.strategy.latest_ckpt(life.directory), max(step, *life.saved, step)
    _require(latest == newest, f"latest_ckpt is {latest} after step {step}, and {newest} is the newest.")
    models = {name: value for name, value in before.items() if name.startswith("model.")}
    life.saved[step] = _Saved(
        seen=models, twin=_twin_state(life.twin), position=life.position, is_pending=life.is_pending
    )


def _load(life: _Life, step: int | None) -> None:
    wanted = max(life.saved, default=None) if step is None else step
    if wanted not in life.saved:
        _require_refusal(
            life,
            lambda: life.strategy.load_ckpt(life.trainable, life.directory, step=step),
            CheckpointError,
            f"loading step {step}, of {sorted(life.saved)},",
        )
        return
    loaded = life.strategy.load_ckpt(life.trainable, life.directory, step=step)
    _require((loaded.step, loaded.client_state) == (wanted, {"step": wanted}), f"loading step {wanted} gave {loaded}.")
    saved = life.saved[wanted]
    seen = {name: value for name, value in _fingerprints(life).items() if name.startswith("model.")}
    changed = changed_names(saved.seen, seen)
    _require(not changed, f"load_ckpt must bring back step {wanted}, and {changed} are others.")
    _restore_twin(life.twin, saved)
    life.position, life.is_pending = saved.position, saved.is_pending


def _resume(life: _Life, token: int) -> None:
    """Save inside of a window where there is an inside, end it, load, and end it again."""
    if not life.is_pending:
        _backward(life, token)
    _step(life)
    step = max(life.saved, default=-1) + 1
    _save(life, step)
    _end_window(life, token)
    _load(life, step)
    _end_window(life, token)


def _end_window(life: _Life, token: int) -> None:
    for _ in range(life.position, life.window):
        _backward(life, token)
        _step(life)


def _look(life: _Life) -> None:
    strategy, before = life.strategy, _fingerprints(life)
    latest = strategy.latest_ckpt(life.directory)
    _require(latest == max(life.saved, default=None), f"latest_ckpt is {latest}, and saved are {sorted(life.saved)}.")
    model, optimizer, _ = life.trainable
    model.eval()
    with torch.no_grad():
        losses = [_loss(model, token).item() for token in (0, 1)]
    model.train()
    strategy.offload(model, optimizer)
    strategy.reload(model, optimizer)
    reduced = strategy.all_reduce({"losses": torch.tensor(losses)})
    _require(torch.equal(reduced["losses"], torch.tensor(losses)), f"all_reduce on one rank gave {reduced}.")
    _require(strategy.prepare(life.trainable).model is model, "prepare of what is prepared gave another model.")
    _require_unchanged(before, life, "looking on (evaluation, offload and reload, all_reduce, prepare)")


def _set_up(life: _Life) -> None:
    before = _fingerprints(life)
    world = life.strategy.setup_distributed()
    _require(world == life.world, f"setup_distributed gave {world} after {life.world}.")
    _require_unchanged(before, life, "setup_distributed")


def _average(life: _Life, beta: float) -> None:
    def move() -> None:
        life.strategy.moving_average(life.trainable.model, life.average, beta)

    def move_too_far() -> None:
        life.strategy.moving_average(life.trainable.model, life.average, beta - 1.25)

    _require_refusal(life, move_too_far, ConfigError, f"moving_average with beta={beta - 1.25}")
    before = _fingerprints(life)
    move()
    after = _fingerprints(life)
    still = "model." if beta < 1 else ""
    changed = [name for name in changed_names(before, after) if name.startswith(still)]
    _require(not changed, f"moving_average with beta={beta} changed {changed}.")


def strategy_machine(harness: Harness) -> type[RuleBasedStateMachine]:
    """Return a class of hypothesis whose instances live through one life of the strategy that is held to its laws.

    Args:
        harness: whose strategy it is; one rank, in this process.
    """

    class StrategyMachine(RuleBasedStateMachine):
        """Calls the functions of a strategy in any order."""

        def __init__(self) -> None:
            super().__init__()
            self._stack = ExitStack()

        @initialize(
            seed=st.integers(0, 9),
            tied=st.booleans(),
            window=st.sampled_from([1, 2, 4]),
            was_torn_down=st.booleans(),
        )
        def begin(self, seed: int, tied: bool, window: int, was_torn_down: bool) -> None:
            self._stack.enter_context(torch.random.fork_rng())
            directory = self._stack.enter_context(scratch_directory())
            place = strategies_torn_down(harness.subject, rank=0, world_size=1, directory=directory)
            rank = self._stack.enter_context(place)
            config = attrs.evolve(rank.config, max_norm=0.0, micro_train_batch_size=1, train_batch_size=window)
            case = ModelCase(vocabulary=5, hidden=3, tied=tied, seed=seed)
            strategy = rank.build(config)
            if was_torn_down:  # before anything is prepared, because that is at home in the groups that end
                strategy.setup_distributed()
                strategy.teardown()
                strategy.teardown()
            self._life = _begin(strategy, directory, case, window)

        @rule(token=st.integers(0, 4))
        @precondition(lambda self: not self._life.is_pending)
        def backward(self, token: int) -> None:
            _backward(self._life, token)

        @rule()
        def optimizer_step(self) -> None:
            _step(self._life)

        @rule(token=st.integers(0, 4))
        @precondition(lambda self: not self._life.is_pending)
        def micro_batch(self, token: int) -> None:
            _backward(self._life, token)
            _step(self._life)

        @rule(step=st.integers(0, 3))
        def save(self, step: int) -> None:
            _save(self._life, step)

        @rule(step=st.none() | st.integers(0, 3))
        def load(self, step: int | None) -> None:
            _load(self._life, step)

        @rule(token=st.integers(0, 4))
        def resume(self, token: int) -> None:
            _resume(self._life, token)

        @rule()
        def look(self) -> None:
            _look(self._life)

        @rule()
        def set_up(self) -> None:
            _set_up(self._life)

        @rule(beta=st.sampled_from([0.0, 0.5, 1.0]))
        def moving_average(self, beta: float) -> None:
            _average(self._life, beta)

        def teardown(self) -> None:
            self._stack.close()

    return StrategyMachine


def _lives(harness: Harness) -> None:
    if harness.example is not None:
        raise ConfigError(
            f"example={harness.example[:80]!r} cannot be looked at, because a life is a sequence of calls; "
            "leave it out and give the seed."
        )
    machine = hypothesis.seed(harness.seed)(strategy_machine(harness))
    run_state_machine_as_test(machine, settings=hypothesis.settings(harness.settings, stateful_step_count=_STEPS))


LAWS: tuple[Law, ...] = (
    Law(
        id="life.strategy",
        statement="Legal calls in any order lead where a plain loop leads; illegal ones raise the documented error and "
        "change nothing.",
        check=_lives,
        worlds="one",
    ),
)
"""The law about whole lives."""
