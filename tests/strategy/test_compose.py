"""Transforms of strategies, on the real strategy."""

from __future__ import annotations

import copy
import inspect
import math
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightrft.config.root import Config
from lightrft.errors import ConfigError, StepError, UnsupportedError
from lightrft.strategy import Call, Strategy, StrategyConfig, get_fake_strategy, get_strategy
from lightrft.strategy.calls import call_of, describe
from lightrft.strategy.compose import (
    FaultPlan,
    Timing,
    compose,
    identity,
    with_ema,
    with_faults,
    with_finite_check,
    with_logging,
    with_recording,
    with_timing,
)
from lightrft.strategy.record import FUNCTIONS
from lightrft.testing.signatures import signature_differences_of_record


def single(**changes: object) -> Strategy:
    return get_strategy(StrategyConfig(**{"strategy": "single", **changes}))


def logged(strategy: Strategy) -> Strategy:
    return with_logging(strategy, [].append)


def timed(strategy: Strategy) -> Strategy:
    return with_timing(strategy, {})


def recorded(strategy: Strategy) -> Strategy:
    return with_recording(strategy, [])


def faulty(strategy: Strategy) -> Strategy:
    return with_faults(strategy, {name: FaultPlan(at=10**9, error=RuntimeError()) for name in FUNCTIONS})


def averaged(strategy: Strategy) -> Strategy:
    model = nn.Linear(3, 1)
    return with_ema(strategy, model, copy.deepcopy(model), 0.9)


TRANSFORMS = {
    "identity": identity,
    "logged": logged,
    "timed": timed,
    "recorded": recorded,
    "faulty": faulty,
    "finite_check": with_finite_check,
    "averaged": averaged,
}


def train(strategy: Strategy, steps: int = 4) -> tuple[list[object], dict[str, torch.Tensor]]:
    """Train with every argument passed by its name; return what the steps returned and the parameters."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = strategy.create_optimizer(model=model, lr=0.1)
    results = []
    for _ in range(steps):
        loss = (model(torch.ones(2, 3)) - 1).square().mean()
        strategy.backward(loss=loss, model=model, optimizer=optimizer, weight=0.5)
        results.append(strategy.optimizer_step(optimizer=optimizer, model=model, scheduler=None, is_boundary=None))
    return results, model.state_dict()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_wrapped_functions_keep_their_signatures(name: str) -> None:
    """Every field of a transformed strategy has the signature of the field it wraps, and so that of its contract."""
    plain = single()
    strategy = TRANSFORMS[name](plain)
    assert signature_differences_of_record(strategy) == []
    for field in FUNCTIONS:
        assert inspect.signature(getattr(strategy, field)) == inspect.signature(getattr(plain, field))
        assert getattr(strategy, field).__name__ == getattr(plain, field).__name__


@settings(deadline=None, max_examples=15)
@given(st.lists(st.sampled_from(sorted(TRANSFORMS)), max_size=4))
def test_transforms_change_no_result(names: list[str]) -> None:
    """Training under any composition of transforms has the bits of training without them."""
    results, parameters = train(single(train_batch_size=2))
    found, trained = train(compose(*(TRANSFORMS[name] for name in names))(single(train_batch_size=2)))
    assert found == results
    assert all(torch.equal(trained[name], value) for name, value in parameters.items())


def test_the_identity_is_the_identity() -> None:
    """The identity and the composition of nothing return the strategy itself; transforms leave the old record alone."""
    strategy = single()
    assert identity(strategy) is strategy
    assert compose()(strategy) is strategy
    assert compose(identity, identity)(strategy) is strategy
    before = attrs.asdict(strategy, recurse=False)
    logged(strategy)
    assert attrs.asdict(strategy, recurse=False) == before


def test_compose_applies_the_first_transform_first() -> None:
    """The last transform is outermost: what it sees first, it lets through or not."""
    calls: list[Call] = []

    def inner(strategy: Strategy) -> Strategy:
        return with_recording(strategy, calls)

    def outer(strategy: Strategy) -> Strategy:
        return with_faults(strategy, {"barrier": FaultPlan(at=1, error=OSError("cable"))})

    with pytest.raises(OSError, match="cable"):
        compose(inner, outer)(single()).barrier()
    assert calls == []
    with pytest.raises(OSError, match="cable"):
        compose(outer, inner)(single()).barrier()
    assert calls == [Call("barrier", {})]


@pytest.mark.parametrize("bad", [False, True])
def test_transforms_of_different_fields_commute(bad: bool) -> None:
    """Finite check (backward) and average (optimizer_step) give the same bits and errors in both orders."""

    def run(first: object, second: object) -> tuple[list[torch.Tensor], bool]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        average = copy.deepcopy(model)

        def ema(strategy: Strategy) -> Strategy:
            return with_ema(strategy, model, average, 0.5)

        chosen = {"ema": ema, "check": with_finite_check}
        strategy = compose(chosen[first], chosen[second])(single())
        optimizer = strategy.create_optimizer(model, lr=0.1)
        raised = False
        for step in range(3):
            loss = model(torch.ones(1, 3)).sum() * (math.nan if bad and step == 2 else 1.0)
            try:
                strategy.backward(loss, model, optimizer)
                strategy.optimizer_step(optimizer, model, None)
            except StepError:
                raised = True
        return [*model.parameters(), *average.parameters()], raised

    found, expected = run("ema", "check"), run("check", "ema")
    assert found[1] == expected[1] == bad
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))


def test_the_finite_check_names_the_loss() -> None:
    """A loss of NaN or infinity raises in backward, before it reaches the gradient; others are handed on."""
    strategy = with_finite_check(single())
    model = nn.Linear(1, 1)
    optimizer = strategy.create_optimizer(model)
    for bad in (math.nan, math.inf):
        with pytest.raises(StepError, match=f"loss=-?{bad}"):
            strategy.backward(model.weight.sum() * bad, model, optimizer)
    assert model.weight.grad is None
    with pytest.raises(StepError, match="0-d"):
        strategy.backward(model.weight, model, optimizer)
    strategy.backward(model.weight.sum(), model, optimizer)
    assert model.weight.grad is not None


def test_the_average_moves_after_real_steps_of_its_model() -> None:
    """It moves once a window, not inside it, not after a skipped step, and not when another model steps."""
    torch.manual_seed(0)
    plain = single(train_batch_size=2)
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    average = copy.deepcopy(model)
    strategy = with_ema(plain, model, average, 0.5)
    optimizer, other_optimizer = (plain.create_optimizer(each, lr=0.1) for each in (model, other))
    expected = copy.deepcopy(model)
    for step in range(8):
        skip = step == 5
        for each, its in ((model, optimizer), (other, other_optimizer)):
            strategy.backward(each(torch.ones(1, 2)).sum() * (math.nan if skip else 1.0), each, its)
            stepped = strategy.optimizer_step(its, each, None).stepped
            assert stepped == (step % 2 == 1 and not skip)
            if each is model and stepped:
                plain.moving_average(model, expected, 0.5)
        assert torch.equal(average.weight, expected.weight)
    assert not torch.equal(average.weight, model.weight)


def test_faults_come_at_the_planned_call_alone() -> None:
    """The k-th call raises before it does anything, the others work, and the caller's plan counts them."""
    plan = FaultPlan(at=2, error=TimeoutError("rank 1 is gone"))
    strategy = with_faults(single(), {"all_reduce": plan})
    assert strategy.all_reduce(1.0) == 1.0
    with pytest.raises(TimeoutError, match="rank 1 is gone"):
        strategy.all_reduce(1.0)
    assert strategy.all_reduce(1.0) == 1.0
    assert plan.num_calls == 3
    with pytest.raises(ConfigError, match=r"plans='all_redce' is no function.*did you mean 'all_reduce'"):
        with_faults(single(), {"all_redce": plan})


def test_timings_add_up_calls() -> None:
    """Calls are counted and their time added, also when they raise; what was not called is missing."""
    timings: dict[str, Timing] = {}
    strategy = with_timing(single(), timings)
    for _ in range(3):
        strategy.get_rank()
    with pytest.raises(ConfigError):
        strategy.broadcast(1, src=1)
    assert {name: timing.num_calls for name, timing in timings.items()} == {"get_rank": 3, "broadcast": 1}
    assert all(timing.seconds > 0 for timing in timings.values())


def test_logs_name_the_call_before_it_is_made() -> None:
    """Each call is one line with all arguments, written even if the call raises."""
    lines: list[str] = []
    strategy = with_logging(single(), lines.append)
    strategy.all_reduce({"loss": torch.zeros(2, 3)}, op="sum")
    with pytest.raises(ConfigError):
        strategy.broadcast(torch.zeros(()), 3)
    assert lines == ["all_reduce(data={'loss': 'float32[2, 3]'}, op=sum)", "broadcast(data=float32[], src=3)"]


def test_a_logged_call_shows_no_secret() -> None:
    """A value under the name of a secret is hidden at every depth of the arguments, and the rest is shown."""
    lines: list[str] = []
    strategy = with_logging(single(), lines.append)
    args = {"actor_learning_rate": 0.5, "api_key": "abc123", "nested": {"hf_token": "abc123"}}
    strategy.prepare_models_and_optimizers(nn.Linear(1, 1), None, None, None, args)
    assert "abc123" not in lines[0]
    assert "'actor_learning_rate': 0.5, 'api_key': '***', 'nested': {'hf_token': '***'}" in lines[0]


def test_calls_are_described_without_references() -> None:
    """Plain values stay, tensors become dtype and shape, containers are described inside, others by their type."""
    assert describe([1, 2.5, None, True, "text", Path("a")]) == (1, 2.5, None, True, "text", Path("a"))
    assert describe({"x": torch.zeros(2, dtype=torch.int64)}) == {"x": "int64[2]"}
    assert describe({"a"}) == ("a",)
    assert describe(nn.Linear(1, 1)) == "Linear"
    assert describe(EmptyShape()) == "EmptyShape"
    call = call_of("f", takes_all_kinds, (1, 3), {"c": torch.zeros(())})
    assert call == Call("f", {"a": 1, "rest": (3,), "b": 2, "more": {"c": "float32[]"}})
    assert str(call) == "f(a=1, rest=(3,), b=2, more={'c': 'float32[]'})"


def takes_all_kinds(a: object, *rest: object, b: int = 2, **more: object) -> tuple[object, ...]:
    return a, rest, b, more


class EmptyShape:
    """Looks like an array in one respect."""

    shape = ()


def test_the_fake_strategy_records_what_is_asked_of_it(tmp_path: Path) -> None:
    """A whole loop runs through the fake: it trains and checkpoints, and every call is in the caller's list."""
    calls: list[Call] = []
    strategy = get_fake_strategy(calls=calls)
    strategy.setup_distributed()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model, optimizer, scheduler = strategy.prepare((plain, strategy.create_optimizer(plain, lr=0.1), None))
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(torch.arange(5)), torch.arange(5))
        losses.append(loss.item())
        strategy.backward(loss, model, optimizer)
        strategy.optimizer_step(optimizer, model, scheduler)
    assert losses[-1] < losses[0]
    strategy.save_ckpt(model, tmp_path, step=5)
    assert strategy.latest_ckpt(tmp_path) == 5
    strategy.teardown()
    assert [call.name for call in calls] == [
        "setup_distributed",
        "create_optimizer",
        "prepare",
        *["backward", "optimizer_step"] * 5,
        "save_ckpt",
        "latest_ckpt",
        "teardown",
    ]
    assert calls[3] == Call(
        "backward",
        {"loss": "float32[]", "model": "Sequential", "optimizer": "AdamW", "weight": None, "is_boundary": None},
    )
    assert calls[1].arguments["lr"] == 0.1


def test_the_fake_strategy_generates() -> None:
    """Without a config its engine is "scripted"; completions come from it, with the log-probabilities of the model."""
    from lightrft.strategy import Prompt, SamplingParams

    strategy = get_fake_strategy()
    torch.manual_seed(0)
    actor = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    with strategy.setup_inference_engine(actor=actor) as engine:
        (completion,) = strategy.gather_and_generate(
            engine, [Prompt(token_ids=(1, 2))], SamplingParams(max_new_tokens=3)
        )
        assert completion.token_ids == (1, 2, 1)
        logprobs = torch.log_softmax(actor(torch.tensor([2, 1, 2])), dim=-1)[torch.arange(3), torch.tensor([1, 2, 1])]
        assert completion.logprobs == pytest.approx(logprobs.tolist(), abs=1e-6)


def test_recorded_calls_keep_no_tensor_alive() -> None:
    """After the caller lets go of a tensor and a model they are freed, although the calls are still in the list."""
    calls: list[Call] = []
    strategy = get_fake_strategy(calls=calls)
    model = nn.Linear(2, 2)
    data = {"big": torch.zeros(1000)}
    strategy.all_reduce(data)
    strategy.prepare(model)
    alive = weakref.ref(data["big"]), weakref.ref(model)
    del data, model
    assert [reference() for reference in alive] == [None, None]
    assert len(calls) == 2


def test_the_fake_strategy_takes_the_settings_it_is_given() -> None:
    """A config's own settings hold, engine and all; whatever strategy it names, the fake one is built."""
    strategy = get_fake_strategy(StrategyConfig(strategy="deepspeed", train_batch_size=2, engine_type="nobody"))
    results, _ = train(strategy)
    assert [result.stepped for result in results] == [False, True, False, True]
    with pytest.raises(ConfigError, match="engine_type='nobody'"):
        strategy.setup_inference_engine(actor=nn.Linear(1, 1))
    results, _ = train(get_fake_strategy({"train_batch_size": 4}))
    assert [result.stepped for result in results] == [False, False, False, True]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", [dict, types.SimpleNamespace])
def test_the_fake_strategy_s_engine_is_scripted_unless_named(kind: Callable[..., object], named: bool) -> None:
    """A mapping or namespace without an engine gets "scripted"; one that names an engine gets that."""
    strategy = get_fake_strategy(kind(**({"engine_type": "hf"} if named else {})))
    if named:
        with pytest.raises(UnsupportedError, match="engine 'hf' needs"):  # it takes transformers models alone
            strategy.setup_inference_engine(actor=nn.Linear(1, 1))
        return
    with strategy.setup_inference_engine(actor=nn.Linear(1, 1)) as engine:
        assert engine.status == "awake"


def test_the_fake_strategy_takes_the_config_of_a_whole_run() -> None:
    """Of a run's config the section of the strategy is taken, with its engine."""
    config = Config(strategy=StrategyConfig(train_batch_size=2, engine_type="scripted"))
    results, _ = train(get_fake_strategy(config))
    assert [result.stepped for result in results] == [False, True, False, True]
