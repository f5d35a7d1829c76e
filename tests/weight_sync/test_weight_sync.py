"""From trainer to engine: buckets, transfer, probe."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterable, Iterator
from functools import partial

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightrft.backends.collectives.single import build_collectives
from lightrft.backends.rollout.scripted import build_scripted
from lightrft.backends.rollout.serving import build_rollout
from lightrft.config.sections import EngineConfig, ModelConfig
from lightrft.errors import EngineStateError, WeightSyncError
from lightrft.models.build import build_model
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy import get_strategy
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.rollout import (
    BuildEngine,
    Completion,
    EngineHandle,
    EngineSource,
    Prompt,
    Rollout,
    SamplingParams,
)
from lightrft.weight_sync import (
    BUCKET_BYTES,
    in_buckets,
    judge_probe,
    make_probe,
    probe_difference,
    probe_engine,
    transfer,
    transfer_weights,
)


def tiny_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 32))


def start(model: nn.Module) -> EngineHandle:
    return build_scripted(EngineConfig(type="scripted")).start(EngineSource(model=model, tokenizer=None))


def serve(config: StrategyConfig) -> Rollout:
    def find_engine(key: str, /) -> BuildEngine:
        assert key == "scripted"
        return build_scripted

    def unwrap_model(model: nn.Module) -> nn.Module:
        return model

    def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        yield from model.state_dict().items()

    return build_rollout(
        config,
        build_collectives(config),
        find_engine=find_engine,
        named_tensors=named_tensors,
        unwrap_model=unwrap_model,
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 64))
def test_buckets_keep_every_tensor_in_order_and_within_the_bound(sizes: list[int], bound: int) -> None:
    """Joined, the buckets are the input; one is over the bound only if it holds a single tensor."""
    tensors = [(str(i), torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    buckets = list(in_buckets(tensors, bucket_bytes=bound))
    assert [name for bucket in buckets for name, _ in bucket] == [name for name, _ in tensors]
    assert all(len(bucket) == 1 or sum(t.nbytes for _, t in bucket) <= bound for bucket in buckets)
    assert all(bucket for bucket in buckets)


def test_a_transfer_counts_and_arrives() -> None:
    """After a transfer the engine's tensors equal the trainer's bit for bit, under a new version."""
    trainer, handle = tiny_model(1), start(tiny_model(2))
    assert probe_difference(handle, trainer) > 1e-2
    count, num_bytes = transfer_weights(trainer.state_dict().items(), handle)
    assert (count, num_bytes) == (3, 4 * (32 * 8 + 32 * 8 + 32))
    assert handle.weight_version == 1
    assert probe_difference(handle, trainer) < 1e-5


def counting(handle: EngineHandle, calls: list[int]) -> EngineHandle:
    """Return the handle with the number of tensors of each call of `put` noted."""
    inner = handle.engine

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        bucket = list(tensors)
        calls.append(len(bucket))
        inner.put(handle, bucket)

    handle.engine = attrs.evolve(inner, put=put)
    return handle


@pytest.mark.parametrize("num_layers", [4, 64])
def test_calls_grow_with_bytes_and_not_with_tensors(num_layers: int) -> None:
    """The same bytes in sixteen times as many tensors take as many calls."""
    rows = 2**16 // num_layers
    trainer = nn.Sequential(*(nn.Linear(256, rows, bias=False) for _ in range(num_layers)))
    assert sum(tensor.nbytes for tensor in trainer.state_dict().values()) == BUCKET_BYTES
    calls: list[int] = []
    transfer_weights(trainer.state_dict().items(), counting(start(trainer), calls))
    assert calls == [num_layers]
    calls.clear()
    larger = nn.Sequential(trainer, nn.Linear(256, 4))
    transfer_weights(larger.state_dict().items(), counting(start(larger), calls))
    assert calls == [num_layers, 2]


def test_a_stream_is_held_a_bucket_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trainer gathered is let go of: one bucket of the stream is alive, and the tensor that comes next."""
    bucket_bytes, tensor_bytes = 4096, 1024
    monkeypatch.setattr(transfer, "in_buckets", partial(in_buckets, bucket_bytes=bucket_bytes))
    trainer = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(40)))
    handle, alive, most = start(trainer), [0], [0]

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in trainer.state_dict().items():
            tensor = parameter.clone()
            assert tensor.nbytes == tensor_bytes
            alive[0] += 1
            weakref.finalize(tensor.untyped_storage(), forget)
            most[0] = max(most[0], alive[0])
            yield name, tensor
            del tensor

    def forget() -> None:
        alive[0] -= 1

    transfer_weights(gathered(), handle)
    assert most[0] * tensor_bytes == bucket_bytes + tensor_bytes


def test_an_error_while_streaming_tears_the_engine() -> None:
    """An error of the trainer's own stream leaves the engine torn, not half new and in use."""
    handle = start(tiny_model(1))

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "1.bias", torch.zeros(32)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        transfer_weights(broken(), handle)
    assert handle.status == "torn"


def test_the_probe_reports_a_trainer_full_of_nan_as_no_agreement() -> None:
    """NaN logprobs are infinitely far from any others, and the trainer's mode is left as it was."""
    trainer = tiny_model(1)
    trainer.train()
    handle = start(trainer)
    with torch.no_grad():
        trainer[1].bias.fill_(float("nan"))
    assert probe_difference(handle, trainer) == float("inf")
    assert trainer.training


def test_the_probe_leaves_the_mode_of_every_module_as_it_was() -> None:
    """A part that is in evaluation mode inside a model that trains stays so."""
    trainer = tiny_model(1)
    trainer[1].eval()
    assert probe_difference(start(trainer), trainer) < 1e-5
    assert [module.training for module in trainer.modules()] == [True, True, False]


def transformer(architecture: str, max_length: int) -> nn.Module:
    config = ModelConfig(architecture=architecture, hidden_size=8, num_layers=1, num_heads=2, max_length=max_length)
    return build_model(config, build_character_tokenizer("abc"), seed=0)


@pytest.mark.parametrize(("architecture", "max_length"), [("qwen3", 2), ("qwen3", 10), ("gpt2", 512)])
def test_the_probe_fits_into_any_model(architecture: str, max_length: int) -> None:
    """A context shorter than the probe, and more positions than tokens, are no reason for a sync to fail."""
    trainer = transformer(architecture, max_length)
    strategy = get_strategy({"strategy": "single"})
    with strategy.setup_inference_engine(actor=trainer) as engine:
        assert strategy.update_engine_weights(engine, trainer).max_logprob_difference < 1e-4


@pytest.mark.parametrize("factor", [0.1, 5.0])
def test_the_scale_of_a_probe_is_the_largest_logit(factor: float) -> None:
    """What a difference is held against grows with the logits, and never below that of a logit of 1."""
    trainer = tiny_model(1)
    with torch.no_grad():
        trainer.get_submodule("1").get_parameter("weight").zero_()
        trainer.get_submodule("1").get_parameter("bias").copy_(factor * torch.linspace(-1.0, 1.0, 32))
    assert probe_engine(start(trainer), trainer).scale == pytest.approx(max(1.0, factor))


@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min, float("-inf")])
def test_a_masked_token_has_no_share_in_the_scale(mask: float) -> None:
    """A logit that no logprob feels would make the bound one that nothing exceeds."""
    trainer = tiny_model(1)
    with torch.no_grad():
        trainer.get_submodule("1").get_parameter("weight").zero_()
        trainer.get_submodule("1").get_parameter("bias").copy_(torch.linspace(1.0, 3.0, 32))
        trainer.get_submodule("1").get_parameter("bias")[5] = mask
    assert probe_engine(start(trainer), trainer).scale == pytest.approx(3.0)


def test_a_model_in_bfloat16_is_held_to_the_bound_of_bfloat16() -> None:
    """Parameters in bfloat16 round whatever the strategy is told, and a sync of them is right all the same."""
    trainer = tiny_model(1)
    engine = serve(StrategyConfig(engine_type="scripted")).setup_inference_engine(actor=trainer)
    report = serve(StrategyConfig()).update_engine_weights(engine, tiny_model(2).bfloat16())
    assert 1e-5 < report.max_logprob_difference < 0.03


class Routed(nn.Module):
    """A mixture of two experts: in bfloat16 a token whose scores are nearly equal goes to the first instead."""

    def __init__(self, near: Iterable[int]) -> None:
        super().__init__()
        self.router, self.experts = nn.Embedding(32, 2), nn.ModuleList([nn.Embedding(32, 32) for _ in range(2)])
        with torch.no_grad():
            self.router.weight.copy_(torch.tensor([1.0, 2.0]))
            self.router.weight[list(near)] = torch.tensor([1.0, 1.001])
            for logit, expert in zip((2.0, 4.0), self.experts, strict=True):
                expert.get_parameter("weight").copy_(logit * torch.eye(32).roll(1, 1))

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        first, second = self.router(ids_BT).unbind(-1)
        return torch.where((second > first)[..., None], self.experts[1](ids_BT), self.experts[0](ids_BT))


def test_single_tokens_of_a_mixture_may_go_to_another_expert() -> None:
    """In bfloat16 a few tokens far off are rounding, most of them are not, and in float32 none is."""
    few, most = Routed([6, 10]), Routed(range(32))
    found = probe_engine(start(few), copy.deepcopy(few).bfloat16())
    assert found.agrees
    assert found.difference > found.bound
    assert probe_engine(start(few), few, bf16=True).difference < 1e-5
    assert not probe_engine(start(most), copy.deepcopy(most).bfloat16()).agrees
    with torch.no_grad():
        other = copy.deepcopy(few)
        other.router.weight[[6, 10]] = torch.tensor([2.0, 1.0])
    assert not probe_engine(start(few), other).agrees


@pytest.mark.parametrize("wrong", [0.5, math.nan])
def test_a_prompt_of_a_mixture_that_is_wrong_as_a_whole_is_noticed(wrong: float) -> None:
    """The tokens of a right prompt do not outvote those of a wrong one, and no logprob that is not finite agrees."""
    model = Routed([]).bfloat16()
    (right,) = make_probe(start(model), model)
    logprobs = tuple(logprob - wrong for logprob in right.completion.logprobs)
    other = attrs.evolve(right, completion=attrs.evolve(right.completion, logprobs=logprobs))
    assert judge_probe([right, right], model).agrees
    assert not judge_probe([right, other], model).agrees
    one_nan = (math.nan, *right.completion.logprobs[1:])
    other = attrs.evolve(right, completion=attrs.evolve(right.completion, logprobs=one_nan))
    assert not judge_probe([right, other], model).agrees


def test_every_forward_of_a_probe_is_made_before_anything_is_compared() -> None:
    """Where the model is sharded, other ranks are in the next forward when one cannot compare what the last gave."""
    model = tiny_model(1)
    (right,) = make_probe(start(model), model)
    other = attrs.evolve(right, completion=attrs.evolve(right.completion, logprobs=(0.0, 0.0)))
    calls: list[object] = []
    model.register_forward_pre_hook(lambda *call: calls.append(call))
    with pytest.raises(RuntimeError, match="size"):
        judge_probe([other, right], model)
    assert len(calls) == 2


@pytest.mark.parametrize("token_ids", [(1, 2, 3, 99), (-1,), (), (1, 2, 3, 4, 5)])
def test_a_completion_that_no_forward_could_read_is_refused_before_one(token_ids: tuple[int, ...]) -> None:
    """A token that the model does not know, none at all, or more than were asked for: other ranks hear of it first."""
    model = transformer("qwen3", 32)
    engine = get_strategy({"strategy": "single"}).setup_inference_engine(actor=model)
    generate = engine.engine.generate

    def other(*call: object) -> list[Completion]:
        return [attrs.evolve(made, token_ids=token_ids) for made in generate(*call)]  # type: ignore[arg-type]

    engine.engine = attrs.evolve(engine.engine, generate=other)
    with pytest.raises(
        EngineStateError, match=r"^generate: the engine made \[.*\], and was asked for 1 to 4 token ids below 5;"
    ):
        make_probe(engine, model)


class Positioned(nn.Module):
    """A model with more positions than tokens, which does not say which embedding takes the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.tokens, self.head = nn.Embedding(64, 8), nn.Embedding(8, 8), nn.Linear(8, 8)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        positions_T = torch.arange(ids_BT.shape[1])
        return self.head(self.tokens(ids_BT) + self.positions(positions_T))


def test_more_positions_than_tokens_are_no_tokens() -> None:
    """The probe asks for ids that the smallest embedding has, where the model does not say which one takes the ids."""
    torch.manual_seed(1)
    trainer = Positioned()
    assert probe_difference(start(trainer), trainer) < 1e-5


def test_an_engine_that_could_not_be_verified_is_torn() -> None:
    """An error of the probe itself leaves the engine torn, and not awake with weights that nobody has looked at."""
    trainer = transformer("qwen3", 32)
    strategy = get_strategy({"strategy": "single"})
    engine = strategy.setup_inference_engine(actor=trainer)
    with torch.no_grad():
        trainer.get_parameter("model.norm.weight").fill_(float("nan"))
    with pytest.raises(EngineStateError, match="not finite"):
        strategy.update_engine_weights(engine, trainer)
    assert engine.status == "torn"
    strategy.update_engine_weights(engine, transformer("qwen3", 32))
    assert engine.status == "awake"


def test_serving_syncs_verifies_and_refuses_a_sync_that_did_not_arrive() -> None:
    """A sync reports what it did; one whose stream lies about a tensor is caught, and the next one mends it."""
    rollout = serve(StrategyConfig(engine_type="scripted"))
    trainer = tiny_model(1)
    engine = rollout.setup_inference_engine(actor=tiny_model(2))
    report = rollout.update_engine_weights(engine, trainer)
    assert (report.weight_version, report.num_tensors) == (1, 3)
    assert report.max_logprob_difference < 1e-5

    def lying(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in model.state_dict().items():
            yield name, tensor * 2.0 if name == "1.weight" else tensor

    liar = build_rollout(
        StrategyConfig(),
        build_collectives(StrategyConfig()),
        find_engine=lambda _key: build_scripted,
        named_tensors=lying,
        unwrap_model=lambda model: model,
    )
    with pytest.raises(WeightSyncError, match="does not hold the trainer's weights"):
        liar.update_engine_weights(engine, tiny_model(3))
    with pytest.raises(EngineStateError, match="sync its weights first"):
        rollout.gather_and_generate(engine, [Prompt(token_ids=(1,))], SamplingParams())
    rollout.update_engine_weights(engine, trainer)
    (completion,) = rollout.gather_and_generate(engine, [Prompt(token_ids=(1,))], SamplingParams(max_new_tokens=1))
    assert completion.weight_version == 3


@pytest.mark.parametrize(("wanted", "status"), [(True, "asleep"), (False, "awake")])
def test_the_engine_sleeps_only_where_the_config_wants_it(wanted: bool, status: str) -> None:
    """maybe_sleep obeys enable_engine_sleep, and waking makes the same completions as before."""
    rollout = serve(StrategyConfig(engine_type="scripted", enable_engine_sleep=wanted))
    engine = rollout.setup_inference_engine(actor=tiny_model(1))
    prompts, sampling = [Prompt(token_ids=(3, 4))], SamplingParams(max_new_tokens=3)
    before = rollout.engine_generate_local(engine, prompts, sampling)
    rollout.maybe_sleep_inference_engine(engine)
    assert engine.status == status
    rollout.wakeup_inference_engine(engine)
    assert rollout.engine_generate_local(engine, prompts, sampling) == before
