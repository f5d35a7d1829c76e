"""What the tests of sharded checkpoints run on every rank, on models of raw `fully_shard`."""

from __future__ import annotations

import math
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightrft.backends.checkpointing.canonical import CheckpointFunctions, build_checkpointing
from lightrft.backends.checkpointing.durable import write_file
from lightrft.backends.checkpointing.live import build_live_access
from lightrft.backends.checkpointing.sharded import stored_part
from lightrft.backends.checkpointing.stored import open_tensors, read_stored
from lightrft.backends.checkpointing.tensor_files import bytes_of, safetensors_chunks
from lightrft.errors import CheckpointError, UnsupportedError
from lightrft.strategy.protocols.training import Trainable
from lightrft.testing.subject import Rank


@attrs.frozen(kw_only=True)
class Job:
    """What one rank does: makes a model of `seed`, sharded or whole, and works with the directory."""

    directory: str
    is_sharded: bool
    seed: int = 0
    num_steps: int = 0
    num_tokens: int = 7
    disk_size: int = 0
    full_rank: int = 0
    num_replicas: int = 1


@attrs.frozen(kw_only=True)
class Seen:
    """Everything of one trained model, gathered by the test's own means, and the error of the call if it had one."""

    tensors: dict[str, Tensor]
    error: str = ""


class Tiny(nn.Module):
    """Tied, frozen, a buffer, dims that no world of two or three divides, and a bias of one element."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_tokens, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.narrow = nn.Linear(5, 1)
        self.frozen = nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.head = nn.Linear(5, num_tokens, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(2**40 + 1))

    def forward(self, tokens_T: Tensor) -> Tensor:
        hidden_TH = self.embed(tokens_T)
        for block in self.blocks:
            hidden_TH = torch.tanh(block(hidden_TH))
        return self.head(hidden_TH).square().mean() + self.narrow(hidden_TH).sum() + (hidden_TH @ self.frozen).mean()


def functions_of(rank: Rank) -> CheckpointFunctions:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    return build_checkpointing(collectives=strategy, access=build_live_access(lambda model: model))


def shard(model: nn.Module, blocks: list[nn.Module], world_size: int, num_replicas: int = 1) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    if num_replicas > 1:
        mesh = init_device_mesh(
            "cpu", (num_replicas, world_size // num_replicas), mesh_dim_names=("dp_replicate", "dp_shard")
        )
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def trainable_of(rank: Rank, job: Job) -> Trainable:
    torch.manual_seed(job.seed)
    model = Tiny(job.num_tokens)
    if job.is_sharded:
        shard(model, list(model.blocks), rank.world_size, job.num_replicas)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.dim() == 1]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    optimizer.param_groups[0]["micro_batches"] = 0
    trainable = Trainable(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    for step in range(job.num_steps):
        take_step(trainable, step)
    return trainable


def accumulate(trainable: Trainable, step: int) -> None:
    trainable.model(torch.tensor([step % 7, 3, 6, (2 * step) % 7])).backward()


def take_step(trainable: Trainable, step: int) -> None:
    accumulate(trainable, step)
    trainable.optimizer.step()
    trainable.optimizer.zero_grad()
    assert trainable.scheduler is not None
    trainable.scheduler.step()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def look(trainable: Trainable) -> dict[str, Tensor]:
    """Parameters, buffers and moments whole, this rank's gradients as they are, and the rates."""
    model, optimizer, _ = trainable
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    seen = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            seen[f"{key} of {name}"] = whole(value)
            assert isinstance(value, DTensor) == (isinstance(parameter, DTensor) and key != "step")
        if parameter.grad is not None:
            gradient = parameter.grad
            seen[f"gradient of {name}"] = gradient.to_local().clone() if isinstance(gradient, DTensor) else gradient
    seen["rates"] = torch.tensor([group["lr"] for group in optimizer.param_groups], dtype=torch.float64)
    seen["position"] = torch.tensor(optimizer.param_groups[0]["micro_batches"])
    return seen


def save(rank: Rank, job: Job) -> Seen:
    functions, trainable = functions_of(rank), trainable_of(rank, job)
    with torch.no_grad():
        trainable.model(torch.tensor([1]))  # leaves the root's parameters whole
    functions.save_ckpt({"actor": trainable}, job.directory)
    return Seen(tensors=look(trainable))


def load(rank: Rank, job: Job) -> Seen:
    functions, trainable = functions_of(rank), trainable_of(rank, job)
    before = look(trainable)
    try:
        functions.load_ckpt({"actor": trainable}, job.directory)
    except CheckpointError as error:
        after = look(trainable)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return Seen(tensors=after, error=str(error))
    return Seen(tensors=look(trainable))


def load_and_go_on(rank: Rank, job: Job) -> Seen:
    functions = functions_of(rank)
    trainable = trainable_of(rank, attrs.evolve(job, num_steps=0))
    functions.load_ckpt({"actor": trainable}, job.directory)
    for step in range(2, job.num_steps):
        take_step(trainable, step)
    return Seen(tensors=look(trainable))


def load_and_step(rank: Rank, job: Job) -> Seen:
    functions = functions_of(rank)
    trainable = trainable_of(rank, attrs.evolve(job, num_steps=0))
    functions.load_ckpt({"actor": trainable}, job.directory)
    take_step(trainable, 0)
    return Seen(tensors=look(trainable))


def train(rank: Rank, job: Job) -> Seen:
    functions_of(rank)
    return Seen(tensors=look(trainable_of(rank, job)))


def save_inside_a_window(rank: Rank, job: Job) -> Seen:
    functions, trainable = functions_of(rank), trainable_of(rank, job)
    accumulate(trainable, rank.rank)
    trainable.optimizer.param_groups[0]["micro_batches"] = 1
    functions.save_ckpt({"actor": trainable}, job.directory)
    return Seen(tensors=look(trainable))


def save_with_deferred_gradients(rank: Rank, job: Job) -> Seen:
    """The error of saving; loading an earlier checkpoint then drops the gradients that were put off."""
    functions, trainable = functions_of(rank), trainable_of(rank, job)
    assert isinstance(trainable.model, FSDPModule)
    functions.save_ckpt({"actor": trainable}, job.directory)
    trainable.model.set_requires_gradient_sync(False)
    accumulate(trainable, rank.rank)
    error = ""
    try:
        functions.save_ckpt({"actor": trainable}, job.directory)
    except CheckpointError as refused:
        error = str(refused)
    functions.load_ckpt({"actor": trainable}, job.directory)
    trainable.model.set_requires_gradient_sync(True)
    take_step(trainable, 0)
    return Seen(tensors=look(trainable), error=error)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes, for this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def save_on_a_full_disk(rank: Rank, job: Job) -> Seen:
    """The errors of both kinds of saving, and then what is saved where there is space."""
    functions, trainable = functions_of(rank), trainable_of(rank, job)
    errors: list[str] = []
    with files_of_at_most(job.disk_size if rank.rank == job.full_rank else 1 << 30):
        try:
            functions.save_ckpt({"actor": trainable}, job.directory)
        except CheckpointError as error:
            errors.append(str(error))
        try:
            functions.save_model(trainable.model, Path(job.directory) / "exported")
        except CheckpointError as error:
            errors.append(str(error))
    functions.save_ckpt({"actor": trainable}, job.directory)
    return Seen(tensors=look(trainable), error="\n".join(errors))


def parts_of_a_file(rank: Rank, job: Job) -> list[str]:
    """What of this rank's parts, in layouts of all kinds, is not read from a file as torch cuts it from the whole."""
    functions_of(rank)
    wrong: list[str] = []
    flat = init_device_mesh("cpu", (rank.world_size,))
    tall = init_device_mesh("cpu", (rank.world_size, 1), mesh_dim_names=("outer", "inner"))
    wide = init_device_mesh("cpu", (1, rank.world_size), mesh_dim_names=("outer", "inner"))
    layouts = [
        (flat, [Shard(0)]),
        (flat, [Replicate()]),
        (wide, [Replicate(), Shard(0)]),
        (wide, [Shard(0), Replicate()]),
        (wide, [Shard(0), Shard(0)]),
        (tall, [Shard(0), Shard(0)]),
        (tall, [Shard(0), Replicate()]),
    ]
    for number, shape in enumerate([(7, 4), (1, 2), (6, 3), (0, 5)]):
        path = Path(job.directory) / f"{number}-{rank.rank}"
        whole = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
        write_file(path, safetensors_chunks({"whole": whole}, [bytes_of(whole)]))
        with open_tensors(path) as tensors:
            for mesh, placements in layouts:
                live = distribute_tensor(torch.zeros(shape), mesh, placements)
                must = distribute_tensor(whole, mesh, placements).to_local()
                part = stored_part(tensors["whole"], live)
                rest = must.flatten()[must.numel() // 2 :]
                half = torch.zeros(rest.shape)
                part.copy_into(half, start=must.numel() // 2)
                if not (torch.equal(read_stored(part), must) and torch.equal(half, rest)):
                    wrong.append(f"{shape} as {placements}")
    return wrong


def save_columns(rank: Rank, job: Job) -> Seen:
    """The error of saving a model whose parts are columns."""
    functions, model = functions_of(rank), nn.Linear(4, 4, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (rank.world_size,)), shard_placement_fn=lambda _: Shard(1))
    try:
        functions.save_ckpt(model, job.directory)
    except UnsupportedError as error:
        return Seen(tensors={}, error=str(error))
    return Seen(tensors={})


def export_llama(rank: Rank, job: Job) -> Seen:
    """A small Llama with tied embeddings, exported, and read into one of another seed."""
    functions = functions_of(rank)
    models = [llama(seed, rank, is_sharded=job.is_sharded) for seed in (job.seed, job.seed + 1)]
    functions.save_model(models[0], job.directory)
    functions.load_model(models[1], job.directory)
    return Seen(tensors={name: whole(tensor) for name, tensor in models[1].state_dict().items()})


def llama(seed: int, rank: Rank, *, is_sharded: bool) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=6,
        intermediate_size=9,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model: nn.Module = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
    if is_sharded:
        shard(model, list(model.model.layers), rank.world_size)
    return model
