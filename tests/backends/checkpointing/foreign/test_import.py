"""Real checkpoints of raw torch and raw DeepSpeed become ours, bit for bit, and are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_programs import Tiny, adamw
from safetensors.torch import load_file

from lightrft.backends.checkpointing.canonical import CheckpointFunctions
from lightrft.backends.checkpointing.foreign.opening import open_foreign
from lightrft.backends.checkpointing.foreign.ties import tied_like
from lightrft.backends.checkpointing.foreign.writing import write_imported
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.training import Trainable

Sources = Callable[[int], Path]

WITH_OPTIMIZER = {
    "dcp-nested": "two",
    "dcp-flat": "two",
    "zero0": "named",
    "zero0-ordered": "one",
    **{f"zero{stage}": "two" for stage in (1, 2, 3)},
    **{f"zero{stage}-bf16": "two" for stage in (1, 2, 3)},
    "zero1-sums": "two",
    "zero2-robin": "two",
}
"""How the optimizer of each was given its parameters."""
WITHOUT_OPTIMIZER = ("dcp-alone", "dcp-two", "dcp-numbered", "zero0-unnamed", "zero0-bf16")


def imported(source: Path, target: Path) -> list[str]:
    """Import a source, and return what was said to be missing."""
    with open_foreign(source, name="actor") as opened:
        # files of DCP hold a tied tensor under each of its names
        found = tied_like(opened, Tiny(seed=0)) if opened.kind == "torch-dcp" else opened
        write_imported(found, target, step=found.step or 0, name="actor")
        return [*found.notes]


def expected(source: Path) -> dict[str, torch.Tensor]:
    # of round-robin gradients DeepSpeed itself tells the elements of other parameters; the training is that of "zero2"
    name = "dcp" if source.name.startswith("dcp") else source.name.removesuffix("-robin")
    seen = load_file(source.parent / f"{name}.safetensors")
    if (
        "exp_avg.embed.weight" in seen
    ):  # an engine of 16 bits rounds what is not stepped, too, and a model has one dtype
        seen["value.frozen"] = seen["value.frozen"].float()
    return seen


def state_of(trainable: Trainable) -> dict[str, torch.Tensor]:
    state = {f"value.{name}": tensor for name, tensor in trainable.model.state_dict().items()}
    for name, parameter in trainable.model.named_parameters():
        for key, value in trainable.optimizer.state.get(parameter, {}).items():
            state[f"{key}.{name}"] = value
    return state


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


@pytest.mark.parametrize("name", WITH_OPTIMIZER)
@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_and_moments_are_those_of_the_source(
    sources: Sources, checkpointing: CheckpointFunctions, tmp_path: Path, world_size: int, name: str
) -> None:
    """What `load_ckpt` gives a model and an optimizer is what the source's own objects had, hyperparameters too."""
    source = sources(world_size) / name
    imported(source, tmp_path)
    model = Tiny(seed=9)
    model.frozen.requires_grad_(name == "zero0-ordered")
    optimizer = adamw(model, grouping=WITH_OPTIMIZER[name])
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 7.0
    trainable = Trainable(model, optimizer, None)
    checkpointing.load_ckpt({"actor": trainable}, tmp_path)
    state = state_of(trainable)
    wanted = expected(source)
    assert {key for key in wanted if not same(wanted[key], state[key])} == set()
    assert wanted.keys() | {"value.head.weight"} == state.keys()
    assert model.head.weight is model.embed.weight
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == ([0.01] if WITH_OPTIMIZER[name] == "one" else [0.1, 0.0])
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}


@pytest.mark.parametrize("name", WITHOUT_OPTIMIZER)
def test_a_source_whose_moments_have_no_names_gives_its_weights(
    sources: Sources, checkpointing: CheckpointFunctions, tmp_path: Path, name: str
) -> None:
    """What is missing is said, and the weights are there."""
    source = sources(2) / name
    notes = imported(source, tmp_path)
    assert any(note.startswith("missing: the optimizer") for note in notes), notes
    model = Tiny(seed=9)
    wanted = {key: value for key, value in expected(source).items() if key.startswith("value.")}
    if name == "zero0-bf16":
        model.bfloat16()
    checkpointing.load_ckpt({"actor": model}, tmp_path)
    state = {f"value.{key}": value for key, value in model.state_dict().items()}
    assert all(same(wanted[key], state[key]) for key in wanted)


def test_the_step_is_that_of_deepspeed(sources: Sources, checkpointing: CheckpointFunctions, tmp_path: Path) -> None:
    """Both steps that were trained are counted."""
    imported(sources(1) / "zero2", tmp_path)
    assert checkpointing.latest_ckpt(tmp_path) == 2


def test_streams_stay_those_that_ranks_were_set_up_with(
    sources: Sources, checkpointing: CheckpointFunctions, tmp_path: Path
) -> None:
    """An imported checkpoint has no random streams, so loading moves none."""
    imported(sources(1) / "zero1", tmp_path)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    model = Tiny(seed=9)
    torch.manual_seed(5)
    with pytest.raises(CheckpointError, match="optimizer"):  # the call must have what was saved
        checkpointing.load_ckpt({"actor": model}, tmp_path)
    checkpointing.load_ckpt({"actor": Trainable(model, adamw(model), None)}, tmp_path)
    assert torch.equal(torch.rand(3), wanted)


def test_what_a_nest_holds_besides_is_named(sources: Sources, tmp_path: Path) -> None:
    """A second model and a value that are left out are told, and the second one can be asked for."""
    with open_foreign(sources(2) / "dcp-two", name="critic") as found:
        assert [*found.tensors] == ["v.weight"]
        assert "left out: actor, 10 tensors." in found.notes
    assert "left out: epoch, no tensor." in imported(sources(2) / "dcp-nested", tmp_path)


def test_a_model_that_ties_is_not_what_does_not(sources: Sources) -> None:
    """Tensors that differ are not tied into one, and other names or shapes are refused."""
    model = Tiny(seed=0)
    model.narrow.weight = torch.nn.Parameter(torch.ones(2, 5))
    with (
        open_foreign(sources(1) / "dcp-alone", name="actor") as found,
        pytest.raises(CheckpointError, match=r"narrow\.weight"),
    ):
        tied_like(found, model)
    model = Tiny(seed=0)
    model.blocks[1].weight = model.blocks[0].weight
    with (
        open_foreign(sources(1) / "dcp-alone", name="actor") as found,
        pytest.raises(CheckpointError, match=r"blocks\.1\.weight and blocks\.0\.weight differ"),
    ):
        tied_like(found, model)
