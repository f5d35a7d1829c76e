"""`checked`: right strategies run as before, wrong ones are caught at the call that was wrong."""

from __future__ import annotations

# ruff: noqa: ARG001, ARG005 (what spoils a function stands where the function stood, with its parameters)
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

from lightrft.config import EngineConfig
from lightrft.errors import CheckpointError, EngineStateError, LawError
from lightrft.strategy import (
    EngineHandle,
    Prompt,
    SamplingParams,
    Strategy,
    StrategyConfig,
    Trainable,
    get_strategy,
)
from lightrft.strategy.record import FUNCTIONS
from lightrft.testing.cases.models import ModelCase, SmallModel, build_model
from lightrft.testing.checked import checked
from lightrft.testing.signatures import signature_differences_of_record

CONFIG = StrategyConfig(
    strategy="single",
    micro_train_batch_size=1,
    train_batch_size=2,
    actor_learning_rate=0.125,
    l2=0.5,
    lr_warmup_ratio=0.5,
)
PROMPTS = [Prompt(token_ids=(1, 2)), Prompt(token_ids=(3,))]
SAMPLING = SamplingParams(max_new_tokens=3, stop_token_ids=(3,))


def run(strategy: Strategy, directory: Path) -> list[object]:
    """Return what a small run saw: every function that `checked` looks at is called."""
    strategy.setup_distributed()
    model, average = (build_model(ModelCase(tied=True, frozen=("bias",))) for _ in range(2))
    actor = strategy.prepare_models_and_optimizers(model, None, None, None, max_steps=4)[0]
    seen: list[object] = [train(strategy, actor, number) for number in range(3)]
    strategy.moving_average(actor.model, average, beta=0.75)
    strategy.save_ckpt(actor, directory, client_state={"a": 1})
    seen += [train(strategy, actor, number) for number in range(3)]
    seen += [strategy.load_ckpt(actor, directory).step, train(strategy, actor, 1)]
    with strategy.setup_inference_engine(EngineConfig(type="scripted"), actor=actor.model) as engine:
        seen += rollout(strategy, engine, actor)
    seen += [strategy.all_reduce({"x": torch.tensor([1.5, float("nan")]), "y": 2.0})["y"]]
    seen += [strategy.all_gather({"x": torch.arange(6).reshape(2, 3), "z": torch.tensor(1), "e": torch.zeros(0)})]
    seen += [strategy.broadcast(torch.tensor([True]))]
    seen += [list(strategy.named_tensors(actor.model)), list(strategy.named_tensors(average))]
    seen += [torch.rand(2)]
    strategy.teardown()
    return seen


def train(strategy: Strategy, actor: Trainable, token: int, factor: float = 1.0) -> object:
    loss = actor.model(torch.tensor([[token]])).square().mean() * factor
    strategy.backward(loss, actor.model, actor.optimizer)
    return strategy.optimizer_step(actor.optimizer, actor.model, actor.scheduler)


def rollout(strategy: Strategy, engine: EngineHandle, actor: Trainable) -> list[object]:
    report = strategy.update_engine_weights(engine, actor.model)
    strategy.maybe_sleep_inference_engine(engine)
    strategy.wakeup_inference_engine(engine)
    return [
        report,
        strategy.engine_generate_local(engine, PROMPTS, SAMPLING),
        strategy.gather_and_generate(engine, PROMPTS, SAMPLING),
    ]


def test_a_right_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    """`checked` changes no loss, parameter, completion or random number of a run."""
    plain = run(get_strategy(CONFIG), tmp_path / "plain")
    held = run(checked(get_strategy(CONFIG)), tmp_path / "checked")
    assert repr(plain) == repr(held)
    assert len(plain) > 10


def test_signatures_and_the_rest_of_the_record_stay() -> None:
    """Every function keeps its contract, and what is not checked is the function that was there."""
    strategy = get_strategy(CONFIG)
    held = checked(strategy)
    assert signature_differences_of_record(held) == []
    assert held.capabilities == strategy.capabilities
    assert sum(getattr(held, name) is not getattr(strategy, name) for name in FUNCTIONS) == 15


def spoiled(
    name: str, before: Callable[..., None] | None = None, after: Callable[..., object] | None = None
) -> Strategy:
    """Return "single" with something done before or after one of its functions, held to the laws."""
    strategy = get_strategy(CONFIG)
    inner = getattr(strategy, name)

    def function(*args: object, **kwargs: object) -> object:
        if before is not None:
            before(*args)
        result = inner(*args, **kwargs)
        return result if after is None else after(result, *args)

    return checked(attrs.evolve(strategy, **{name: function}))


@torch.no_grad()
def nudge(model: nn.Module, name: str = "middle.weight") -> None:
    model.get_parameter(name).add_(1.0)


def in_backward(result: object, loss: object, model: SmallModel, optimizer: object) -> object:
    nudge(model)
    return result


def rate_in_backward(result: object, loss: object, model: object, optimizer: torch.optim.Optimizer) -> object:
    optimizer.param_groups[0]["lr"] *= 2
    return result


def after_step(change: Callable[[SmallModel, object], object]) -> Callable[..., object]:
    def spoil(result: object, optimizer: object, model: SmallModel, scheduler: object) -> object:
        return change(model, result) or result

    return spoil


def twice_scheduled(result: object, optimizer: object, model: object, scheduler: object) -> object:
    scheduler.last_epoch += 1
    return result


def untied(model: SmallModel, result: object) -> None:
    with torch.no_grad():
        model.embedding.weight = nn.Parameter(model.embedding.weight + 1)


STEPS = [
    ("backward", in_backward, "backward: ['middle.weight'] changed, and gradients alone may"),
    ("backward", rate_in_backward, "backward: learning rates went from"),
    ("optimizer_step", after_step(lambda model, result: nudge(model)), "changed without a step"),
    ("optimizer_step", twice_scheduled, "the schedule moved by 1 steps and must move by 0"),
    (
        "optimizer_step",
        after_step(lambda model, result: attrs.evolve(result, stepped=True)),
        "says that it stepped, so grad_norm must be finite",
    ),
    (
        "optimizer_step",
        after_step(lambda model, result: attrs.evolve(result, grad_norm=1.0)),
        "must have either a grad_norm and a skipped_reason, or neither",
    ),
]


@pytest.mark.parametrize(("name", "after", "words"), STEPS)
def test_what_a_micro_batch_must_not_do_is_caught(name: str, after: Callable[..., object], words: str) -> None:
    """Inside an accumulation window nothing but gradients moves."""
    strategy = spoiled(name, after=after)
    actor = strategy.prepare_models_and_optimizers(build_model(ModelCase()), None, None, None, max_steps=4)[0]
    with pytest.raises(LawError) as caught:
        train(strategy, actor, 1)
    assert words in str(caught.value)


WHOLE_STEPS = [
    (after_step(lambda model, result: nudge(model, "middle.bias") if result.stepped else None), "frozen and changed"),
    (
        after_step(lambda model, result: untied(model, result) if result.stepped else None),
        "are tied and differ after the step",
    ),
]


@pytest.mark.parametrize(("after", "words"), WHOLE_STEPS)
def test_what_a_step_must_not_do_is_caught(after: Callable[..., object], words: str) -> None:
    """A step leaves frozen parameters alone and keeps tied ones tied."""
    strategy = spoiled("optimizer_step", after=after)
    model = build_model(ModelCase(tied=True, frozen=("bias",)))
    actor = strategy.prepare_models_and_optimizers(model, None, None, None, max_steps=4)[0]
    train(strategy, actor, 0)
    with pytest.raises(LawError) as caught:
        train(strategy, actor, 1)
    assert words in str(caught.value)


def test_a_nonfinite_gradient_is_no_broken_law() -> None:
    """A window that is skipped for its gradient passes, with the reason in the result."""
    strategy = checked(get_strategy(CONFIG))
    actor = strategy.prepare_models_and_optimizers(build_model(ModelCase()), None, None, None)[0]
    train(strategy, actor, 1)
    assert "not finite" in str(train(strategy, actor, 1, factor=float("nan")))


def test_an_optimizer_of_frozen_or_forgotten_parameters_is_caught() -> None:
    """An optimizer holds each parameter that asks for a gradient once, and no other."""
    inner = get_strategy(CONFIG).create_optimizer

    def all_of_them(result: object, model: SmallModel) -> object:
        result.add_param_group({"params": [model.middle.bias]})
        return result

    strategy = spoiled("create_optimizer", after=all_of_them)
    with pytest.raises(LawError, match=r"'middle.bias' 1 times and must hold it 0 times"):
        strategy.create_optimizer(build_model(ModelCase(frozen=("bias",))))
    assert inner(build_model(ModelCase()))


def test_an_average_with_beta_swapped_is_caught() -> None:
    """The average moves by 1 - beta towards the model."""
    strategy = get_strategy(CONFIG)

    def moving_average(model: nn.Module, model_ema: nn.Module, beta: float = 0.992) -> None:
        strategy.moving_average(model, model_ema, 1 - beta)

    held = checked(attrs.evolve(strategy, moving_average=moving_average))
    with pytest.raises(LawError, match=r"is not beta \* average \+ \(1 - beta\) \* model with beta=0.75"):
        held.moving_average(build_model(ModelCase(seed=1)), build_model(ModelCase()), beta=0.75)


COLLECTIVES = [
    ("all_reduce", lambda result, data, *_: data.add_(1) is None or result, "was changed in place"),
    ("all_reduce", lambda result, data, *_: data, "shares memory with the input"),
    ("all_reduce", lambda result, data, *_: result.double(), "dtypes, shapes and devices are"),
    ("all_gather", lambda result, data, *_: result.flip(0), "does not stand in the result"),
    ("all_gather", lambda result, data, *_: result.double(), "does not stand in the result"),
    ("broadcast", lambda result, data, *_: result + 1, "is not what rank 0, this one, sent"),
]


@pytest.mark.parametrize(("name", "after", "words"), COLLECTIVES)
def test_a_wrong_collective_is_caught(name: str, after: Callable[..., object], words: str) -> None:
    """Collectives leave inputs alone and keep what they must keep."""
    strategy = spoiled(name, after=after)
    with pytest.raises(LawError) as caught:
        getattr(strategy, name)(torch.tensor([1.0, 2.0]))
    assert words in str(caught.value)


def test_a_save_that_changes_something_is_caught(tmp_path: Path) -> None:
    """Saving draws no random number and moves no parameter."""
    strategy = spoiled("save_ckpt", after=lambda result, *_: torch.rand(1) is None or result)
    with pytest.raises(LawError, match=r"\['random stream'\] changed by saving"):
        strategy.save_ckpt(build_model(ModelCase()), tmp_path)


def test_a_refused_load_that_changed_something_is_caught(tmp_path: Path) -> None:
    """A load either restores all or changes nothing, and errors of right strategies pass through."""
    with pytest.raises(CheckpointError):
        checked(get_strategy(CONFIG)).load_ckpt(build_model(ModelCase()), tmp_path)
    strategy = spoiled("load_ckpt", before=lambda model, _: nudge(model))
    with pytest.raises(LawError, match=r"was refused .* changed all the same"):
        strategy.load_ckpt(build_model(ModelCase()), tmp_path)


def test_a_load_of_another_step_is_caught(tmp_path: Path) -> None:
    """Loading takes the newest checkpoint, or the one that was asked for."""
    strategy = spoiled("load_ckpt", after=lambda result, *_: attrs.evolve(result, step=7))
    model = build_model(ModelCase())
    strategy.save_ckpt(model, tmp_path, step=3)
    with pytest.raises(LawError, match="loaded step 7 and must load 3"):
        strategy.load_ckpt(model, tmp_path)


def engine_of(strategy: Strategy, model: SmallModel) -> EngineHandle:
    return strategy.setup_inference_engine(EngineConfig(type="scripted"), actor=model)


def test_wrong_completions_are_caught() -> None:
    """Completions in the wrong order do not pass."""
    strategy = spoiled("gather_and_generate", after=lambda result, *_: result[::-1])
    with engine_of(strategy, build_model(ModelCase())) as engine, pytest.raises(LawError, match="is of the prompt"):
        strategy.gather_and_generate(engine, PROMPTS, SAMPLING)


def test_a_refusal_to_generate_passes() -> None:
    """The error of an engine asleep is the engine's own."""
    strategy = checked(get_strategy(attrs.evolve(CONFIG, enable_engine_sleep=True)))
    with engine_of(strategy, build_model(ModelCase())) as engine:
        strategy.maybe_sleep_inference_engine(engine)
        with pytest.raises(EngineStateError):
            strategy.gather_and_generate(engine, PROMPTS, SAMPLING)


def test_a_sync_that_pretends_is_caught() -> None:
    """A sync that raised no version, and a failed one that leaves the engine awake, do not pass."""
    model = build_model(ModelCase())
    lazy = spoiled(
        "update_engine_weights", after=lambda result, engine, _: setattr(engine, "weight_version", 0) or result
    )
    with engine_of(lazy, model) as engine, pytest.raises(LawError, match="status, version and reported version"):
        lazy.update_engine_weights(engine, model)

    def fail(engine: EngineHandle, actor: nn.Module) -> None:
        raise RuntimeError("lost")

    broken = spoiled("update_engine_weights", before=fail)
    with engine_of(broken, model) as engine, pytest.raises(LawError, match="left the engine 'awake'"):
        broken.update_engine_weights(engine, model)
