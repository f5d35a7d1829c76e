"""Backward and optimizer step under "single", held against a loop written in raw PyTorch.

B batch, H features
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightrft.backends.training.clipping import clip_gradients, not_finite_reason
from lightrft.backends.training.record import TrainingFunctions
from lightrft.backends.training.schedule import build_schedule
from lightrft.backends.training.single import build_training
from lightrft.backends.training.step import build_backward
from lightrft.backends.training.window import MICRO_BATCHES, PENDING, PROMISE, open_window
from lightrft.errors import StepError
from lightrft.strategy.config import StrategyConfig

LAWS = settings(deadline=None, max_examples=25)


def training(**changes: object) -> TrainingFunctions:
    return build_training(StrategyConfig(**{"strategy": "single", **changes}))


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def samples(count: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator, dtype=dtype), torch.randn(
        count, 1, generator=generator, dtype=dtype
    )


def mean_loss(model: nn.Module, inputs_BH: torch.Tensor, targets_B1: torch.Tensor) -> torch.Tensor:
    return (model(inputs_BH) - targets_B1).square().mean()


def raw_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, max_norm: float) -> torch.Tensor:
    """One step as one would write it without a strategy; returns the norm before clipping."""
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def raw_adamw(model: nn.Module, lr: float = 0.01) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every bit that training may change: parameters, optimizer state, learning rates."""
    bits = {f"parameter {name}": value.clone() for name, value in model.state_dict().items()}
    for number, state in enumerate(optimizer.state.values()):
        bits |= {f"state {number} {key}": torch.as_tensor(value).clone() for key, value in state.items()}
    rates = [group["lr"] for group in optimizer.param_groups]
    return bits | {"rates": torch.tensor(rates, dtype=torch.float64)}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different


def assert_close(model: nn.Module, expected: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, parameter), reference in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            parameter,
            reference,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("max_norm", [0.0, 0.05, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_the_raw_loop_bit_for_bit(dtype: torch.dtype, max_norm: float) -> None:
    """Ten steps with clipping off, on and out of reach give the bits of the raw loop, with its norms."""
    model, reference = network(dtype=dtype), network(dtype=dtype)
    strategy = training(max_norm=max_norm)
    optimizer, raw_optimizer = strategy.create_optimizer(model, lr=0.01), raw_adamw(reference)
    batch = samples(8, dtype=dtype)
    for _ in range(10):
        strategy.backward(mean_loss(model, *batch), model, optimizer)
        result = strategy.optimizer_step(optimizer, model, None)
        norm = raw_step(reference, raw_optimizer, mean_loss(reference, *batch), max_norm)
        assert result.stepped
        assert result.skipped_reason is None
        assert result.grad_norm == norm.item()
        assert result.learning_rate == 0.01
    assert_same_bits(snapshot(model, optimizer), snapshot(reference, raw_optimizer))


@LAWS
@given(micro=st.integers(1, 4), steps=st.integers(1, 4), max_norm=st.sampled_from([0.0, 0.1]))
def test_equal_micro_batches_give_the_step_of_the_whole_batch(micro: int, steps: int, max_norm: float) -> None:
    """K micro-batches of one size and one batch of all their samples give the same step."""
    model, reference = network(), network()
    strategy = training(micro_train_batch_size=micro, train_batch_size=micro * steps, max_norm=max_norm)
    optimizer, raw_optimizer = strategy.create_optimizer(model, lr=0.01), raw_adamw(reference)
    for window in range(2):
        inputs_BH, targets_B1 = samples(micro * steps, seed=window)
        for part in range(steps):
            chosen = slice(part * micro, (part + 1) * micro)
            strategy.backward(mean_loss(model, inputs_BH[chosen], targets_B1[chosen]), model, optimizer)
            result = strategy.optimizer_step(optimizer, model, None)
            assert result.stepped == (part == steps - 1)
        norm = raw_step(reference, raw_optimizer, mean_loss(reference, inputs_BH, targets_B1), max_norm)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-9)
    assert_close(model, reference)


@LAWS
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_weighted_steps_do_not_depend_on_the_partition(sizes: list[int], seed: int) -> None:
    """With weights that are shares of the whole, any partition of the samples gives the step of one batch."""
    model, reference = network(), network()
    strategy = training(max_norm=0.1)
    optimizer, raw_optimizer = strategy.create_optimizer(model, lr=0.01), raw_adamw(reference)
    inputs_BH, targets_B1 = samples(sum(sizes), seed=seed)
    parts = zip(inputs_BH.split(sizes), targets_B1.split(sizes), strict=True)
    for number, (part_BH, part_B1) in enumerate(parts, start=1):
        loss = mean_loss(model, part_BH, part_B1)
        strategy.backward(loss, model, optimizer, weight=len(part_BH) / sum(sizes))
        result = strategy.optimizer_step(optimizer, model, None, is_boundary=number == len(sizes))
    assert result.stepped
    raw_step(reference, raw_optimizer, mean_loss(reference, inputs_BH, targets_B1), 0.1)
    assert_close(model, reference)


@LAWS
@given(steps=st.integers(2, 5), windows=st.integers(1, 3))
def test_nothing_changes_inside_a_window(steps: int, windows: int) -> None:
    """Before the window is complete no parameter, state or rate changes by a bit; then each steps exactly once."""
    model = network()
    strategy = training(train_batch_size=steps)
    optimizer = strategy.create_optimizer(model, lr=0.01)
    scheduler = build_schedule(optimizer, "linear", num_steps=10)
    for window in range(windows):
        before = snapshot(model, optimizer)
        for part in range(1, steps + 1):
            strategy.backward(mean_loss(model, *samples(2, seed=part)), model, optimizer)
            result = strategy.optimizer_step(optimizer, model, scheduler)
            if part < steps:
                assert_same_bits(snapshot(model, optimizer), before)
                assert (result.stepped, result.grad_norm, result.skipped_reason) == (False, None, None)
                assert result.learning_rate == before["rates"][0].item()
        assert result.stepped
        assert scheduler.last_epoch == window + 1
        assert {int(state["step"]) for state in optimizer.state.values()} == {window + 1}
        assert result.learning_rate == before["rates"][0].item()
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_position_travels_with_the_optimizer_s_state() -> None:
    """A window that is interrupted, saved with `state_dict` and loaded elsewhere goes on where it was."""
    strategy = training(train_batch_size=3)
    model, resumed = network(), network()
    optimizer, other = (strategy.create_optimizer(each, lr=0.01) for each in (model, resumed))
    for part in range(2):
        strategy.backward(mean_loss(model, *samples(2, seed=part)), model, optimizer)
        assert not strategy.optimizer_step(optimizer, model, None).stepped
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for source, target in zip(model.parameters(), resumed.parameters(), strict=True):
        target.grad = source.grad.clone()
    for each, its_optimizer in ((model, optimizer), (resumed, other)):
        strategy.backward(mean_loss(each, *samples(2, seed=2)), each, its_optimizer)
        assert strategy.optimizer_step(its_optimizer, each, None).stepped
    assert_same_bits(snapshot(resumed, other), snapshot(model, optimizer))


@LAWS
@given(max_norm=st.floats(1e-4, 10), scale=st.floats(1e-6, 1e25))
def test_clipping_bounds_one_norm_over_all_parameters(max_norm: float, scale: float) -> None:
    """After clipping, the norm over all parameters together is at most max_norm, in the gradient's direction."""
    model = network()
    strategy = training(max_norm=max_norm)
    optimizer = torch.optim.SGD([{"params": layer.parameters()} for layer in (model[0], model[1:])], lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = mean_loss(model, *samples(4)) * scale
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    strategy.backward(loss, model, optimizer)
    result = strategy.optimizer_step(optimizer, model, None)
    moved = [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    assert result.grad_norm == pytest.approx(norm, rel=1e-9)
    assert math.sqrt(sum(step.square().sum().item() for step in moved)) <= max_norm * (1 + 1e-9)
    share = min(1.0, max_norm / (norm + 1e-6))  # 1e-6 is torch's guard against a norm of zero
    for step, gradient in zip(moved, gradients, strict=True):
        torch.testing.assert_close(step, gradient * share, rtol=1e-9, atol=1e-12)


def test_a_norm_that_overflows_single_precision_is_still_clipped() -> None:
    """Finite gradients whose sum of squares overflows float32 are a large gradient, not one that is not finite."""
    parameter = nn.Parameter(torch.zeros(2))
    model = nn.ParameterList([parameter])
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    strategy = training(max_norm=1.0)
    strategy.backward((parameter * torch.tensor([3e25, 4e25])).sum(), model, optimizer)
    result = strategy.optimizer_step(optimizer, model, None)
    assert result.stepped
    assert result.grad_norm == pytest.approx(5e25)
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.6, -0.8]))


def test_norms_of_half_precision_gradients_are_taken_in_single_precision() -> None:
    """Bfloat16 gradients are measured in float32, where a bfloat16 norm would lose its last digits."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = model(torch.randn(8, 64, dtype=torch.bfloat16)).float().square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    strategy = training(max_norm=0.0)
    strategy.backward(loss, model, optimizer)
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    assert strategy.optimizer_step(optimizer, model, None).grad_norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", [0, 1])
def test_a_gradient_that_is_not_finite_skips_the_step(bad: float, part: int) -> None:
    """Parameters, state, rate and schedule stay as they are, the gradient is cleared, the window ends and says why."""
    model = network()
    strategy = training(train_batch_size=2)
    optimizer = strategy.create_optimizer(model, lr=0.01)
    scheduler = build_schedule(optimizer, "linear", num_steps=10)
    for _ in range(2):
        strategy.backward(mean_loss(model, *samples(2)), model, optimizer)
        strategy.optimizer_step(optimizer, model, scheduler)
    before = snapshot(model, optimizer)
    for number in range(2):
        loss = mean_loss(model, *samples(2)) * (bad if number == part else 1.0)
        strategy.backward(loss, model, optimizer)
        result = strategy.optimizer_step(optimizer, model, scheduler)
    assert not result.stepped
    assert not math.isfinite(result.grad_norm)
    assert "'0.weight'" in result.skipped_reason
    assert "skipped" in result.skipped_reason
    assert_same_bits(snapshot(model, optimizer), before)
    assert scheduler.last_epoch == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    for number in range(2):
        strategy.backward(mean_loss(model, *samples(2)), model, optimizer)
        assert strategy.optimizer_step(optimizer, model, scheduler).stepped == bool(number)


def test_a_skip_is_reported_when_the_model_does_not_name_the_parameter() -> None:
    """An optimizer over parameters that the model does not have still skips, and says so without a name."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    strategy = training()
    strategy.backward((parameter * math.nan).sum(), nn.Linear(1, 1), optimizer)
    result = strategy.optimizer_step(optimizer, nn.Linear(1, 1), None)
    assert result.skipped_reason == "grad_norm=nan is not finite; the step was skipped."


@LAWS
@given(order=st.permutations(["actor"] * 4 + ["critic"] * 4))
def test_two_optimizers_do_not_influence_one_another(order: list[str]) -> None:
    """Actor and critic, interleaved in any order, end with the bits that each has alone."""
    strategy = training(train_batch_size=2)

    def run(names: list[str]) -> dict[str, dict[str, torch.Tensor]]:
        models = {"actor": network(0), "critic": network(5)}
        optimizers = {name: strategy.create_optimizer(model, lr=0.01) for name, model in models.items()}
        for name in names:
            strategy.backward(mean_loss(models[name], *samples(2)), models[name], optimizers[name])
            strategy.optimizer_step(optimizers[name], models[name], None)
        return {name: snapshot(models[name], optimizers[name]) for name in models}

    mixed, apart = run(order), run(sorted(order))
    for name in ("actor", "critic"):
        assert_same_bits(mixed[name], apart[name])


def test_all_backwards_may_come_before_all_steps() -> None:
    """Both backwards before both steps, in the other order, change nothing."""
    strategy = training()
    models = [network(0), network(5)]
    optimizers = [strategy.create_optimizer(model, lr=0.01) for model in models]
    references = [network(0), network(5)]
    raw = [raw_adamw(reference) for reference in references]
    for model, optimizer in zip(models, optimizers, strict=True):
        strategy.backward(mean_loss(model, *samples(2)), model, optimizer)
    for model, optimizer in reversed(list(zip(models, optimizers, strict=True))):
        assert strategy.optimizer_step(optimizer, model, None).stepped
    for reference, optimizer in zip(references, raw, strict=True):
        raw_step(reference, optimizer, mean_loss(reference, *samples(2)), 1.0)
    for model, optimizer, reference, raw_optimizer in zip(models, optimizers, references, raw, strict=True):
        assert_same_bits(snapshot(model, optimizer), snapshot(reference, raw_optimizer))


def test_two_losses_of_one_micro_batch_add_up() -> None:
    """Two backwards before one step are one micro-batch, whose gradient is that of the sum."""
    model, reference = network(), network()
    strategy = training(train_batch_size=2)
    optimizer, raw_optimizer = strategy.create_optimizer(model, lr=0.01), raw_adamw(reference)
    for seed in (0, 1):
        for part in samples(2, seed=seed)[0].split(1):
            strategy.backward(model(part).square().mean(), model, optimizer)
        result = strategy.optimizer_step(optimizer, model, None)
    assert result.stepped
    loss = sum(reference(part).square().mean() / 2 for seed in (0, 1) for part in samples(2, seed=seed)[0].split(1))
    raw_step(reference, raw_optimizer, loss, 1.0)
    assert_close(model, reference)


def test_two_strategies_of_equal_configs_can_be_swapped_between_any_two_calls() -> None:
    """A run that changes its strategy before every call has the bits of a run with one."""

    def run(strategies: list[object]) -> dict[str, torch.Tensor]:
        model = network()
        optimizer = strategies[0].create_optimizer(model, lr=0.01)
        for part in range(6):
            strategies[part % 2].backward(mean_loss(model, *samples(2, seed=part)), model, optimizer)
            strategies[(part + 1) % 2].optimizer_step(optimizer, model, None)
        return snapshot(model, optimizer)

    one = training(train_batch_size=3)
    assert_same_bits(run([one, training(train_batch_size=3)]), run([one, one]))


def test_a_step_without_a_backward_is_refused() -> None:
    """Optimizer_step needs a backward since the last one, also for an optimizer that is the user's own."""
    model = network()
    strategy = training(train_batch_size=2)
    for optimizer in (strategy.create_optimizer(model), torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(StepError, match="call backward"):
            strategy.optimizer_step(optimizer, model, None)
        strategy.backward(mean_loss(model, *samples(1)), model, optimizer)
        strategy.optimizer_step(optimizer, model, None)
        with pytest.raises(StepError, match="call backward"):
            strategy.optimizer_step(optimizer, model, None)


def test_a_loss_without_a_gradient_is_refused() -> None:
    """A loss that is not 0-d or asks for no gradient is refused, and so is a weight that is not finite."""
    model = network()
    strategy = training()
    optimizer = strategy.create_optimizer(model)
    with pytest.raises(StepError, match=r"loss has shape \(2, 1\)"):
        strategy.backward(model(samples(2)[0]), model, optimizer)
    with pytest.raises(StepError, match="no_grad"):
        strategy.backward(mean_loss(model, *samples(2)).detach(), model, optimizer)
    with pytest.raises(StepError, match="weight=nan"):
        strategy.backward(mean_loss(model, *samples(2)), model, optimizer, weight=math.nan)


def test_a_step_with_somebody_else_s_optimizer_is_refused() -> None:
    """If the loss depends on no parameter of the optimizer, the step raises instead of doing nothing."""
    model, other = network(0), network(5)
    strategy = training()
    optimizer = strategy.create_optimizer(other)
    strategy.backward(mean_loss(model, *samples(2)), model, optimizer)
    with pytest.raises(StepError, match="pass the model's own"):
        strategy.optimizer_step(optimizer, model, None)


def test_same_seed_same_bits() -> None:
    """Two runs from one seed end with the same bits."""

    def run() -> dict[str, torch.Tensor]:
        model, strategy = network(), training(max_norm=0.1)
        optimizer = strategy.create_optimizer(model, lr=0.01, weight_decay=0.1)
        for part in range(4):
            strategy.backward(mean_loss(model, *samples(3, seed=part)), model, optimizer)
            strategy.optimizer_step(optimizer, model, None)
        return snapshot(model, optimizer)

    assert_same_bits(run(), run())


def with_gradients(*gradients: torch.Tensor) -> tuple[nn.ParameterDict, torch.optim.Optimizer]:
    """A model of named parameters that have these gradients, and an optimizer over all of them."""
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros_like(g)) for i, g in enumerate(gradients)})
    for parameter, gradient in zip(model.values(), gradients, strict=True):
        parameter.grad = gradient
    return model, torch.optim.SGD(model.values(), lr=1.0)


def test_a_norm_at_the_bound_is_not_clipped() -> None:
    """A gradient whose norm is max_norm itself keeps its bits; one that is a little longer is scaled to the bound."""
    for length, clipped in ((1.0, [3.0, 4.0]), (2.0, [3.0, 4.0])):
        _, optimizer = with_gradients(torch.tensor([3.0, 4.0], dtype=torch.float64) * length)
        assert clip_gradients(optimizer, 5.0) == 5.0 * length
        found = optimizer.param_groups[0]["params"][0].grad.tolist()
        assert found == (clipped if length == 1.0 else pytest.approx(clipped, rel=1e-6))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_whose_norm_is_not_finite_is_left_alone(bad: float) -> None:
    """Clipping returns a norm that is not finite as it is and changes no entry of the gradient."""
    _, optimizer = with_gradients(torch.tensor([1.0, bad, 2.0]), torch.tensor([7.0]))
    assert repr(clip_gradients(optimizer, 0.5)) == repr(bad)
    first, second = (parameter.grad for parameter in optimizer.param_groups[0]["params"])
    assert (first[0], first[2], second[0]) == (1.0, 2.0, 7.0)


def test_double_precision_gradients_keep_it_beside_half_precision_ones() -> None:
    """The norm over a float64 and a bfloat16 gradient has the precision of the float64 one."""
    _, optimizer = with_gradients(torch.tensor([1 / 3], dtype=torch.float64), torch.zeros(2, dtype=torch.bfloat16))
    assert clip_gradients(optimizer, 0.0) == pytest.approx(1 / 3, rel=1e-15)


def test_the_reason_names_the_first_trained_parameter_at_fault() -> None:
    """Parameters with a finite gradient, without one, or that are not trained are not blamed."""
    model, optimizer = with_gradients(torch.ones(1), torch.tensor([math.nan]), torch.tensor([math.inf]))
    assert "'p1'" in not_finite_reason(math.nan, model, optimizer)
    model["p1"].grad = None
    assert "'p2'" in not_finite_reason(math.inf, model, optimizer)
    untrained = torch.optim.SGD([model["p0"]], lr=1.0)
    assert "at fault" not in not_finite_reason(math.inf, model, untrained)


def test_a_window_opens_empty_and_closes_empty() -> None:
    """An optimizer's first group holds the position from the start, keeps one it has, and is empty after a window."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    open_window(optimizer)
    group = optimizer.param_groups[0]
    assert (group[MICRO_BATCHES], group[PENDING], group[PROMISE]) == (0, False, None)
    strategy = training(train_batch_size=2)
    positions = []
    for part in range(2):
        strategy.backward(mean_loss(model, *samples(1, seed=part)), model, optimizer)
        assert group[PENDING] is True
        strategy.optimizer_step(optimizer, model, None)
        positions.append(group[MICRO_BATCHES])
        assert group[PENDING] is False
        open_window(optimizer)
        assert group[MICRO_BATCHES] == positions[-1]
    assert positions == [1, 0]


def test_an_optimizer_that_was_never_prepared_counts_from_the_first_micro_batch() -> None:
    """The user's own optimizer steps at the end of the first window, not before."""
    model = network()
    strategy, optimizer = training(train_batch_size=3), torch.optim.SGD(model.parameters(), lr=0.1)
    stepped = []
    for part in range(3):
        strategy.backward(mean_loss(model, *samples(1, seed=part)), model, optimizer)
        stepped.append(strategy.optimizer_step(optimizer, model, None).stepped)
    assert stepped == [False, False, True]


@pytest.mark.parametrize("is_counted", [True, False])
@pytest.mark.parametrize("promise", [True, False])
def test_a_step_that_contradicts_backward_is_refused_and_can_be_made_again(promise: bool, is_counted: bool) -> None:
    """What backward was told of the window's end holds: another step changes nothing, and the right one then steps."""
    model, reference = network(), network()
    # counted, the window would end where backward was promised another micro-batch, and the other way round
    strategy = training(max_norm=0.0, train_batch_size=3 if promise else 2)
    plain = training(max_norm=0.0, train_batch_size=2 if promise else 3)
    optimizers = {id(each): strategy.create_optimizer(each, lr=0.01) for each in (model, reference)}
    optimizer, its = optimizers[id(model)], optimizers[id(reference)]
    for part in range(2):
        for each, each_optimizer in ((model, optimizer), (reference, its)):
            said = promise if part and each is model else None
            loss = mean_loss(each, *samples(2, seed=part))
            strategy.backward(loss, each, each_optimizer, weight=0.5, is_boundary=said)
        if not part:
            strategy.optimizer_step(optimizer, model, None, is_boundary=False)
            plain.optimizer_step(its, reference, None, is_boundary=False)
    before, group = snapshot(model, optimizer), dict(optimizer.param_groups[0])
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    with pytest.raises(StepError, match=f"is_boundary={promise} was said to backward") as error:
        strategy.optimizer_step(optimizer, model, None, is_boundary=None if is_counted else not promise)
    assert f"call optimizer_step with is_boundary={promise}" in str(error.value)
    assert_same_bits(snapshot(model, optimizer), before)
    assert dict(optimizer.param_groups[0]) == group
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    result = strategy.optimizer_step(optimizer, model, None, is_boundary=promise)
    assert result == plain.optimizer_step(its, reference, None, is_boundary=promise)
    assert result.stepped is promise
    assert optimizer.param_groups[0][PROMISE] is None
    assert_same_bits(snapshot(model, optimizer), snapshot(reference, its))


def test_the_last_backward_before_a_step_decides_what_was_promised() -> None:
    """A micro-batch of two losses has two backwards; the second one says whether more follow."""
    model = network()
    strategy = training()
    optimizer = strategy.create_optimizer(model)
    for promise in (False, True):
        strategy.backward(mean_loss(model, *samples(2)), model, optimizer, is_boundary=promise)
    assert strategy.optimizer_step(optimizer, model, None).stepped


def test_a_promise_is_forgotten_after_its_step() -> None:
    """It binds one step: the next micro-batch, which says nothing, may end the window by the count."""
    model = network()
    strategy = training(train_batch_size=2)
    optimizer = strategy.create_optimizer(model)
    strategy.backward(mean_loss(model, *samples(2)), model, optimizer, is_boundary=False)
    assert not strategy.optimizer_step(optimizer, model, None).stepped
    strategy.backward(mean_loss(model, *samples(2)), model, optimizer)
    assert strategy.optimizer_step(optimizer, model, None).stepped


@pytest.mark.parametrize(("is_boundary", "sync"), [(None, True), (True, True), (False, False)])
def test_gradients_are_exchanged_unless_more_micro_batches_were_promised(is_boundary: bool | None, sync: bool) -> None:
    """The hook is told, with the model, before the loss has its backward; a refused loss does not reach it."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls: list[tuple[nn.Module, bool, bool]] = []

    def set_gradient_sync(model: nn.Module, sync: bool) -> None:
        calls.append((model, sync, all(parameter.grad is None for parameter in model.parameters())))

    backward = build_backward(equal_share=0.5, set_gradient_sync=set_gradient_sync)
    with pytest.raises(StepError):
        backward(torch.ones(()), model, optimizer, is_boundary=is_boundary)
    assert calls == []
    backward(mean_loss(model, *samples(2)), model, optimizer, is_boundary=is_boundary)
    assert calls == [(model, sync, True)]
