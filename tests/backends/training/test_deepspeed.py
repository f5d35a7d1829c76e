"""Tests of lightrft.backends.training.deepspeed: every stage on real ranks, beside a loop of raw torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lightrft.backends.training.clipping import NO_GRADIENT
from lightrft.backends.training.zero.settings import zero_settings
from lightrft.errors import MissingPackageError, UnsupportedError
from lightrft.strategy.build import get_strategy
from lightrft.strategy.config import StrategyConfig
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.subject import RunOnRanks, subject_of

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    """The module of programs, found by its name here and in the workers."""
    sys.path.insert(0, str(Path(__file__).parent))
    yield import_module("deepspeed_programs")
    sys.path.remove(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def run(programs: ModuleType, spawn: SpawnRank) -> Iterator[RunOnRanks]:  # noqa: ARG001 (workers find them by name)
    """Two ranks."""
    with processes(subject_of("deepspeed", "strategy"), 2, timeout=90.0, spawn=spawn) as run_on_ranks:
        yield run_on_ranks


def require_close(seen: list[Any], must: Any) -> None:
    for one in seen:
        torch.testing.assert_close(one.losses, must.losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.norms, must.norms, rtol=1e-5, atol=1e-6)
        assert one.rates == pytest.approx(must.rates, rel=1e-9)
        assert list(one.tensors) == list(must.tensors)
        torch.testing.assert_close(one.tensors, dict(must.tensors), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_makes_the_steps_of_raw_torch(stage: int, run: RunOnRanks, programs: ModuleType) -> None:
    """On two ranks that begin with other weights, losses, norms, rates and parameters are those of one process."""
    case = programs.Case(stage=stage)
    require_close(run(programs.train, case), programs.expected(case, 2))


@pytest.mark.parametrize("world_size", [1, 3])
def test_any_number_of_ranks_makes_the_steps_of_raw_torch(
    world_size: int, programs: ModuleType, spawn: SpawnRank
) -> None:
    """So it is with one rank and with three, which no parameter can be divided by."""
    with processes(subject_of("deepspeed", "strategy"), world_size, timeout=90.0, spawn=spawn) as run_on_ranks:
        for stage in STAGES:
            case = programs.Case(stage=stage, is_told=False)
            require_close(run_on_ranks(programs.train, case), programs.expected(case, world_size))


def test_small_parameters_that_stay_whole_are_stepped_too(run: RunOnRanks, programs: ModuleType) -> None:
    """Stage 3 with a threshold above every size, and without a bound on the norm."""
    case = programs.Case(stage=3, threshold=1000, max_norm=0.0)
    require_close(run(programs.train, case), programs.expected(case, 2))


@pytest.mark.parametrize("stage", [0, 1])
def test_ranks_may_reach_different_parameters(stage: int, run: RunOnRanks, programs: ModuleType) -> None:
    """In stages 0 and 1 the samples of each rank may reach an expert of their own."""
    case = programs.Case(stage=stage, experts=(0, 1))
    require_close(run(programs.train, case), programs.expected(case, 2))


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_that_would_be_mixed_up_are_refused(stage: int, run: RunOnRanks, programs: ModuleType) -> None:
    """An expert's gradient would be taken for that of another rank's; the next window is sound."""
    for one in run(programs.mix, programs.Case(stage=stage, threshold=1000)):
        assert one.words["own"].startswith(f"zero_stage={stage} exchanges gradients as they come")
        assert one.words["all"] == "True"


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_is_named_alike(stage: int, run: RunOnRanks, programs: ModuleType) -> None:
    """Every rank skips with the name of the parameter that is at fault on one of them, and nothing is printed."""
    seen = run(programs.skip, programs.Case(stage=stage))
    assert [one.words["stepped"] for one in seen] == ["False", "False"]
    assert len({one.words["reason"] for one in seen}) == 1
    assert "'scale' is at fault" in seen[0].words["reason"]
    assert [one.words["printed"] for one in seen] == ["", ""]


@pytest.mark.parametrize("threshold", [0, 1000])
@pytest.mark.parametrize("stage", [1, 3])
def test_averages_and_plain_copies_are_whole(stage: int, threshold: int, run: RunOnRanks, programs: ModuleType) -> None:
    """An average of shards is the average; a plain copy is of the model's own class, tied as it is."""
    model, average = programs.new_model(0), programs.new_model(1)
    must = {name: tensor.detach() for name, tensor in average.state_dict().items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        must[name] = 0.75 * must[name] + 0.25 * parameter.detach()
    average.load_state_dict(must)
    for one in run(programs.average_and_copy, programs.Case(stage=stage, threshold=threshold)):
        parts = {
            prefix: {name.removeprefix(f"{prefix}."): each for name, each in one.tensors.items() if prefix in name}
            for prefix in ("average", "plain", "copy")
        }
        torch.testing.assert_close(parts["average"], must)
        torch.testing.assert_close(parts["plain"], must)
        torch.testing.assert_close(parts["copy"], dict(model.state_dict()), rtol=0, atol=0)
        torch.testing.assert_close(one.tensors["forward"], average(programs.batch(0, 0, 0)).detach())
        assert one.words == {"type": "Model", "tied": "True"}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_one_stage_saved_goes_on_in_every_other(stage: int, run: RunOnRanks, programs: ModuleType) -> None:
    """Parameters, the optimizer's state and the schedule are those of the plain model, whatever wrote them."""
    for one in run(programs.resume, programs.Case(stage=stage)):
        parts = {
            prefix: {
                name.removeprefix(f"{prefix}."): each for name, each in one.tensors.items() if name[0] == prefix[0]
            }
            for prefix in ("saved", "0", "1", "2", "3")
        }
        for other in "0123":
            torch.testing.assert_close(parts[other], parts["saved"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts[str(stage)], parts["saved"], rtol=0, atol=0)


def test_what_cannot_be_done_is_refused(run: RunOnRanks, programs: ModuleType) -> None:
    """Optimizers that step whole tensors, have state or are of another model, and dtypes that shards lack."""
    for one in run(programs.refuse, programs.Case(stage=1)):
        assert one.words["of another model"].startswith("ConfigError: optimizer=SGD holds a parameter of shape")
        assert one.words["whole tensors"].startswith("UnsupportedError: optimizer=Muon steps whole tensors")
        assert one.words["double"].startswith("UnsupportedError: zero_stage=1 steps float32 parameters, and 'weight'")
        assert one.words["prepared already"].startswith("ConfigError: optimizer=AdamW is not the one that this model")
        assert one.words["shared"].startswith("UnsupportedError: parameter '0.scale' of Sequential is that of")
        assert one.words["state"].startswith("UnsupportedError: optimizer=AdamW has state already")
        assert one.words["no optimizer"].startswith("StepError: model=Model was not prepared with an optimizer")
        assert one.words["other optimizer"].startswith("StepError: optimizer=AdamW is not the one")


def test_a_missing_package_is_named_when_the_strategy_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the command that installs it."""
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(
        MissingPackageError, match=r"'deepspeed' is not installed .*pip install 'lightrft\[deepspeed\]'"
    ):
        get_strategy(StrategyConfig(strategy="deepspeed"))


PROGRAM = """
import sys, torch
from lightrft.strategy.build import get_strategy
loaded = "deepspeed" in sys.modules
for stage in (2, 3):
    strategy = get_strategy({"strategy": "deepspeed", "zero_stage": stage})
    assert stage == 3 or loaded == ("deepspeed" in sys.modules)
    model = torch.nn.Linear(2, 1)
    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model), None))
    strategy.backward(model(torch.ones(1, 2)).sum(), model, optimizer)
    assert strategy.optimizer_step(optimizer, model, None).stepped
    strategy.teardown()
print("done")
"""


def test_a_plain_process_prints_its_own_words_alone() -> None:
    """Without a launcher it trains, tears down and trains again; standard output is the program's."""
    done = subprocess.run(  # noqa: S603 (our own program)
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_nothing_is_compiled_where_the_package_was_imported_before(tmp_path: Path) -> None:
    """A killed compiler's lock would make later runs wait; who imports DeepSpeed first changes nothing about it."""
    done = subprocess.run(  # noqa: S603 (our own program)
        [sys.executable, "-c", f"import deepspeed\n{PROGRAM}"],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_window_that_reaches_nothing_is_refused(run: RunOnRanks, programs: ModuleType) -> None:
    """In stage 3, on every rank, in the words that other strategies have, and no decay moves anything."""
    for one in run(programs.reach_nothing, programs.Case(stage=3)):
        assert one.words == {"moved": "nothing", "error": NO_GRADIENT}


def test_second_copies_of_shards_are_those_of_the_shards(run: RunOnRanks, programs: ModuleType) -> None:
    """With hpZ, trained and averaged models beside one another make the steps of raw torch, and compute as they are."""
    case = programs.Case(stage=3, hpz=2)
    require_close(run(programs.train, case), programs.expected(case, 2))
    for one in run(programs.copy_shards, case):
        assert torch.equal(one.tensors["loaded"], one.tensors["saved"])
        assert torch.equal(one.tensors["averaged"], one.tensors["stepped"])
        assert not torch.equal(one.tensors["stepped"], one.tensors["saved"])


@pytest.mark.parametrize(
    "settings", [{"zero_hpz": 2}, {"zero_offload_param": True}, {"zero_stage": 0, "zero_offload_optimizer": True}]
)
def test_settings_of_another_stage_are_refused(settings: dict[str, object]) -> None:
    """What a stage would pass over is said while the strategy is built."""
    with pytest.raises(UnsupportedError, match=rf"{list(settings)[-1]}=\S+ does nothing in zero_stage="):
        get_strategy({"strategy": "deepspeed", **settings})


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_layers_compute_in_bfloat16_inside_of_an_engine(stage: int) -> None:
    """Also where torch says that there is an autocast already, as it says on CUDA alone."""
    strategy = get_strategy({"strategy": "deepspeed", "zero_stage": stage, "bf16": True})
    torch.set_autocast_enabled("cuda", True)  # type: ignore[no-untyped-call]  # so in torch
    try:
        model = nn.Linear(4, 4)
        model, *_ = strategy.prepare((model, strategy.create_optimizer(model), None))
        assert model(torch.ones(1, 4)).dtype == torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", False)  # type: ignore[no-untyped-call]  # as above
        strategy.teardown()


def test_the_settings_of_a_cpu_move_nothing() -> None:
    """What is offloaded or overlapped on CUDA is not asked for on a CPU, and buffers hold no more than the model."""
    config = StrategyConfig(zero_offload_optimizer=True, zero_offload_param=True, zero_hpz=2, max_norm=0.25)

    def zero(stage: int, *, on_cpu: bool) -> dict[str, object]:
        made = zero_settings(config, stage=stage, num_elements=7, world_size=4, on_cpu=on_cpu, is_trained=True)
        found = made["zero_optimization"]
        assert isinstance(found, dict)
        return {**found, "clip": made["gradient_clipping"]}

    assert zero(0, on_cpu=True) == {"stage": 0, "clip": 0.0}
    cpu, cuda = zero(2, on_cpu=True), zero(2, on_cpu=False)
    assert (cpu["overlap_comm"], cpu["reduce_bucket_size"], cpu["compute_grad_norm"], cpu["clip"]) == (
        False,
        8,
        False,
        0,
    )
    assert "offload_optimizer" not in cpu
    assert (cuda["overlap_comm"], cuda["compute_grad_norm"], cuda["clip"]) == (True, True, 0.25)
    assert cuda["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" in zero(3, on_cpu=False)
    assert zero(3, on_cpu=True)["zero_hpz_partition_size"] == 2
