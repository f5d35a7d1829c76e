"""Checkpoints that other programs write, made by them: raw `fully_shard` with DCP, and raw DeepSpeed engines.

Run by test_foreign.py as `foreign_programs.py DIRECTORY RANK WORLD_SIZE`, one process a rank. Beside each checkpoint
stands `NAME.safetensors`, which holds what the live objects held, by the means of those programs and by none of ours.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightrft.backends.zero.package import import_deepspeed

NUM_STEPS = 2


class Tiny(nn.Module):
    """A tied, a frozen and a 0-d parameter, a buffer, and dims that two ranks do not divide."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.narrow = nn.Linear(5, 1)
        self.frozen = nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(2**40 + seed))
        self.register_buffer("transient", torch.randn(2), persistent=False)

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        hidden_TH = self.embed(tokens_T)
        for block in self.blocks:
            hidden_TH = hidden_TH + torch.tanh(block(hidden_TH))
        mixed = self.narrow(hidden_TH).mean() + (hidden_TH @ self.frozen.to(hidden_TH.dtype)).mean()
        return self.head(hidden_TH).square().mean() + mixed


def adamw(model: nn.Module, *, grouping: str = "two") -> torch.optim.AdamW:
    """Over one group, two groups, or two groups of parameters with their names."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    both = [[each for each in trained if (each[1].dim() >= 2) == is_wide] for is_wide in (True, False)]
    groups: dict[str, list[dict[str, Any]]] = {
        "one": [{"params": [parameter for _, parameter in trained]}],
        "two": [
            {"params": [p for _, p in of], "weight_decay": decay} for of, decay in zip(both, (0.1, 0.0), strict=True)
        ],
        "named": [{"params": of, "weight_decay": decay} for of, decay in zip(both, (0.1, 0.0), strict=True)],
    }
    return torch.optim.AdamW(groups[grouping], lr=1e-2, betas=(0.8, 0.9), eps=1e-7)


def tokens_of(rank: int, step: int) -> torch.Tensor:
    return torch.randint(7, (4,), generator=torch.Generator().manual_seed(10 * step + rank))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone().contiguous()


def write_dcp(directory: Path, rank: int, world_size: int) -> None:
    """Raw `fully_shard`: model and optimizer nested, the same flat, and the model alone at the outermost."""
    model = Tiny(seed=1)
    if world_size > 1:
        mesh = init_device_mesh("cpu", (world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = adamw(model)
    for step in range(NUM_STEPS):
        model(tokens_of(rank, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    of_model, of_optimizer = get_state_dict(model, optimizer)
    flat = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))[1]
    numbered: dict[str, Any] = optimizer.state_dict()
    dcp.save({"model": of_model, "optimizer": of_optimizer, "epoch": 3}, checkpoint_id=directory / "dcp-nested")
    dcp.save({"app": {"model": of_model, "optim": flat}}, checkpoint_id=directory / "dcp-flat")
    dcp.save(of_model, checkpoint_id=directory / "dcp-alone")
    dcp.save({"actor": of_model, "critic": {"v.weight": torch.ones(2)}}, checkpoint_id=directory / "dcp-two")
    dcp.save({"model": of_model, "optimizer": numbered}, checkpoint_id=directory / "dcp-numbered")
    seen = {f"value.{name}": whole(tensor) for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            seen[f"{key}.{name}"] = whole(value)
    if rank == 0:
        save_file(seen, directory / "dcp.safetensors")


def write_deepspeed(
    directory: Path,
    rank: int,
    name: str,
    *,
    stage: int,
    dtype: str = "fp32",
    sums: str = "fp32",
    grouping: str = "two",
    is_frozen: bool = True,
    **zero: bool,
) -> None:
    """A raw engine of one stage, trained for some steps."""
    package: Any = import_deepspeed()
    model = Tiny(seed=2)
    model.frozen.requires_grad_(not is_frozen)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": dtype == "bf16"},
        "data_types": {"grad_accum_dtype": sums},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 40, **zero},
    }
    optimizer = adamw(model, grouping=grouping)
    engine, *_ = package.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    for step in range(NUM_STEPS):
        engine.backward(engine(tokens_of(rank, step)))
        engine.step()
    engine.save_checkpoint(str(directory / name), client_state={"epoch": 3, "note": "mine"})
    seen = {f"value.{key}": whole(buffer) for key, buffer in model.named_buffers() if key != "transient"}
    for key, parameter in model.named_parameters():
        with package.zero.GatheredParameters([parameter], enabled=stage == 3):
            seen[f"value.{key}"] = whole(parameter)
        if parameter.requires_grad and stage:
            seen |= stepped(engine, key, parameter)
        elif parameter.requires_grad and dtype == "fp32":
            seen |= {f"{kind}.{key}": whole(value) for kind, value in engine.optimizer.state[parameter].items()}
    if rank == 0:
        save_file(seen, directory / f"{name}.safetensors")
    engine.destroy()


def stepped(engine: Any, key: str, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What the optimizer of a stage above 0 has of a parameter, as DeepSpeed tells it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # it links the moments of all groups after the step of the first one, when the others have none
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    seen = {f"value.{key}": whole(safe_get_full_fp32_param(parameter)), f"step.{key}": torch.tensor(float(NUM_STEPS))}
    for kind in ("exp_avg", "exp_avg_sq"):
        seen[f"{kind}.{key}"] = whole(safe_get_full_optimizer_state(parameter, kind))
    return seen


def main(directory: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(directory / "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    write_dcp(directory, rank, world_size)
    for stage in range(4):
        write_deepspeed(directory, rank, f"zero{stage}", stage=stage, grouping="two" if stage else "named")
        write_deepspeed(directory, rank, f"zero{stage}-bf16", stage=stage, dtype="bf16", sums="bf16")
    write_deepspeed(directory, rank, "zero0-ordered", stage=0, grouping="one", is_frozen=False)
    write_deepspeed(directory, rank, "zero0-unnamed", stage=0)
    write_deepspeed(directory, rank, "zero1-sums", stage=1, dtype="bf16")
    write_deepspeed(directory, rank, "zero2-robin", stage=2, round_robin_gradients=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
