"""Rounds of training, syncing and generating on every rank of a pool, with each kind of model."""

from __future__ import annotations

from functools import partial
from typing import Literal, TypeAlias, cast

import attrs
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightrft.backends.plain_model import is_spread
from lightrft.strategy.protocols import Completion, Prompt, SamplingParams
from lightrft.testing.subject import Rank
from lightrft.weight_sync import make_probe

Kind: TypeAlias = Literal["tied", "untied", "adapter", "experts"]

KINDS: tuple[Kind, ...] = ("tied", "untied", "adapter", "experts")

VOCABULARY = 13
_PROMPTS = ((1, 2, 3), (4,), tuple(range(VOCABULARY)))
_SAMPLING = SamplingParams(temperature=1.3, max_new_tokens=4, seed=5)
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,  # heads of 32, the smallest that vLLM's attention takes on a CPU
    "intermediate_size": 16,  # that of `lightrft.testing.cases.policies`, whose servers can then be shared
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.25,  # logits with an opinion
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@attrs.frozen(kw_only=True)
class Case:
    """Rounds.

    Attributes:
        kind: of the model.
        num_rounds: steps of the optimizer, with a sync after each.
    """

    kind: Kind
    num_rounds: int


@attrs.frozen(kw_only=True)
class Seen:
    """What one rank saw.

    Attributes:
        probed: what each sync found between engine and trainer, in nats.
        differences: between the completions' logprobs and the trainer's own forward after each sync, in nats.
        moved: how far the logprobs of the first completions were from what they became.
        kept: whether every sync left each bit of the trainer's tensors as it was.
        asked: tokens of the text of a probe.
        spread: whether a forward pass is known to be a matter of all ranks.
    """

    probed: list[float]
    differences: list[float]
    moved: float
    kept: bool
    asked: tuple[int, ...]
    spread: bool


def build(kind: Kind, *, seed: int = 0, expert_size: int = 40) -> nn.Module:
    """Return a small model in evaluation mode.

    Args:
        kind: "adapter" is frozen but for a LoRA adapter that starts at random.
        seed: of the weights.
        expert_size: of each expert's hidden layer; 40 is none of the multiples that kernels like.
    """
    torch.manual_seed(seed)
    if kind == "experts":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": expert_size}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **experts, norm_topk_prob=True)).eval()
    model = Qwen3ForCausalLM(Qwen3Config(**_SIZES, tie_word_embeddings=kind == "tied")).eval()
    if kind != "adapter":
        return model
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return cast("nn.Module", get_peft_model(cast("PreTrainedModel", model), adapter)).eval()


def distance(made: list[Completion], model: nn.Module) -> float:
    """Return the largest distance, in nats, of a logprob from that of the model's own forward."""
    found = [0.0]
    for completion in made:
        ids = torch.tensor([completion.prompt_ids + completion.token_ids])
        with torch.no_grad():
            logits = cast("Tensor", model(input_ids=ids).logits)[0, len(completion.prompt_ids) - 1 : -1]
        own = torch.log_softmax(logits / _SAMPLING.temperature, -1)
        own = own.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        found.append((own - torch.tensor(completion.logprobs)).abs().max().item())
    return max(found)


def run(rank: Rank, case: Case) -> Seen:
    """Train on this rank's samples, sync and generate in turn."""
    config = attrs.evolve(rank.config, micro_train_batch_size=2, train_batch_size=2 * rank.world_size, max_norm=1.0)
    strategy = rank.build(config)
    strategy.setup_distributed()
    plain = build(case.kind)
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model, optimizer, scheduler = strategy.prepare((plain, optimizer, None))
    prompts = [Prompt(token_ids=ids) for ids in _PROMPTS]
    probed, differences, kept = [], [], True
    with strategy.setup_inference_engine(rank.engine, actor=model) as engine:
        first = strategy.gather_and_generate(engine, prompts, _SAMPLING)
        differences.append(distance(first, model))
        for number in range(case.num_rounds):
            generator = torch.Generator().manual_seed(2 * number + rank.rank)
            ids = torch.randint(0, VOCABULARY, (2, 8), generator=generator)
            model.train()
            strategy.backward(model(input_ids=ids, labels=ids).loss, model, optimizer)
            strategy.optimizer_step(optimizer, model, scheduler)
            model.eval()
            before = {name: tensor.clone() for name, tensor in strategy.named_tensors(model)}
            probed.append(strategy.update_engine_weights(engine, model).max_logprob_difference)
            kept = kept and all(torch.equal(before[name], tensor) for name, tensor in strategy.named_tensors(model))
            made = strategy.gather_and_generate(engine, prompts, _SAMPLING)
            differences.append(distance(made, model))
        asked = make_probe(engine, model)[0].prompt.token_ids
    strategy.barrier()
    return Seen(
        probed=probed,
        differences=differences,
        moved=distance(first, model),
        kept=kept,
        asked=asked,
        spread=is_spread(model),
    )


def break_off(rank: Rank, case: str) -> None:
    """Let the trainer's forward pass break off on one rank, in the first layer, in a sync."""
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    model = strategy.prepare(build("untied"))
    with strategy.setup_inference_engine(rank.engine, actor=model) as engine:
        if rank.rank == rank.world_size - 1:
            layer = strategy.unwrap_model(model).get_submodule("model.layers.0.mlp")
            layer.register_forward_pre_hook(partial(_raise, case))
        try:
            strategy.update_engine_weights(engine, model)
        finally:
            assert engine.status == "torn"


def _raise(words: str, *call: object) -> None:
    del call
    raise OSError(words)
