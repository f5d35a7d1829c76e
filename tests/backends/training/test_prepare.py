"""Preparing, unwrapping, averaging, streaming, loading and moving models under "single"."""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import operator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from lightrft.backends.training.autocast import AutocastModel, wrap_autocast
from lightrft.backends.training.dataloader import build_setup_dataloader
from lightrft.backends.training.memory import _resident_bytes, move_handles
from lightrft.backends.training.parameters import named_tensors
from lightrft.backends.training.record import TrainingFunctions
from lightrft.backends.training.single import build_training
from lightrft.data.sampler import ResumableSampler
from lightrft.errors import ConfigError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.training import Trainable


def training(**changes: object) -> TrainingFunctions:
    return build_training(StrategyConfig(**{"strategy": "single", **changes}))


def test_prepare_returns_what_it_was_given() -> None:
    """One argument gives one thing and several give a list; a model stays a model and a triple becomes a Trainable."""
    strategy = training()
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert strategy.prepare(model) is model
    trainable = strategy.prepare((model, optimizer, None))
    assert trainable == Trainable(model, optimizer, None)
    assert strategy.prepare(other, trainable) == [other, trainable]
    assert strategy.prepare() == []
    assert optimizer.param_groups[0]["micro_batches"] == 0


def test_is_rlhf_freezes_models_without_an_optimizer() -> None:
    """With is_rlhf models alone are frozen and in evaluation mode; those with an optimizer are trained."""
    strategy = training()
    model, reference = nn.Linear(2, 2), nn.Linear(2, 2)
    kept, frozen = strategy.prepare((model, torch.optim.SGD(model.parameters(), lr=0.1), None), reference, is_rlhf=True)
    assert kept.model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    untouched = strategy.prepare(nn.Linear(2, 2))
    assert untouched.training
    assert untouched.weight.requires_grad


def test_prepare_reward_model_freezes() -> None:
    """A reward model comes back in evaluation mode and asks for no gradient."""
    model = training().prepare_reward_model(nn.Linear(2, 1))
    assert not model.training
    assert not model.weight.requires_grad


def test_prepare_models_and_optimizers_takes_what_there_is() -> None:
    """Any of critic, reward models and reference may be missing; one Sequential is one reward model; all are frozen."""
    strategy = training()
    whole = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    two = [nn.Linear(2, 1), nn.Linear(2, 1)]
    for reward_models, expected in ((None, []), (whole, [whole]), (two, two), ((), [])):
        actor, critic, rewards, initial = strategy.prepare_models_and_optimizers(
            nn.Linear(2, 2), None, reward_models, None
        )
        assert isinstance(actor, Trainable)
        assert (critic, initial) == (None, None)
        assert rewards == expected
        assert not any(parameter.requires_grad for model in rewards for parameter in model.parameters())
        assert not any(model.training for model in rewards)


def test_warm_up_and_floor_of_the_rate_are_the_config_s() -> None:
    """The schedules rise over lr_warmup_ratio of the run and end at min_lr_ratio; by default a run is one step."""
    strategy = training(actor_learning_rate=1.0, lr_scheduler="linear", lr_warmup_ratio=0.4, min_lr_ratio=0.5)

    def rates(*max_steps: int) -> list[float]:
        trainable, *_ = strategy.prepare_models_and_optimizers(nn.Linear(2, 2), None, None, None, None, *max_steps)
        found = []
        for _ in range(5):
            found.append(trainable.optimizer.param_groups[0]["lr"])
            trainable.optimizer.step()
            trainable.scheduler.step()
        return found

    assert rates(5) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5])
    assert rates() == pytest.approx([1.0, 0.5, 0.5, 0.5, 0.5])


def test_optimizers_are_made_from_the_settings() -> None:
    """Actor and critic take rates, betas, decay and schedule from the call's arguments, or the strategy's config."""
    strategy = training(actor_learning_rate=0.5, critic_learning_rate=0.25, l2=0.1, lr_scheduler="constant")
    args = argparse.Namespace(
        actor_learning_rate=1.0, adam_betas=(0.5, 0.6), lr_scheduler="linear", lr_warmup_ratio=0.0, min_lr_ratio=0.0
    )
    (_, own, schedule), (_, critic, _), _, initial = strategy.prepare_models_and_optimizers(
        nn.Linear(2, 2), nn.Linear(2, 1), None, nn.Linear(2, 2)
    )
    assert (own.param_groups[0]["lr"], critic.param_groups[0]["lr"]) == (0.5, 0.25)
    assert own.param_groups[0]["weight_decay"] == 0.1
    assert initial is not None
    assert not initial.weight.requires_grad
    own.step()
    schedule.step()
    assert own.param_groups[0]["lr"] == 0.5
    (_, given, schedule), *_ = strategy.prepare_models_and_optimizers(nn.Linear(2, 2), None, None, None, args, 3)
    assert given.param_groups[0]["betas"] == (0.5, 0.6)
    rates = []
    for _ in range(3):
        rates.append(given.param_groups[0]["lr"])
        given.step()
        schedule.step()
    assert rates == [1.0, 0.5, 0.0]


def test_bf16_computes_in_bfloat16_over_float32_parameters() -> None:
    """A prepared model's forward computes in bfloat16; parameters, gradients and names of the plain model stay."""
    strategy = training(bf16=True)
    plain = nn.Linear(4, 4)
    model, optimizer, _ = strategy.prepare((plain, strategy.create_optimizer(plain), None))
    output = model(torch.ones(1, 4))
    assert output.dtype == torch.bfloat16
    strategy.backward(output.float().sum(), model, optimizer)
    assert plain.weight.grad.dtype == plain.weight.dtype == torch.float32
    assert strategy.optimizer_step(optimizer, model, None).stepped
    assert strategy.unwrap_model(model) is plain
    assert plain(torch.ones(1, 4)).dtype == torch.float32
    assert [name for name, _ in strategy.named_tensors(model)] == ["weight", "bias"]


def test_bf16_agrees_with_float32_within_its_own_precision() -> None:
    """Three steps in bfloat16 stay within 2**-8 of float32, the relative precision of bfloat16 products."""
    losses = {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        strategy = training(bf16=bf16)
        plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        model, optimizer, _ = strategy.prepare((plain, strategy.create_optimizer(plain, lr=0.01), None))
        inputs = torch.linspace(-1, 1, 32).reshape(4, 8)
        losses[bf16] = []
        for _ in range(3):
            loss = (model(inputs).float() - 1).square().mean()
            losses[bf16].append(loss.item())
            strategy.backward(loss, model, optimizer)
            strategy.optimizer_step(optimizer, model, None)
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=2**-8 * 4)


def test_preparing_twice_changes_nothing() -> None:
    """A prepared model and a prepared triple come back as they are."""
    strategy = training(bf16=True)
    model = strategy.prepare(nn.Linear(2, 2))
    assert isinstance(model, AutocastModel)
    assert strategy.prepare(model) is model
    assert strategy.unwrap_model(strategy.unwrap_model(model)) is model.module
    trainable = strategy.prepare((model, torch.optim.SGD(model.parameters(), lr=0.1), None))
    assert strategy.prepare(trainable) == trainable


def test_a_wrapped_model_has_the_attributes_of_the_plain_one() -> None:
    """What the wrapper lacks is looked up in the model; what neither has is an AttributeError; copies work."""
    plain = nn.Sequential(nn.Linear(2, 2))
    plain.config = {"hidden": 2}
    model = wrap_autocast(plain)
    assert model.config == {"hidden": 2}
    assert copy.deepcopy(model).config == {"hidden": 2}
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing
    assert wrap_autocast(nn.Identity())(torch.ones(1)).item() == 1.0


def test_a_wrapped_model_passes_on_every_argument() -> None:
    """Arguments by position and by name reach the model's forward."""

    class Affine(nn.Module):
        def forward(self, values: torch.Tensor, *, shift: float = 0.0) -> torch.Tensor:
            return values + shift

    assert wrap_autocast(Affine())(torch.ones(1), shift=2.0).item() == 3.0


def test_bf16_is_bfloat16_whatever_torch_s_own_choice_is() -> None:
    """The forward computes in bfloat16 even if somebody set torch's autocast to float16."""
    model = wrap_autocast(nn.Linear(2, 2))
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        assert model(torch.ones(1, 2)).dtype == torch.bfloat16
    finally:
        torch.set_autocast_dtype("cpu", before)


def test_named_tensors_are_parameters_and_persistent_buffers() -> None:
    """Every parameter and persistent buffer comes under its plain name, a tied tensor under each, without copies."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2, bias=False)
            self.second = nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("kept", torch.ones(1))
            self.register_buffer("left_out", torch.ones(1), persistent=False)

        def get_extra_state(self) -> torch.Tensor:
            return torch.ones(1)

    model = Model()
    tensors = dict(named_tensors(model))
    assert list(tensors) == ["kept", "first.weight", "second.weight"]
    assert tensors["first.weight"].data_ptr() == tensors["second.weight"].data_ptr() == model.first.weight.data_ptr()
    assert not any(tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.992, 1.0])
def test_moving_average_is_the_weighted_mean(beta: float) -> None:
    """Every parameter moves to beta * average + (1 - beta) * model, exactly at both ends, and the model stays."""
    model, average = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    before, source = copy.deepcopy(average.state_dict()), copy.deepcopy(model.state_dict())
    training().moving_average(model, average, beta)
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, beta * before[name] + (1 - beta) * source[name], rtol=1e-14, atol=0)
        if beta in {0.0, 1.0}:
            assert torch.equal(value, (source if beta == 0.0 else before)[name])
        assert torch.equal(model.state_dict()[name], source[name])


def test_moving_average_sees_through_wrappers() -> None:
    """A model under autocast and a plain average have the same names."""
    strategy = training(bf16=True)
    plain = nn.Linear(2, 2)
    average = copy.deepcopy(plain)
    with torch.no_grad():
        plain.weight.add_(1.0)
    strategy.moving_average(strategy.prepare(plain), average, 0.0)
    assert torch.equal(average.weight, plain.weight)


def test_averages_of_another_model_are_refused() -> None:
    """A beta out of range, other names and other shapes are errors that name what differs."""
    strategy = training()
    with pytest.raises(ConfigError, match=r"beta=1.5"):
        strategy.moving_average(nn.Linear(1, 1), nn.Linear(1, 1), 1.5)
    with pytest.raises(ConfigError, match="model_ema=Linear differs from the model in 'bias' and 0 other"):
        strategy.moving_average(nn.Linear(1, 1), nn.Linear(1, 1, bias=False))
    with pytest.raises(ConfigError, match="'weight'"):
        strategy.moving_average(nn.Linear(2, 1), nn.Linear(1, 1))


def test_init_model_context_builds_the_same_model() -> None:
    """Models built inside the context, for later weights or not, are those built outside."""
    models = []
    for meta_init in (False, True):
        torch.manual_seed(0)
        with training().init_model_context(meta_init=meta_init):
            models.append(nn.Linear(2, 2))
    torch.manual_seed(0)
    assert all(torch.equal(model.weight, nn.Linear(2, 2).weight) for model in models[:1])
    assert torch.equal(models[0].weight, models[1].weight)


def numbers(loader: object) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def test_dataloaders_are_permutations_that_resume() -> None:
    """An epoch shows every sample once, in an order of the seed; a saved position continues with the next batch."""
    dataset = TensorDataset(torch.arange(10))
    strategy = training(seed=5)
    loader = strategy.setup_dataloader(dataset, 2)
    assert isinstance(loader.sampler, ResumableSampler)
    epochs = [numbers(loader), numbers(loader)]
    assert [sorted(functools.reduce(operator.iadd, epoch, [])) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    first = strategy.setup_dataloader(dataset, 2)
    batches = iter(first)
    assert [next(batches)[0].tolist() for _ in range(2)] == epochs[0][:2]
    resumed = strategy.setup_dataloader(dataset, 2)
    resumed.sampler.load_state_dict(json.loads(json.dumps(first.sampler.state_dict())))
    assert numbers(resumed) == epochs[0][2:]


def test_the_order_of_samples_is_a_function_of_the_seed() -> None:
    """Equal seeds give one order and others another."""
    dataset = TensorDataset(torch.arange(20))
    orders = [numbers(training(seed=seed).setup_dataloader(dataset, 2)) for seed in (5, 5, 6)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_share_the_samples_out(shuffle: bool) -> None:
    """The loaders of all ranks show each sample once between them, in as many batches."""
    dataset = TensorDataset(torch.arange(12))
    parts = [
        numbers(build_setup_dataloader(seed=5, rank=rank, world_size=3)(dataset, 2, shuffle=shuffle))
        for rank in range(3)
    ]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert sorted(number for part in parts for batch in part for number in batch) == list(range(12))


def test_dataloaders_take_torch_s_choices() -> None:
    """Without shuffle the order is the dataset's; drop_last and collate_fn do what they do in torch."""
    dataset = TensorDataset(torch.arange(5))
    strategy = training()
    assert numbers(strategy.setup_dataloader(dataset, 2, shuffle=False)) == [[0, 1], [2, 3]]
    assert numbers(strategy.setup_dataloader(dataset, 2, shuffle=False, drop_last=False)) == [[0, 1], [2, 3], [4]]
    assert list(strategy.setup_dataloader(dataset, 5, collate_fn=len)) == [5]


def test_iterating_a_loader_draws_nothing_from_the_global_stream() -> None:
    """A resumed run that iterates its loader once more has the random stream of the uninterrupted one."""
    loader = training().setup_dataloader(TensorDataset(torch.arange(4)), 2)
    before = torch.get_rng_state()
    numbers(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_datasets_without_a_batch_are_refused() -> None:
    """A dataset without a length, and one that is smaller than a batch that must be full, are errors."""

    class Stream(IterableDataset):
        def __iter__(self) -> object:
            return iter(())

    strategy = training()
    with pytest.raises(ConfigError, match="Stream has no length"):
        strategy.setup_dataloader(Stream(), 1)
    with pytest.raises(ConfigError, match="needs 4 samples and the dataset has 3"):
        strategy.setup_dataloader(TensorDataset(torch.arange(3)), 4)
    with pytest.raises(ConfigError, match="needs 1 samples and the dataset has 0"):
        strategy.setup_dataloader(TensorDataset(torch.arange(0)), 4, drop_last=False)


def test_offload_and_reload_change_no_bit() -> None:
    """Moving a model and its optimizer away and back leaves every bit, and training goes on."""
    strategy = training()
    model = nn.Linear(2, 2)
    optimizer = strategy.create_optimizer(model)
    for _ in range(2):
        strategy.backward(model(torch.ones(1, 2)).sum(), model, optimizer)
        assert strategy.optimizer_step(optimizer, model, None).stepped
        bits = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        strategy.offload(model, optimizer)
        strategy.offload(model, optimizer)
        strategy.reload(model, optimizer)
        assert all(torch.equal(bits[0][name], value) for name, value in model.state_dict().items())
        for number, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(bits[1][number][key], value) for key, value in state.items())


def test_optimizer_state_moves_with_the_kernel_s_needs() -> None:
    """Step counts move for fused optimizers and stay on the host for others, as in torch; other state moves."""
    for fused in (True, False):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.state[model.weight]["note"] = "not a tensor"
        move_handles((optimizer,), "meta")  # every machine has it
        state = optimizer.state[model.weight]
        assert state["exp_avg"].device.type == "meta"
        assert state["step"].device.type == ("meta" if fused else "cpu")
        assert state["note"] == "not a tensor"


def test_models_move_where_they_are_told() -> None:
    """A model's parameters, buffers and gradients are on the device that was named."""
    model = nn.BatchNorm1d(2)
    model(torch.ones(3, 2)).sum().backward()
    move_handles((model,), "meta")
    for tensor in (*model.parameters(), *model.buffers(), model.weight.grad):
        assert tensor.device.type == "meta"


def test_step_counts_of_capturable_optimizers_move() -> None:
    """A capturable kernel reads its step counts on the device, so they move with the rest of the state."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["capturable"] = True  # torch itself would ask for a CUDA device to step
    move_handles((optimizer,), "meta")
    assert optimizer.state[model.weight]["step"].device.type == "meta"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CUDA device tensors are allocated there")
def test_without_a_device_nothing_is_allocated_on_it() -> None:
    """A process without a CUDA device reports no bytes there."""
    report = training().report_memory()
    assert (report.allocated, report.peak_allocated) == (0, 0)


def test_memory_reports_follow_allocations(tmp_path: Path) -> None:
    """A report carries its label, and the resident bytes grow with a large tensor that is written to."""
    strategy = training()
    gc.collect()
    before = strategy.report_memory("before")
    block = torch.ones(64 * 2**20 // 4)
    after = strategy.report_memory()
    assert (before.label, after.label) == ("before", "")
    assert after.resident - before.resident > 32 * 2**20
    assert block.sum() > 0
    assert before.peak_allocated >= before.allocated >= 0
    assert _resident_bytes(tmp_path / "no such file") >= after.resident // 2
