"""What the tests of adapters run on every rank of a pool of processes, and the loop of raw torch beside it."""

from __future__ import annotations

from typing import cast

import attrs
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightrft.testing.subject import Rank

VOCABULARY, LENGTH, MAX_NORM = 19, 6, 0.1


@attrs.frozen(kw_only=True)
class Case:
    """A training.

    Attributes:
        num_steps: windows of one micro-batch.
    """

    num_steps: int = 3


@attrs.frozen(kw_only=True)
class Seen:
    """What one rank saw: losses and norms by step, what learns, what the optimizer holds, and all tensors.

    Attributes:
        losses: by step, of this rank's samples.
        norms: by step.
        learning: names of the parameters that learn.
        state_elements: of the optimizer on this rank, over its tensors of the parameters' shapes.
        tensors: by plain name, whole.
        restored: the same, after a checkpoint was read into another model.
    """

    losses: list[float]
    norms: list[float]
    learning: list[str]
    state_elements: int
    tensors: dict[str, Tensor]
    restored: dict[str, Tensor]


def build(seed: int) -> nn.Module:
    """Return a small llama, frozen, with adapters of rank 2; those start at random so that both factors learn."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            tie_word_embeddings=True,
        )
    )
    adapters = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return cast("nn.Module", get_peft_model(base, adapters))


def ids_of(step: int, rank: int) -> Tensor:
    """Return samples, int64 [2, LENGTH]."""
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next tokens, a scalar."""
    logits = cast("Tensor", model(input_ids=ids).logits)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def raw(case: Case, world_size: int) -> Seen:
    """Train in one process, with the samples of all ranks."""
    model = build(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1)
    losses, norms = [], []
    for step in range(case.num_steps):
        optimizer.zero_grad()
        for rank in range(world_size):
            loss = loss_of(model, ids_of(step, rank))
            (loss / world_size).backward()
            losses.append(loss.item())
        norms.append(float(nn.utils.clip_grad_norm_(trained, MAX_NORM)))
        optimizer.step()
    return Seen(
        losses=losses,
        norms=norms,
        learning=[name for name, parameter in model.named_parameters() if parameter.requires_grad],
        state_elements=2 * sum(parameter.numel() for parameter in trained),
        tensors={name: parameter.detach() for name, parameter in model.named_parameters()},
        restored={},
    )


def train(rank: Rank, case: Case) -> Seen:
    """Train on this rank's samples, save, and read the checkpoint into a model with other values."""
    strategy = rank.build(
        attrs.evolve(rank.config, max_norm=MAX_NORM, micro_train_batch_size=2, train_batch_size=2 * rank.world_size)
    )
    strategy.setup_distributed()
    plain = build(rank.rank)  # the values of rank 0 count
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1)
    model, optimizer, scheduler = strategy.prepare((plain, optimizer, None))
    losses, norms = [], []
    for step in range(case.num_steps):
        loss = loss_of(model, ids_of(step, rank.rank))
        losses.append(loss.item())
        strategy.backward(loss, model, optimizer)
        norms.append(strategy.optimizer_step(optimizer, model, scheduler).grad_norm or 0.0)
    strategy.save_ckpt(model, rank.directory / "checkpoints", step=case.num_steps)
    other = strategy.prepare(build(7))
    strategy.load_ckpt(other, rank.directory / "checkpoints")
    return Seen(
        losses=losses,
        norms=norms,
        learning=[name for name, learns in _learning(strategy.unwrap_model(model)) if learns],
        state_elements=sum(_local_elements(value) for value in _state_tensors(optimizer)),
        tensors={name: tensor.clone() for name, tensor in strategy.named_tensors(model)},
        restored={name: tensor.clone() for name, tensor in strategy.named_tensors(other)},
    )


def _learning(model: nn.Module) -> list[tuple[str, bool]]:
    return [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim()
    ]


def _local_elements(tensor: Tensor) -> int:
    to_local = getattr(tensor, "to_local", None)
    return (tensor if to_local is None else cast("Tensor", to_local())).numel()
