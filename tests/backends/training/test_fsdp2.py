"""Training over shards in real processes over gloo, held against a loop of raw torch in one."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrft.backends.plain_model import build_plain_model
from lightrft.backends.training.meta_init import fill_meta_parameters, parameters_on_meta
from lightrft.backends.training.wrapping import compile_layers, layers_of, recompute_layers
from lightrft.errors import ConfigError, StepError, UnsupportedError
from lightrft.strategy.build import get_strategy
from lightrft.strategy.record import Strategy
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.subject import RunOnRanks, subject_of

CLOSE = 1e-5

TRAININGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "one micro-batch": {"micro_batches": 1},
    "told where windows end": {"is_told": True, "micro_batches": 3},
    "ranks reach different parameters": {"experts": (0, 1)},
    "told, and ranks reach different parameters": {"experts": (0, 1), "is_told": True},
    "layers by name": {"wrap": ("Linear", "Block")},
    "layers stay whole until the backward pass": {"reshard": False},
    "layers computed twice": {"recompute": True},
    "layers compiled": {"compiled": True},
    "frozen with adapters": {"lora": True},
    "an optimizer with state": {"is_trained_before": True},
    "momentum": {"optimizer": "SGD", "is_trained_before": True},
    "another optimizer": {"optimizer": "NAdam"},
}


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # workers get this path
    yield importlib.import_module("fsdp2_programs")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def run(programs: ModuleType, spawn: SpawnRank) -> Iterator[RunOnRanks]:
    del programs
    with processes(subject_of("fsdp2", "strategy"), 2, spawn=spawn) as run_on_ranks:
        yield run_on_ranks


def require_raw(run: RunOnRanks, programs: ModuleType, world_size: int, **settings: Any) -> list[Any]:
    case = programs.Case(**settings)
    must, seen = programs.raw(case, world_size), run(programs.train, case)
    losses = [seen[index % world_size].losses[index // world_size] for index in range(len(must.losses))]
    assert losses == pytest.approx(must.losses, rel=CLOSE)
    for rank in seen:
        assert rank.norms == seen[0].norms == pytest.approx(must.norms, rel=CLOSE)
        assert rank.tensors.keys() == must.tensors.keys()
        for name, tensor in must.tensors.items():
            assert torch.equal(rank.tensors[name], seen[0].tensors[name])
            torch.testing.assert_close(rank.tensors[name], tensor, rtol=CLOSE, atol=1e-6, msg=name)
    return seen


@pytest.mark.parametrize("training", TRAININGS)
def test_training_over_shards_is_that_of_one_process(run: RunOnRanks, programs: ModuleType, training: str) -> None:
    """Losses, norms and tensors are those of raw torch with the samples of all ranks, the same bits on all."""
    require_raw(run, programs, 2, **TRAININGS[training])


def test_what_can_be_sharded_is(run: RunOnRanks, programs: ModuleType) -> None:
    """Parameters with elements and dims are shards under their plain names, and so is the optimizer's state of them."""
    (seen, _) = run(programs.train, programs.Case(num_steps=1))
    model = programs.Model()
    assert seen.sharded == [name for name, value in model.named_parameters() if value.dim() and value.numel()]
    assert {entry.split()[1] for entry in seen.state} == {"DTensor"}
    assert "exp_avg DTensor (11, 8)" in seen.state


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_any_number_of_ranks_trains_alike(programs: ModuleType, world_size: int, spawn: SpawnRank) -> None:
    """One, three and four ranks do what one process does; four also as two copies of two shards, and as four copies."""
    with processes(subject_of("fsdp2", "strategy"), world_size, spawn=spawn) as run_on_ranks:
        require_raw(run_on_ranks, programs, world_size, experts=(0, 1))
        for replicate in (2, 4) if world_size == 4 else ():
            require_raw(run_on_ranks, programs, 4, experts=(0, 1), replicate=replicate)
            require_raw(run_on_ranks, programs, 4, experts=(0, 1), replicate=replicate, is_told=True)


@pytest.mark.parametrize("is_told", [False, True])
def test_a_window_has_the_collectives_of_a_raw_loop(run: RunOnRanks, programs: ModuleType, is_told: bool) -> None:
    """Gathers and reductions are those of a raw loop over `fully_shard`; the norm is one more all-reduce, in both."""
    for ours, raws in run(programs.count, programs.Case(micro_batches=3, is_told=is_told)):
        assert ours.pop("allreduce_") == 1
        assert ours == raws
        assert raws["_reduce_scatter_base_"] == (3 if is_told else 9)


def test_a_fault_on_one_rank_is_told_in_the_same_words_on_all(run: RunOnRanks, programs: ModuleType) -> None:
    """The step is skipped everywhere, without a trace, and the first parameter at fault is named."""
    first, second = run(programs.fault, programs.Case(micro_batches=1))
    assert first == second
    assert first == [
        "grad_norm=nan is not finite: the gradient of 'embedding.weight' is at fault; the step was skipped.",
        "True",
        "0",
    ]


def test_models_without_memory_plain_copies_and_averages(run: RunOnRanks, programs: ModuleType) -> None:
    """A model built with meta_init has real buffers, and NaN until it is loaded; a plain copy is whole and tied."""
    model = programs.build(programs.Case())
    other = programs.build(programs.Case(), seed=5)
    for seen in run(programs.look, programs.Case()):
        assert seen.is_meta == [name for name, _ in model.named_parameters()]
        assert math.isnan(seen.first_loss)
        assert seen.is_tied
        assert seen.dtype == "torch.bfloat16"
        torch.testing.assert_close(seen.plain, dict(model.state_dict()), rtol=0, atol=0)
        torch.testing.assert_close(seen.plain_logits, model(programs.ids_of(0, 0, 0)), rtol=0, atol=0)
        torch.testing.assert_close(seen.logits, seen.plain_logits)
        for average in seen.averages:
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(average[name], 0.75 * parameter + 0.25 * other.get_parameter(name))


def test_what_cannot_be_is_refused(run: RunOnRanks, programs: ModuleType) -> None:
    """Unknown layers, copies that do not divide the ranks, a foreign optimizer, buffers without memory are told."""
    wrap, replicate, optimizer, meta, layers = run(programs.look, programs.Case())[0].refused
    assert wrap.startswith("ConfigError: fsdp_wrap=('Blok',) names no module of Model; its classes are Block, ")
    assert replicate == "ConfigError: fsdp_replicate=3 does not divide world_size(2); use one of its divisors."
    assert optimizer.startswith("UnsupportedError: optimizer=AdamW holds a parameter of shape (1, 1) that is none")
    assert meta.startswith("UnsupportedError: buffer 'positions' of Model is on the meta device")
    assert layers == (
        "ConfigError: gradient_checkpointing=True finds no layers in Linear; name their classes in fsdp_wrap."
    )


def test_a_model_that_is_not_prepared_is_not_stepped() -> None:
    """Without `prepare` there is nothing that sums gradients, and it is said."""
    strategy = get_strategy({"strategy": "fsdp2"})
    model = nn.Linear(1, 1)
    with pytest.raises(StepError, match="model=Linear is not prepared; pass what prepare returned"):
        strategy.optimizer_step(strategy.create_optimizer(model), model, None)


@pytest.fixture
def alone() -> Iterator[Strategy]:
    """A strategy in a world of one rank."""
    strategy = get_strategy({"strategy": "fsdp2", "train_batch_size": 2, "max_norm": 1.0})
    strategy.setup_distributed()
    yield strategy
    strategy.teardown()


class Pair(nn.Module):
    """Two parameters, of which a loss may reach one."""

    def __init__(self) -> None:
        super().__init__()
        self.first: nn.Parameter = nn.Parameter(torch.ones(3))
        self.second: nn.Parameter = nn.Parameter(torch.ones(3))

    def forward(self, *, both: bool) -> Tensor:
        return (self.first + self.second).sum() if both else self.first.sum()


def test_a_window_that_a_checkpoint_ended_leaves_no_trace(alone: Strategy, tmp_path: Path) -> None:
    """What it reached and the next one does not is not stepped, decayed or moved by momentum."""
    model = Pair()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    trainable = alone.prepare((model, optimizer, None))
    model, optimizer, scheduler = trainable
    alone.save_ckpt(trainable, tmp_path)
    alone.backward(model(both=True), model, optimizer)
    alone.load_ckpt(trainable, tmp_path)
    for _ in range(2):
        alone.backward(model(both=False), model, optimizer)
        alone.optimizer_step(optimizer, model, scheduler)
    tensors = dict(alone.named_tensors(model))
    assert torch.equal(tensors["second"], torch.ones(3))
    assert not torch.equal(tensors["first"], torch.ones(3))


def test_a_norm_beyond_float32_bounds_the_gradient(alone: Strategy) -> None:
    """A gradient of 3e38 in four places has a norm of 6e38, and is scaled to 1."""
    model = nn.Linear(4, 1, bias=False)
    before = model.weight.detach().clone()
    model, optimizer, _ = alone.prepare((model, torch.optim.SGD(model.parameters(), lr=1.0), None))
    alone.backward(model(torch.full((1, 4), 3e38)).sum(), model, optimizer, weight=1.0, is_boundary=True)
    result = alone.optimizer_step(optimizer, model, None, is_boundary=True)
    assert result.grad_norm == pytest.approx(6e38)
    torch.testing.assert_close(dict(alone.named_tensors(model))["weight"], before - 0.5)


def test_buffers_of_a_plain_copy_are_those_of_the_model(alone: Strategy) -> None:
    """Those too that no checkpoint has, and after they have changed."""
    model = nn.Linear(2, 2)
    model.register_buffer("passing", torch.zeros(2), persistent=False)
    prepared = alone.prepare(model)
    prepared.get_buffer("passing").fill_(3.0)
    make_plain = build_plain_model(unwrap_model=alone.unwrap_model, named_tensors=alone.named_tensors)
    assert make_plain(prepared).get_buffer("passing").tolist() == [3.0, 3.0]


def test_models_and_optimizers_that_shards_cannot_have_are_refused(alone: Strategy) -> None:
    """Complex parameters, those of another model, dtypes side by side, and optimizers of whole tensors."""

    def prepare(model: nn.Module, kind: Callable[..., Optimizer] = torch.optim.SGD) -> None:
        alone.prepare((model, kind(model.parameters()), None))

    with pytest.raises(UnsupportedError, match="parameter '0' of ParameterList is complex"):
        prepare(nn.ParameterList([torch.ones(2, dtype=torch.complex64)]))
    with pytest.raises(
        UnsupportedError, match=r"of Sequential that are trained are torch\.bfloat16 and torch\.float32"
    ):
        prepare(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()))
    trunk = nn.Linear(2, 2)
    prepare(trunk)
    with pytest.raises(UnsupportedError, match=r"parameter '0\.weight' of Sequential is sharded already"):
        prepare(nn.Sequential(trunk, nn.Linear(2, 2)))
    with pytest.raises(UnsupportedError, match="optimizer=Rprop looks at whole tensors"):
        prepare(nn.Linear(2, 2), torch.optim.Rprop)


def test_a_parameter_is_no_extra_state(alone: Strategy) -> None:
    """A name that ends like torch's own for a module's extra state is a name."""
    model = nn.Module()
    model.rnn_extra_state = nn.Parameter(torch.ones(2))
    assert [name for name, _ in alone.named_tensors(model)] == ["rnn_extra_state"]
    assert [name for name, _ in get_strategy({"strategy": "single"}).named_tensors(model)] == ["rnn_extra_state"]


class Layer(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.inner: nn.Linear = nn.Linear(1, 1)
        self.weight: nn.Parameter = weight


def test_a_layer_that_shares_a_parameter_is_none() -> None:
    """What is tied to another part stays with the root; inner layers come before those around them."""
    shared = nn.Parameter(torch.zeros(1))
    model = nn.ModuleList([Layer(shared), Layer(shared), Layer(nn.Parameter(torch.zeros(1)))])
    alone = model[2]
    assert layers_of(model, ["Layer"]) == [alone]
    found = layers_of(model, ["Layer", "Linear"])
    assert found.index(alone.inner) < found.index(alone)
    assert [type(layer).__name__ for layer in found].count("Linear") == 3
    twice = nn.Linear(1, 1)
    assert layers_of(nn.Sequential(twice, twice), ["Linear"]) == []
    assert layers_of(model) == []


def test_layers_are_needed_where_layers_are_meant() -> None:
    """Recomputing and compiling a model without layers is refused."""
    with pytest.raises(ConfigError, match="compile_layers=True finds no layers in Linear"):
        compile_layers(nn.Linear(1, 1), [])
    with pytest.raises(ConfigError, match="gradient_checkpointing=True finds no layers in Linear"):
        recompute_layers(nn.Linear(1, 1), [])


def test_a_recomputed_layer_keeps_its_input_alone() -> None:
    """A layer runs twice in training and evaluation mode, with the same gradient; without gradients once."""
    calls: list[int] = []

    class Counted(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return super().forward(hidden)

    model = Counted(2, 2)
    names = [name for name, _ in model.named_parameters()]
    x = torch.ones(1, 2, requires_grad=True)
    model(x).sum().backward()
    plain = model.weight.grad
    model.zero_grad()
    recompute_layers(model, [model])
    calls.clear()
    model(x).sum().backward()
    assert (len(calls), [name for name, _ in model.named_parameters()]) == (2, names)
    assert torch.equal(plain, model.weight.grad)
    model.eval()
    model(x).sum().backward()
    assert len(calls) == 4
    with torch.no_grad():
        model(x)
    assert len(calls) == 5


def test_parameters_without_memory_are_filled_once_where_they_are_tied() -> None:
    """Tied parameters stay tied, frozen ones frozen, and integers are zero."""
    with parameters_on_meta():
        first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        second.weight = first.weight
        first.numbers = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    assert first.weight.is_meta
    fill_meta_parameters([first, second], "cpu")
    assert first.weight is second.weight
    assert first.weight.isnan().all()
    assert first.numbers.tolist() == [0, 0, 0]
    assert not first.numbers.requires_grad
    assert not nn.Linear(1, 1).weight.is_meta
