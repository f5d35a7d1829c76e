"""What loading does in its two passes: all is checked on all ranks, and only then read to where it belongs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

from lightrft.backends.checkpointing.access import ModelState, StateAccess, StoredTensor
from lightrft.backends.checkpointing.canonical import CheckpointFunctions, build_checkpointing
from lightrft.backends.checkpointing.live import build_live_access
from lightrft.backends.collectives.single import build_collectives
from lightrft.errors import CheckpointError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.training import Trainable

Make = Callable[..., Trainable]
Train = Callable[[Trainable, int], list[float]]
Snapshot = Callable[[Trainable], dict[str, object]]


def doing_after_the_first_write(action: Callable[[], None]) -> CheckpointFunctions:
    """Checkpoint functions that do something once the first tensor of a model was written."""
    access = build_live_access(lambda model: model)

    def model_state(model: nn.Module, *, owner: str) -> ModelState:
        state = access.model_state(model, owner=owner)

        def plan_tensor(name: str, saved: StoredTensor, *, source: str) -> Callable[[], None]:
            plan = state.plan_tensor(name, saved, source=source)

            def write() -> None:
                plan()
                if name == next(iter(state.tensors)):
                    action()

            return write

        return attrs.evolve(state, plan_tensor=plan_tensor)

    return functions_of(attrs.evolve(access, model_state=model_state))


def functions_of(access: StateAccess) -> CheckpointFunctions:
    return build_checkpointing(collectives=build_collectives(StrategyConfig(strategy="single")), access=access)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.model.safetensors", "model.optimizer.safetensors"])
def test_a_disk_that_fails_between_the_passes_leaves_a_state_that_is_said_to_be_incomplete(
    saved: Path, make_trainable: Make, train: Train, name: str
) -> None:
    """One line names the file and says that the state is neither the old nor the new one; loading again mends it."""
    path = saved / "step-00000002" / name
    content = path.read_bytes()
    live = make_trainable(5)
    train(live, 3)
    functions = doing_after_the_first_write(lambda: os.truncate(path, 8))
    with pytest.raises(CheckpointError) as caught:
        functions.load_ckpt(live, saved)
    assert f"reading of {path} failed (it ends early), and the live state is incomplete; load again" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    path.write_bytes(content)
    assert doing_after_the_first_write(lambda: None).load_ckpt(live, saved).step == 2


def test_an_exported_model_that_is_lost_while_it_is_loaded_is_one_clear_line(tmp_path: Path) -> None:
    """`load_model` says so, too."""
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    functions = doing_after_the_first_write(lambda: os.truncate(tmp_path / "model.safetensors", 8))
    functions.save_model(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"model.safetensors failed \(it ends early\), and the live state is inc"):
        functions.load_model(model, tmp_path)


def test_live_tensors_keep_their_memory(
    saved: Path, checkpointing: CheckpointFunctions, make_trainable: Make, train: Train
) -> None:
    """Parameters, gradients and moments are read to where they are: no rank holds a second copy of them."""
    live = make_trainable(5)
    train(live, 3)

    def places() -> dict[str, int]:
        model, optimizer, _ = live
        named = {f"{name}": tensor for name, tensor in model.named_parameters()}
        named |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        named |= {
            f"{key} of {name}": optimizer.state[p][key]
            for name, p in model.named_parameters()
            for key in ("exp_avg", "exp_avg_sq")
            if p in optimizer.state
        }
        return {name: tensor.data_ptr() for name, tensor in named.items()}

    before = places()
    checkpointing.load_ckpt(live, saved)
    assert places() == before
    assert {"embed.weight", "gradient of embed.weight", "exp_avg_sq of turned"} < before.keys()


@pytest.mark.parametrize("place", [9, -1], ids=["header", "values"])
def test_damage_is_named_before_what_does_not_fit(saved: Path, checkpointing: CheckpointFunctions, place: int) -> None:
    """Files are read into plans while they are verified, and what such a plan refuses counts only if they are whole."""
    path = saved / "step-00000002" / "model.model.safetensors"
    flip(path, place)
    model = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"model.model.safetensors is damaged: its SHA-256"):
        checkpointing.load_ckpt(model, saved)


def test_a_refusal_leaves_an_optimizer_without_state(
    saved: Path, checkpointing: CheckpointFunctions, make_trainable: Make, snapshot: Snapshot
) -> None:
    """State that was not there yet is read before all is verified, and is no state of the optimizer's until then."""
    live = make_trainable(5)
    before = snapshot(live)
    flip(saved / "step-00000002" / "model.optimizer.safetensors", -1)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpointing.load_ckpt(live, saved)
    assert not live.optimizer.state
    assert snapshot(live) == before


def test_a_load_over_anything_else_gives_the_same(
    saved: Path, checkpointing: CheckpointFunctions, make_trainable: Make, train: Train, snapshot: Snapshot
) -> None:
    """What is loaded does not depend on what was there: no state, other gradients, moments of another dtype."""
    fresh, trained, odd = make_trainable(5), make_trainable(6), make_trainable(7)
    train(trained, 4)
    train(odd, 3)
    for state in odd.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].double()
        state["more"] = torch.ones(3)
    seen = []
    for live in (fresh, trained, odd):
        checkpointing.load_ckpt(live, saved)
        seen.append(snapshot(live))
    assert seen[0] == seen[1] == seen[2]
