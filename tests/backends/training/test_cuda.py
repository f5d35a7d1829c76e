"""Training and collectives on one CUDA device over NCCL, held against a loop of raw torch on the same device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lightrft.strategy.build import get_strategy
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.record import Strategy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SETTINGS: dict[str, dict[str, Any]] = {
    "single": {"strategy": "single"},
    "fsdp2": {"strategy": "fsdp2", "fsdp_wrap": ["Linear"]},
    "fsdp2 in main memory": {"strategy": "fsdp2", "fsdp_wrap": ["Linear"], "fsdp_cpu_offload": True},
    "stage 0": {"strategy": "deepspeed", "zero_stage": 0},
    "stage 1": {"strategy": "deepspeed", "zero_stage": 1},
    "stage 2": {"strategy": "deepspeed", "zero_stage": 2},
    "stage 2, state in main memory": {"strategy": "deepspeed", "zero_stage": 2, "zero_offload_optimizer": True},
    "stage 3": {"strategy": "deepspeed", "zero_stage": 3, "zero_persistence_threshold": 0},
    "stage 3, shards in main memory": {
        "strategy": "deepspeed",
        "zero_stage": 3,
        "zero_persistence_threshold": 0,
        "zero_offload_optimizer": True,
        "zero_offload_param": True,
    },
}
MAX_NORM, NUM_STEPS, MICRO_BATCHES, LR = 0.1, 4, 2, 0.01


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(17, 32), nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 17))


def ids_of(step: int, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + micro_batch)
    return torch.randint(0, 17, (4, 6), generator=generator).cuda()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = cast("Tensor", model(ids))
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.roll(1, 1).flatten())


def raw(*, bf16: bool) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train in raw torch; return losses, norms and parameters."""
    model = build().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        for micro_batch in range(MICRO_BATCHES):
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16):
                loss = loss_of(model, ids_of(step, micro_batch))
            (loss / MICRO_BATCHES).backward()
            losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
    return losses, norms, {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}


@pytest.fixture
def strategy(request: pytest.FixtureRequest) -> Iterator[Strategy]:
    settings = {
        "max_norm": MAX_NORM,
        "micro_train_batch_size": 4,
        "train_batch_size": 4 * MICRO_BATCHES,
        **cast("dict[str, object]", request.param),
    }
    strategy = get_strategy(StrategyConfig.from_mapping(settings))
    strategy.setup_distributed()
    yield strategy
    strategy.teardown()


@pytest.mark.parametrize(
    ("strategy", "bf16"),
    [
        pytest.param({**settings, "bf16": bf16}, bf16, id=f"{name}, {'bf16' if bf16 else 'fp32'}")
        for name, settings in SETTINGS.items()
        for bf16 in (False, True)
    ],
    indirect=["strategy"],
)
def test_training_is_that_of_raw_torch(strategy: Strategy, bf16: bool) -> None:
    """Losses, norms and parameters are those of a raw loop, and the parameters stay float32."""
    model = build()
    trainable = strategy.prepare((model, strategy.create_optimizer(model, lr=LR), None))
    losses, norms = [], []
    for step in range(NUM_STEPS):
        for micro_batch in range(MICRO_BATCHES):
            loss = loss_of(trainable.model, ids_of(step, micro_batch))
            losses.append(loss.item())
            strategy.backward(loss, trainable.model, trainable.optimizer)
            result = strategy.optimizer_step(trainable.optimizer, trainable.model, trainable.scheduler)
        norms.append(result.grad_norm)
    # bf16 has 8 bits, and a layer that casts its shards rounds elsewhere than autocast does
    close = 2e-2 if bf16 else 1e-5
    must_losses, must_norms, must_tensors = raw(bf16=bf16)
    assert losses == pytest.approx(must_losses, rel=close)
    assert norms == pytest.approx(must_norms, rel=10 * close)
    for name, tensor in strategy.named_tensors(trainable.model):
        assert tensor.dtype == torch.float32
        # by the norm, because AdamW makes a whole step of the sign of what is nearly 0
        assert (tensor.cpu() - must_tensors[name]).norm() <= close * must_tensors[name].norm(), name


@pytest.mark.parametrize("strategy", [{"strategy": "fsdp2"}], indirect=True)
def test_collectives_are_those_of_nccl(strategy: Strategy) -> None:
    """Tensors on the device stay there, with their dtype; what is in main memory stays in main memory."""
    assert strategy.setup_distributed().device.startswith("cuda")
    assert "nccl" in str(torch.distributed.get_backend_config())
    for device in ("cuda", "cpu"):
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            tensor = torch.tensor([1, 0, 1], dtype=dtype, device=device)
            found = strategy.all_reduce({"tensor": tensor}, op="max")["tensor"]
            assert (found.device.type, found.dtype) == (device, dtype)
            assert torch.equal(found, tensor)
            assert torch.equal(strategy.all_gather(tensor), tensor)


ON_DEVICE = {name: settings for name, settings in SETTINGS.items() if "main memory" not in name}


@pytest.mark.parametrize("strategy", ON_DEVICE.values(), ids=ON_DEVICE, indirect=True)
def test_offload_frees_the_device_and_reload_changes_no_bit(strategy: Strategy) -> None:
    """Most of what the model and its optimizer hold on the device is given back, and comes again."""
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(4)))
    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model), None))
    strategy.backward(model(torch.ones(1, 1024, device="cuda")).sum(), model, optimizer, is_boundary=True)
    strategy.optimizer_step(optimizer, model, None, is_boundary=True)
    before = {name: tensor.cpu().clone() for name, tensor in strategy.named_tensors(model)}
    held = strategy.report_memory().allocated
    strategy.offload(model, optimizer)
    freed = held - strategy.report_memory().allocated
    strategy.reload(model, optimizer)
    assert freed >= held // 2
    for name, tensor in strategy.named_tensors(model):
        assert torch.equal(tensor.cpu(), before[name]), name
