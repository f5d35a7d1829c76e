"""A LoRA adapter that is sent to vLLM as it is: it arrives whole, and the weights below it stay."""

from __future__ import annotations

from contextlib import ExitStack

import attrs
import pytest
import sync_rounds
import torch
from guests import GREEDY, HOT, generate, inside_of, installed, logprob_difference, policy, settings, start
from peft import LoraConfig, get_peft_model
from torch import nn

from lightrft.backends.adapters import Adapted
from lightrft.backends.rollout.vllm import differences, load
from lightrft.errors import EngineStateError, UnsupportedError, WeightSyncError
from lightrft.strategy import EngineHandle, StrategyConfig, get_strategy
from lightrft.weight_sync import transfer_weights

# other people's packages warn while they are imported
pytestmark = pytest.mark.filterwarnings("ignore")

ENGINE = attrs.evolve(settings(installed("vllm")), adapters="sent")


def is_in_nothing(version: object) -> bool:
    del version
    return False


def bytes_of(model: nn.Module, *, adapter: bool) -> int:
    return sum(tensor.nbytes for name, tensor in model.state_dict().items() if ("lora_" in name) == adapter)


@pytest.mark.parametrize("way", ["fast", "public"])
def test_rounds_of_training_send_the_adapter_alone(
    engines: ExitStack, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """After each step the adapter's bytes alone travel, and logprobs are those of peft's forward within 1e-5."""
    if way == "public":
        monkeypatch.setattr(load, "is_known", is_in_nothing)
    strategy = get_strategy(StrategyConfig(strategy="single", micro_train_batch_size=1, train_batch_size=1))
    model = sync_rounds.build("adapter")
    optimizer = strategy.create_optimizer(model, lr=1e-2)
    handle = start(engines, model, ENGINE)
    before = generate(handle, GREEDY)
    assert logprob_difference(before, model, temperature=1.0) < 1e-5
    for step in range(5):
        ids = torch.randint(0, 13, (4, 16), generator=torch.Generator().manual_seed(step))
        strategy.backward(model(input_ids=ids, labels=ids).loss, model, optimizer)
        assert strategy.optimizer_step(optimizer, model, None).stepped
        report = strategy.update_engine_weights(handle, model)
        assert report.num_bytes == bytes_of(model, adapter=True) < bytes_of(model, adapter=False) / 20
        assert report.max_logprob_difference < 1e-5
        assert logprob_difference(generate(handle, HOT), model, temperature=1.7) < 1e-5
    assert [c.logprobs for c in before] != [c.logprobs for c in generate(handle, GREEDY)]


def test_a_base_that_changed_is_noticed_and_sent(engines: ExitStack) -> None:
    """Where the weights below changed, the probe sees it; the engine is torn, and the next sync brings all of them."""
    strategy, new = get_strategy(StrategyConfig(strategy="single")), sync_rounds.build("adapter", seed=1)
    handle = start(engines, sync_rounds.build("adapter"), ENGINE)
    with pytest.raises(WeightSyncError, match=r"a logprob is .* nats from the trainer's"):
        strategy.update_engine_weights(handle, new)
    with pytest.raises(EngineStateError, match="torn"):
        generate(handle, GREEDY)
    whole = strategy.update_engine_weights(handle, new)
    assert whole.num_bytes == bytes_of(new, adapter=True) + bytes_of(new, adapter=False)
    assert logprob_difference(generate(handle, HOT), new, temperature=1.7) < 1e-5
    assert strategy.update_engine_weights(handle, new).num_bytes == bytes_of(new, adapter=True)


def send(handle: EngineHandle, tensors: dict[str, torch.Tensor]) -> None:
    transfer_weights(tensors.items(), handle)


def test_an_adapter_comes_whole_or_not_at_all(engines: ExitStack) -> None:
    """An adapter without one of its tensors is refused by that name; so is one without a base that was lost."""
    model = sync_rounds.build("adapter")
    handle = start(engines, model, ENGINE)
    stream = dict(handle.weights() if handle.weights is not None else ())
    adapter = {name: tensor.clone() for name, tensor in stream.items()}
    sent = inside_of(handle).sent
    assert sorted(adapter) == sorted(sent.names)
    kept = attrs.asdict(sent, recurse=False).values()
    assert not any(isinstance(value, nn.Module | Adapted) for value in kept)  # the plain model may be a copy of all
    name, tensor = adapter.popitem()
    with pytest.raises(WeightSyncError, match=rf"1 of 12 tensors were not written \({name}\)"):
        send(handle, adapter)
    assert handle.status == "torn"
    whole = dict(handle.weights() if handle.weights is not None else ())
    assert set(stream) < set(whole)
    send(handle, {**adapter, name: tensor})  # what lies below is still whole
    assert handle.status == "awake"
    handle.engine.begin_update(handle)
    handle.engine.put(handle, [next(pair for pair in whole.items() if "norm" in pair[0])])
    handle.engine.abort(handle)
    with pytest.raises(WeightSyncError, match="tensors were not written"):
        send(handle, {**adapter, name: tensor})
    send(handle, whole)
    assert logprob_difference(generate(handle, HOT), model, temperature=1.7) < 1e-5


def adapted(settings: LoraConfig) -> nn.Module:
    return get_peft_model(policy(), settings).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoraConfig(r=600, target_modules=["q_proj"]), r"LoRA rank 600 is greater than max_lora_rank 512"),
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), r"vLLM does not yet support DoRA"),
        (
            LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
            r"lm_head\.weight is trained outside",
        ),
        (LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), r"lm_head is no linear layer below the head"),
        (LoraConfig(r=2, target_modules=["embed_tokens"]), r"embed_tokens is no linear layer below the head"),
    ],
)
def test_an_adapter_that_vllm_does_not_take_is_refused_when_the_engine_starts(
    engines: ExitStack, config: LoraConfig, said: str
) -> None:
    """What vLLM computes otherwise or not at all is refused in a line that names the other way, before it starts."""
    with pytest.raises(UnsupportedError, match=rf"^engine\.adapters='sent': .*{said}.*; use engine\.adapters='merged'"):
        start(engines, adapted(config), ENGINE)


def test_scales_and_ranks_of_layers_are_those_of_peft(engines: ExitStack) -> None:
    """Rank-stabilized scales, and ranks and scales of their own for some layers, are as peft's, or refused."""
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["k_proj", "o_proj", "gate_proj"],
        rank_pattern={"o_proj": 9},
        alpha_pattern={"gate_proj": 5},
        init_lora_weights=False,
    )
    model = adapted(config)
    if not differences.takes_patterns():
        with pytest.raises(UnsupportedError, match="does not look at rank_pattern and alpha_pattern"):
            start(engines, model, ENGINE)
        return
    assert logprob_difference(generate(start(engines, model, ENGINE), HOT), model, temperature=1.7) < 1e-5


@pytest.mark.parametrize("changed", [{"process": "own"}, {"type": "hf"}])
def test_what_takes_no_adapter_says_so(engines: ExitStack, changed: dict[str, str]) -> None:
    """An engine that cannot be sent an adapter is refused, and not quietly given merged weights."""
    with pytest.raises(UnsupportedError, match=r"engine\.adapters='sent' is not for the engine .*; use engine"):
        start(engines, sync_rounds.build("adapter"), attrs.evolve(ENGINE, **changed))
