"""The replicated strategy on simulated ranks, held against a loop in raw PyTorch and against "single".

B batch, H features
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from lightrft.backends.collectives.simulated import build_collectives, run_simulated
from lightrft.backends.collectives.single import build_collectives as build_single_collectives
from lightrft.config import EngineConfig
from lightrft.errors import CollectiveError, ConfigError, DataError, StepError, UnsupportedError
from lightrft.strategy import get_strategy
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.images import Image
from lightrft.strategy.protocols.rollout import Completion, Prompt, SamplingParams
from lightrft.strategy.protocols.training import StepResult
from lightrft.strategy.record import Strategy
from lightrft.testing.replicated import build_replicated, build_simulated
from lightrft.testing.signatures import signature_differences_of_record

WORLD_SIZES = [1, 2, 3, 4]
LR = 0.01


@pytest.fixture(autouse=True)
def _streams_are_left_alone() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def strategy_of(**changes: object) -> Strategy:
    return build_simulated(StrategyConfig(**changes))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)).double()


def samples(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 3, generator=generator, dtype=torch.float64),
        torch.randn(count, 1, generator=generator, dtype=torch.float64),
    )


def mean_loss(model: nn.Module, inputs_BH: torch.Tensor, targets_B1: torch.Tensor) -> torch.Tensor:
    return (model(inputs_BH) - targets_B1).square().mean()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def raw_run(batches: list[tuple[torch.Tensor, torch.Tensor]], max_norm: float) -> tuple[dict[str, torch.Tensor], float]:
    """Whole batches in one process without a strategy; returns the parameters and the last norm."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    norm = torch.tensor(0.0)
    for batch in batches:
        optimizer.zero_grad()
        mean_loss(model, *batch).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
        optimizer.step()
    return bits(model), norm.item()


def assert_parity(
    found: list[tuple[dict[str, torch.Tensor], StepResult]], expected: dict[str, torch.Tensor], norm: float
) -> None:
    """Ranks share their bits, which are the raw loop's up to the order of sums."""
    for parameters, result in found:
        assert_same_bits(parameters, found[0][0])
        assert result == found[0][1]
        assert result.stepped
        assert result.grad_norm == pytest.approx(norm, rel=1e-9)
        for name, value in expected.items():
            torch.testing.assert_close(parameters[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("max_norm", [0.0, 0.05])
@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (2, 3), (3, 2), (4, 1), (4, 3), (2, 6)])
def test_counted_windows_equal_the_raw_loop(world_size: int, micro: int, max_norm: float) -> None:
    """Equal micro-batches on each rank, counted, give the steps of the whole batch; inside a window nothing moves."""
    batches = [samples(12, seed) for seed in range(3)]

    def program(rank: int) -> tuple[dict[str, torch.Tensor], StepResult]:
        strategy = strategy_of(train_batch_size=12, micro_train_batch_size=micro, max_norm=max_norm)
        strategy.setup_distributed()
        model = network(seed=rank)  # only rank 0's weights are meant
        model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=LR), None))
        result: StepResult | None = None
        for inputs_BH, targets_B1 in batches:
            mine = torch.arange(rank, 12, world_size).split(micro)
            for part, chosen in enumerate(mine, start=1):
                before = bits(model)
                strategy.backward(mean_loss(model, inputs_BH[chosen], targets_B1[chosen]), model, optimizer)
                result = strategy.optimizer_step(optimizer, model, None)
                assert result.stepped == (part == len(mine))
                if not result.stepped:
                    assert_same_bits(bits(model), before)
        assert result is not None
        return bits(model), result

    assert_parity(run_simulated(world_size, program), *raw_run(batches, max_norm))


@st.composite
def partitions(draw: st.DrawFn) -> list[list[list[int]]]:
    """Every sample of a window in some micro-batch of some rank; ranks and micro-batches differ in size."""
    world_size, num_samples = draw(st.integers(1, 4)), draw(st.integers(4, 9))
    order = draw(st.permutations(range(num_samples)))
    cuts = sorted(draw(st.lists(st.integers(1, num_samples - 1), max_size=6, unique=True)))
    parts = [list(order[low:high]) for low, high in zip([0, *cuts], [*cuts, num_samples], strict=True)]
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    for part in parts:
        ranks[draw(st.integers(0, world_size - 1))].append(part)
    return ranks


@settings(max_examples=40)
@given(ranks=partitions(), max_norm=st.sampled_from([0.0, 0.05]))
def test_any_partition_over_ranks_and_micro_batches_gives_the_same_step(
    ranks: list[list[list[int]]], max_norm: float
) -> None:
    """With shares of the window as weights, the step is that of the whole batch; a rank may have nothing to add."""
    num_samples = sum(len(part) for parts in ranks for part in parts)
    batches = [samples(num_samples, seed) for seed in range(2)]

    def program(rank: int) -> tuple[dict[str, torch.Tensor], StepResult]:
        strategy = strategy_of(max_norm=max_norm)
        model = network()
        model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=LR), None))
        result: StepResult | None = None
        for inputs_BH, targets_B1 in batches:
            mine = [(part, len(part) / num_samples) for part in ranks[rank]] or [([0], 0.0)]
            for number, (part, weight) in enumerate(mine, start=1):
                loss = mean_loss(model, inputs_BH[part], targets_B1[part])
                strategy.backward(loss, model, optimizer, weight=weight)
                result = strategy.optimizer_step(optimizer, model, None, is_boundary=number == len(mine))
        assert result is not None
        return bits(model), result

    assert_parity(run_simulated(len(ranks), program), *raw_run(batches, max_norm))


def test_two_runs_give_the_same_bits() -> None:
    """Dropout draws alike in each run, and in whatever order ranks run."""

    def program(rank: int) -> dict[str, torch.Tensor]:
        strategy = strategy_of(train_batch_size=4, seed=5)
        strategy.setup_distributed()
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 1))
        model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=LR), None))
        inputs_BH = torch.arange(12.0).reshape(4, 3)
        for number in range(rank, 8, 2):
            strategy.backward(model(inputs_BH[number % 4]).sum(), model, optimizer)
            strategy.optimizer_step(optimizer, model, None)
        return bits(model)

    first = run_simulated(2, program)
    for order in (None, [1, 0]):
        for found in run_simulated(2, program, order=order):
            assert_same_bits(found, first[0])


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_parameter_without_a_gradient_on_one_rank_counts_as_zero_there(world_size: int) -> None:
    """One that another rank's samples reach is stepped alike on all; one that nobody's reach is left alone."""

    def program(rank: int) -> tuple[list[list[float]], int]:
        strategy = strategy_of(max_norm=0.0)
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("all", "one", "none")})
        model, optimizer, _ = strategy.prepare(
            (model, strategy.create_optimizer(model, lr=LR, weight_decay=0.5), None),
        )
        assert isinstance(model, nn.ModuleDict)
        before = model["none"].weight.clone()
        loss = model["all"](torch.ones(2)).sum() + (model["one"](torch.ones(2)).sum() if rank == 1 else 0.0)
        strategy.backward(loss, model, optimizer, weight=1 / world_size)
        result = strategy.optimizer_step(optimizer, model, None, is_boundary=True)
        # gradients are (1, 1) for "all" and (1, 1) / world_size for "one"
        assert result.grad_norm == pytest.approx(math.sqrt(2 + 2 / world_size**2))
        assert torch.equal(model["none"].weight, before)
        return [parameter.tolist() for parameter in model.parameters()], len(optimizer.state)

    results = run_simulated(world_size, program)
    assert results == [results[0]] * world_size
    assert results[0][1] == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(failing: int, bad: float) -> None:
    """No bit changes anywhere, every rank gives the same reason, and the next window is clean."""

    def program(rank: int) -> str | None:
        strategy = strategy_of(train_batch_size=3)
        strategy.setup_distributed()
        model = network()
        model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=LR), None))
        before = bits(model)
        strategy.backward(model(torch.ones(3).double()).sum() * (bad if rank == failing else 1.0), model, optimizer)
        result = strategy.optimizer_step(optimizer, model, None)
        assert not result.stepped
        assert_same_bits(bits(model), before)
        assert not optimizer.state
        strategy.backward(model(torch.ones(3).double()).sum(), model, optimizer)
        assert strategy.optimizer_step(optimizer, model, None).stepped
        return result.skipped_reason

    reasons = run_simulated(3, program)
    assert reasons == [reasons[0]] * 3
    assert reasons[0] is not None
    assert "the gradient of '0.weight' is at fault" in reasons[0]


def test_gradients_meet_once_a_window() -> None:
    """A window of three micro-batches costs one collective, whatever the number of parameters."""

    def program(rank: int) -> int:
        del rank
        calls: list[str] = []
        strategy = counting(StrategyConfig(train_batch_size=6), calls)
        strategy.setup_distributed()
        model = network()
        model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=LR), None))
        calls.clear()
        for _ in range(3):
            strategy.backward(model(torch.ones(3).double()).sum(), model, optimizer)
            strategy.optimizer_step(optimizer, model, None)
        assert set(calls) <= {"all_reduce"}
        return len(calls)

    assert run_simulated(2, program) == [1, 1]


def counting(config: StrategyConfig, calls: list[str]) -> Strategy:
    collectives = build_collectives(config)

    def counted(name: str) -> Callable[..., object]:
        function = getattr(collectives, name)

        def call(*args: object, **kwargs: object) -> object:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    names = ("all_reduce", "all_gather", "broadcast", "barrier")
    return build_replicated(config, attrs.evolve(collectives, **{name: counted(name) for name in names}))


def test_windows_that_ranks_cannot_share_are_refused() -> None:
    """Counting needs whole windows; all factors are shown, with the sizes that would do."""

    def program(rank: int) -> str:
        del rank
        strategy = strategy_of(train_batch_size=12, micro_train_batch_size=4)
        model = network()
        model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=LR), None))
        strategy.backward(model(torch.ones(3).double()).sum(), model, optimizer)
        with pytest.raises(ConfigError) as error:
            strategy.optimizer_step(optimizer, model, None)
        return str(error.value)

    wrong = "train_batch_size=12 is not divisible by micro_train_batch_size(4) * world_size"
    assert run_simulated(2, program) == [f"{wrong}(2) = 8; use 8 or 16."] * 2
    assert run_simulated(4, program) == [f"{wrong}(4) = 16; use 16."] * 4


def test_a_step_without_a_backward_ends_the_run() -> None:
    """A rank that forgot `backward` raises before it meets the others, which do not wait for it."""

    def program(rank: int) -> None:
        strategy = strategy_of(train_batch_size=2)
        model = network()
        model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=LR), None))
        if rank == 0:
            strategy.backward(model(torch.ones(3).double()).sum(), model, optimizer)
        strategy.optimizer_step(optimizer, model, None)

    with pytest.raises(StepError, match="call backward") as error:
        run_simulated(2, program)
    assert error.value.__notes__ == ["on rank 1"]


# prepare, data


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_prepared_replicas_are_those_of_rank_0(world_size: int) -> None:
    """Parameters, buffers and frozen models become rank 0's; tied ones stay tied; a second time changes nothing."""

    def program(rank: int) -> tuple[dict[str, torch.Tensor], ...]:
        strategy = strategy_of()
        torch.manual_seed(rank)
        models = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)) for _ in range(3)]
        for model in models:
            model[1].register_buffer("own", torch.tensor([rank]), persistent=False)
            model[2].weight = model[0].weight
        prepared = strategy.prepare(*models, is_rlhf=True)
        again = strategy.prepare(prepared[0])
        reward = strategy.prepare_reward_model(network(seed=rank + 10))
        for model in models:
            assert model[2].weight is model[0].weight
            assert model[1].own.item() == 0
        assert not any(parameter.requires_grad for parameter in reward.parameters())
        return (*(bits(model) for model in models), bits(again), bits(reward))

    results = run_simulated(world_size, program)
    torch.manual_seed(0)
    expected = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)) for _ in range(3)]
    for model in expected:
        model[2].weight = model[0].weight
    for found in results:
        for one, model in zip(found[:3], expected, strict=True):
            assert_same_bits(one, bits(model))
        assert_same_bits(found[3], found[0])
        assert_same_bits(found[4], bits(network(seed=10)))


def test_all_models_of_a_reinforcement_run_are_replicated() -> None:
    """Actor, critic, reward model and reference are rank 0's on every rank, and take bfloat16 like any other."""

    def program(rank: int) -> list[dict[str, torch.Tensor]]:
        strategy = strategy_of(bf16=True)
        models = [network(seed=4 * rank + number).float() for number in range(4)]
        actor, critic, rewards, initial = strategy.prepare_models_and_optimizers(*models, max_steps=3)
        assert critic is not None
        assert initial is not None
        assert actor.model(torch.ones(3)).dtype == torch.bfloat16
        prepared = [actor.model, critic.model, rewards[0], initial]
        return [dict(strategy.named_tensors(model)) for model in prepared]

    for found in run_simulated(2, program):
        for number, tensors in enumerate(found):
            assert_same_bits(tensors, network(seed=number).float().state_dict())


def test_models_that_differ_in_shape_are_refused() -> None:
    """A rank whose model is another one is named by its parameter."""

    def program(rank: int) -> None:
        strategy_of().prepare(nn.Linear(2 + rank, 2))

    with pytest.raises(CollectiveError, match=r"data\['weight'\] is float32 of shape \(2, 2\) on rank 0"):
        run_simulated(2, program)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_share_the_samples(world_size: int) -> None:
    """Loaders of all ranks cover an epoch once; the user's own seeding stands."""

    def program(rank: int) -> list[int]:
        del rank
        strategy = strategy_of()
        strategy.setup_distributed()
        torch.manual_seed(9)
        loader = strategy.setup_dataloader(TensorDataset(torch.arange(12)), 3, drop_last=False)
        assert torch.initial_seed() == 9
        return [number for (batch,) in loader for number in batch.tolist()]

    shares = run_simulated(world_size, program)
    assert sorted(number for share in shares for number in share) == list(range(12))
    assert {len(share) for share in shares} == {12 // world_size}


# checkpoints


def test_training_goes_on_from_a_checkpoint_at_another_world_size(tmp_path: Path) -> None:
    """Two steps, a checkpoint and two more steps on other ranks equal four steps without a break."""
    batches = [samples(12, seed) for seed in range(4)]

    def run(strategy: Strategy, rank: int, world_size: int, part: slice, *, load: bool) -> dict[str, torch.Tensor]:
        strategy.setup_distributed()
        model = network()
        model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=LR), None))
        if load:
            strategy.load_ckpt(model, tmp_path, optimizer=optimizer)
        for inputs_BH, targets_B1 in batches[part]:
            chosen = slice(rank, None, world_size)
            strategy.backward(mean_loss(model, inputs_BH[chosen], targets_B1[chosen]), model, optimizer)
            assert strategy.optimizer_step(optimizer, model, None).stepped
        if not load:
            strategy.save_ckpt(model, tmp_path, optimizer=optimizer)
        return bits(model)

    def at(world_size: int, part: slice, *, load: bool) -> list[dict[str, torch.Tensor]]:
        def program(rank: int) -> dict[str, torch.Tensor]:
            strategy = strategy_of(train_batch_size=12, micro_train_batch_size=12 // world_size, max_norm=0.0)
            return run(strategy, rank, world_size, part, load=load)

        return run_simulated(world_size, program)

    at(2, slice(0, 2), load=False)
    expected, _ = raw_run(batches, max_norm=0.0)
    for parameters in at(3, slice(2, 4), load=True):
        for name, value in expected.items():
            torch.testing.assert_close(parameters[name], value, rtol=1e-9, atol=1e-9)


# rollout


class Bigram(nn.Module):
    """Logits of a position from its token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 7)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.table(ids_BT)


PROMPTS = [Prompt(token_ids=tuple(range(1, length))) for length in (2, 5, 3, 4, 2)]


def generate(strategy: Strategy, prompts: list[Prompt], sampling: SamplingParams) -> list[Completion]:
    torch.manual_seed(0)
    with strategy.setup_inference_engine(EngineConfig(type="scripted"), actor=Bigram()) as engine:
        return strategy.gather_and_generate(engine, prompts, sampling)


@pytest.mark.parametrize("split", [[5], [2, 3], [0, 5], [1, 0, 4], [5, 0, 0], [1, 1, 2, 1]], ids=str)
def test_completions_do_not_depend_on_the_split_over_ranks(split: list[int]) -> None:
    """Each rank gets the completions of its own prompts, as one process would have made them; also none."""
    sampling = SamplingParams(n=2, max_new_tokens=3)
    bounds = [sum(split[:rank]) for rank in range(len(split) + 1)]

    def program(rank: int) -> list[Completion]:
        return generate(strategy_of(), PROMPTS[bounds[rank] : bounds[rank + 1]], sampling)

    found = run_simulated(len(split), program)
    assert [len(completions) for completions in found] == [2 * count for count in split]
    expected = generate(get_strategy(StrategyConfig(strategy="single")), PROMPTS, sampling)
    assert [completion for completions in found for completion in completions] == expected


def test_no_prompts_give_no_completions() -> None:
    """A call without any prompt on any rank is no error."""

    def program(rank: int) -> list[Completion]:
        del rank
        return generate(strategy_of(), [], SamplingParams())

    assert run_simulated(2, program) == [[], []]


def test_prompts_that_cannot_be_gathered_are_refused_on_every_rank() -> None:
    """Images of one rank, for an engine that takes none, and an empty prompt are the same error everywhere."""
    image = Image(width=1, height=1, pixels=bytes(3))

    def program(rank: int) -> tuple[str, str]:
        strategy = strategy_of()
        with pytest.raises(UnsupportedError) as images:
            generate(strategy, [Prompt(token_ids=(1,), images=(image,) * rank)], SamplingParams())
        with pytest.raises(DataError) as empty:
            generate(strategy, [Prompt(token_ids=(1,) * (1 - rank))], SamplingParams())
        return str(images.value), str(empty.value)

    found = run_simulated(2, program)
    assert found[0] == found[1]
    assert found[0][0].startswith("rank 1: prompts[0] has images")
    assert found[0][1].startswith("rank 1: prompts[0]=[] is empty")


def test_synced_engines_agree_on_every_rank() -> None:
    """After a weight sync every rank's engine has the same version and the same logprobs."""

    def program(rank: int) -> tuple[int, list[Completion]]:
        strategy = strategy_of()
        torch.manual_seed(rank)
        actor = strategy.prepare(Bigram())
        with strategy.setup_inference_engine(EngineConfig(type="scripted"), actor=Bigram()) as engine:
            report = strategy.update_engine_weights(engine, actor)
            return report.weight_version, strategy.gather_and_generate(engine, PROMPTS[:1], SamplingParams(n=1))

    found = run_simulated(2, program)
    assert found[0] == found[1]
    assert found[0][0] == 1


# over other collectives


def test_over_the_collectives_of_one_process_it_is_single() -> None:
    """With one rank the replicated strategy and "single" give the same bits, and its functions have the signatures."""
    config = StrategyConfig(strategy="single", train_batch_size=4, micro_train_batch_size=2)
    replicated = build_replicated(config, build_single_collectives(config))
    assert signature_differences_of_record(replicated) == []
    assert replicated.capabilities == frozenset({"bf16", "ranks"})
    found: list[dict[str, torch.Tensor]] = []
    for strategy in (replicated, get_strategy(config)):
        model = network()
        model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=LR), None))
        for seed in range(4):
            strategy.backward(mean_loss(model, *samples(2, seed)), model, optimizer)
            strategy.optimizer_step(optimizer, model, None)
        found.append(bits(model))
        strategy.teardown()
    assert_same_bits(*found)
