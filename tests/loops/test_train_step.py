"""One step over micro-batches of any sizes, on simulated ranks, held against one batch in raw PyTorch.

N rows of all samples, H features
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightrft.backends.collectives.simulated import run_simulated
from lightrft.backends.training.schedule import build_schedule
from lightrft.data.micro_batches import balance_by_tokens
from lightrft.errors import DataError, StepError
from lightrft.loops.train_step import LossFunction, train_step
from lightrft.strategy import get_strategy
from lightrft.strategy.calls import Call
from lightrft.strategy.compose import with_recording
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.training import StepResult, Trainable
from lightrft.testing.replicated import build_simulated

LAWS = settings(deadline=None, max_examples=25)
LR, MAX_NORM = 0.01, 0.5


@pytest.fixture(autouse=True)
def _streams_are_left_alone() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


@attrs.frozen(kw_only=True, eq=False)
class Rows:
    """A micro-batch: samples of 0 to 3 tokens (rows); the loss is a mean over tokens."""

    inputs_NH: Tensor
    targets_N1: Tensor


@attrs.frozen(kw_only=True, eq=False)
class Trained:
    """What one rank saw."""

    result: StepResult
    tensors: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    calls: list[str]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()


def rows(count: int, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return Rows(inputs_NH=drawn[:, :3], targets_N1=drawn[:, 3:])


def joined(parts: Sequence[Rows]) -> Rows:
    return Rows(
        inputs_NH=torch.cat([part.inputs_NH for part in parts]),
        targets_N1=torch.cat([part.targets_N1 for part in parts]),
    )


def loss_fn(model: nn.Module, batch: Rows) -> Tensor:
    return (model(batch.inputs_NH) - batch.targets_N1).square().sum() / max(len(batch.inputs_NH), 1)


def careless_loss_fn(model: nn.Module, batch: Rows) -> Tensor:
    """The same with a row of padding, masked out; 0 / 0 for a batch without tokens, and so in the gradient."""
    padding = Rows(inputs_NH=torch.ones(1, 3).double(), targets_N1=torch.zeros(1, 1).double())
    padded = joined([batch, padding])
    mask_N1 = torch.tensor([[1.0]] * num_tokens(batch) + [[0.0]]).double()
    return ((model(padded.inputs_NH) - padded.targets_N1).square() * mask_N1).sum() / mask_N1.sum()


def num_tokens(batch: Rows) -> int:
    return len(batch.inputs_NH)


def train(ranks: Sequence[Sequence[Rows]], *, loss: LossFunction[Rows] = loss_fn, steps: int = 1) -> list[Trained]:
    """Do one step, or several, on as many simulated ranks as there are lists of micro-batches."""
    calls: list[list[Call]] = [[] for _ in ranks]

    def program(rank: int) -> Trained:
        strategy = build_simulated(StrategyConfig(max_norm=MAX_NORM))
        strategy = with_recording(strategy, calls[rank])
        model = network()
        optimizer = strategy.create_optimizer(model, lr=LR, weight_decay=0.1)
        trainable = strategy.prepare((model, optimizer, build_schedule(optimizer, "linear", num_steps=4)))
        calls[rank].clear()
        for _ in range(steps):
            result = train_step(strategy, trainable, ranks[rank], loss, weight_fn=num_tokens)
        return Trained(
            result=result,
            tensors=copy.deepcopy(model.state_dict()),
            gradients={name: value.grad for name, value in model.named_parameters()},
            calls=[call.name for call in calls[rank]],
        )

    return run_simulated(len(ranks), program)


def raw_steps(batch: Rows, steps: int = 1) -> tuple[dict[str, Tensor], StepResult]:
    """The same as one would write it for one batch without a strategy; returns (tensors, the last result)."""
    model = network()
    matrices = [value for value in model.parameters() if value.dim() > 1]
    others = [value for value in model.parameters() if value.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    scheduler = build_schedule(optimizer, "linear", num_steps=4)
    for _ in range(steps):
        loss_fn(model, batch).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item()
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model.state_dict(), StepResult(stepped=True, grad_norm=norm, learning_rate=rate, skipped_reason=None)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11)


@st.composite
def splits(draw: st.DrawFn) -> list[list[Rows]]:
    """2 to 4 ranks with 1 to 4 micro-batches each, of 0 to 3 tokens, at least one token among all."""
    world_size = draw(st.integers(2, 4))
    sizes = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=world_size, max_size=world_size)
    drawn = draw(sizes.filter(lambda ranks: any(map(any, ranks))))
    return [
        [rows(size, seed=10 * rank + place) for place, size in enumerate(sizes)] for rank, sizes in enumerate(drawn)
    ]


@LAWS
@given(ranks=splits(), steps=st.integers(1, 2))
def test_any_split_over_micro_batches_and_ranks_gives_the_step_of_one_batch(
    ranks: list[list[Rows]], steps: int
) -> None:
    """Parameters and norm of all ranks are those of one raw PyTorch batch of all samples."""
    expected, result = raw_steps(joined([batch for batches in ranks for batch in batches]), steps)
    for trained in train(ranks, steps=steps):
        assert_close(trained.tensors, expected)
        assert trained.result.grad_norm == pytest.approx(result.grad_norm, rel=1e-9)
        assert trained.result == attrs.evolve(result, grad_norm=trained.result.grad_norm)


@LAWS
@given(ranks=splits())
def test_ranks_make_the_same_calls(ranks: list[list[Rows]]) -> None:
    """One collective, then as many micro-batches everywhere as the rank with the most has that weigh anything."""
    most = max(sum(1 for batch in batches if num_tokens(batch)) for batches in ranks)
    for trained in train(ranks):
        assert trained.calls == ["all_gather", *["backward", "optimizer_step"] * most]


@LAWS
@given(lengths=st.lists(st.integers(1, 6), min_size=4, max_size=12), world_size=st.integers(2, 4))
def test_micro_batches_by_tokens_give_the_step_of_one_batch(lengths: list[int], world_size: int) -> None:
    """`balance_by_tokens` and `train_step` together: the step of all samples at once."""
    samples = [rows(length, seed=place) for place, length in enumerate(lengths)]
    expected, _ = raw_steps(joined(samples))
    ranks = balance_by_tokens(lengths, 8, world_size=world_size)
    for trained in train([[joined([samples[one] for one in pack]) for pack in rank] for rank in ranks]):
        assert_close(trained.tensors, expected)


def test_one_process_has_the_step_of_one_batch() -> None:
    """Under "single", and for any scale of the weights."""
    for scale in (1.0, 1e-6, 1e6):
        strategy = get_strategy(StrategyConfig(strategy="single", max_norm=MAX_NORM))
        model = network()
        optimizer = strategy.create_optimizer(model, lr=LR, weight_decay=0.1)
        trainable = strategy.prepare((model, optimizer, None))
        parts = [rows(3, seed=0), rows(1, seed=1)]

        def scaled(batch: Rows, scale: float = scale) -> float:
            return scale * len(batch.inputs_NH)

        assert train_step(strategy, trainable, parts, loss_fn, weight_fn=scaled).stepped
        assert_close(model.state_dict(), raw_steps(joined(parts))[0])


def test_the_window_s_end_is_said_to_backward_and_to_the_step() -> None:
    """So that a sharded backend exchanges gradients once: every micro-batch but the last promises more."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    calls: list[Call] = []
    strategy = with_recording(strategy, calls)
    model = network()
    trainable = Trainable(model, strategy.create_optimizer(model), None)
    train_step(strategy, trainable, [rows(1), rows(2), rows(0)], loss_fn, weight_fn=num_tokens)
    said = [(call.name, call.arguments["is_boundary"]) for call in calls if "is_boundary" in call.arguments]
    assert said == [("backward", False), ("optimizer_step", False), ("backward", True), ("optimizer_step", True)]
    assert [call.arguments["weight"] for call in calls if call.name == "backward"] == [1 / 3, 2 / 3]


def test_micro_batches_without_weight_may_have_no_loss() -> None:
    """0 / 0 in one that weighs 0 reaches nothing, on a rank that has one which weighs more."""
    ranks = [[rows(0), rows(2, seed=1)], [rows(1, seed=2), rows(3, seed=3), rows(0)]]
    expected, _ = raw_steps(joined([batch for batches in ranks for batch in batches]))
    for trained in train(ranks, loss=careless_loss_fn):
        assert trained.result.stepped
        assert_close(trained.tensors, expected)


def test_a_rank_whose_micro_batches_all_weigh_nothing_takes_part() -> None:
    """It computes one of them with weight 0, and ends with the parameters of the others, bit for bit."""
    alone, idle = train([[rows(3), rows(1, seed=1)], [rows(0), rows(0)]])
    assert_close(alone.tensors, raw_steps(joined([rows(3), rows(1, seed=1)]))[0])
    assert all(torch.equal(idle.tensors[name], tensor) for name, tensor in alone.tensors.items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_skips_the_step_on_all_ranks(bad: float) -> None:
    """On a rank that is padded too; parameters stay, and the reason is said everywhere."""

    def broken(model: nn.Module, batch: Rows) -> Tensor:
        return loss_fn(model, batch) * (bad if num_tokens(batch) == 2 else 1.0)

    for trained in train([[rows(2)], [rows(1), rows(3), rows(1)]], loss=broken):
        assert not trained.result.stepped
        assert "not finite" in trained.result.skipped_reason
        assert all(torch.equal(tensor, trained.tensors[name]) for name, tensor in network().state_dict().items())
        assert all(gradient is None for gradient in trained.gradients.values())


def test_no_weight_anywhere_skips_the_step_and_says_so() -> None:
    """Nothing is computed: parameters, gradients, schedule and window stay, and the next step is a whole one."""
    for trained in train([[rows(0)], [rows(0), rows(0)]], loss=careless_loss_fn):
        assert trained.result == StepResult(
            stepped=False,
            grad_norm=0.0,
            learning_rate=LR,
            skipped_reason="all micro-batches of all ranks weigh 0; the step was skipped.",
        )
        assert trained.calls == ["all_gather"]
        assert all(torch.equal(tensor, trained.tensors[name]) for name, tensor in network().state_dict().items())


def refusals(ranks: Sequence[Sequence[float]]) -> list[str]:
    """What a step with these weights says on each rank."""

    def program(rank: int) -> str:
        strategy = build_simulated(StrategyConfig())
        model = network()
        trainable = Trainable(model, strategy.create_optimizer(model), None)

        def weight_of(weight: float) -> float:
            return weight

        def never(model: nn.Module, weight: float) -> Tensor:
            raise AssertionError(f"{model} is asked for the loss of {weight}")

        with pytest.raises(DataError) as error:
            train_step(strategy, trainable, ranks[rank], never, weight_fn=weight_of)
        with pytest.raises(StepError):  # no backward has come
            strategy.optimizer_step(trainable.optimizer, model, None, is_boundary=True)
        return str(error.value)

    return run_simulated(len(ranks), program)


def test_a_rank_without_micro_batches_is_an_error_on_all_ranks() -> None:
    """Each of them names the rank, and says what to do; nothing was computed."""
    wrong = (
        "micro_batches=[] of rank 1 is empty, with up to 2 on another rank; "
        "spread samples so that each rank has one (balance_by_tokens does), or pass any with weight 0."
    )
    assert refusals([[1.0], [], [1.0, 2.0]]) == [wrong] * 3


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0])
def test_a_weight_that_is_no_weight_is_an_error_on_all_ranks(weight: float) -> None:
    """Each of them names the rank, the micro-batch and the weight."""
    first, second = refusals([[1.0, 0.0], [1.0, weight, math.nan]])
    assert first == second
    assert first.startswith(f"weight={weight!r} of micro-batch 1 on rank 1 is not a finite number of at least 0; ")
