"""The engine "hf": its own copy of the weights, kept in step with the trainer's."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from lightrft.backends.rollout.hf.engine import build_hf
from lightrft.config.sections import EngineConfig
from lightrft.errors import EngineStateError, UnsupportedError, WeightSyncError
from lightrft.strategy import get_strategy
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.images import Image
from lightrft.strategy.protocols.rollout import EngineHandle, EngineSource, Prompt, SamplingParams

PROMPTS = [Prompt(token_ids=(1, 2, 3)), Prompt(token_ids=(4,)), Prompt(token_ids=(5, 6))]


def model_of(seed: int, *, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # fresh weights are nearly uniform over tokens; these have an opinion
    return model


def start(model: nn.Module) -> EngineHandle:
    return build_hf(EngineConfig()).start(EngineSource(model=model, tokenizer=None))


def logprobs_under(
    model: nn.Module, prompt: tuple[int, ...], tokens: tuple[int, ...], temperature: float
) -> list[float]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1)[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()


def test_completions_match_the_requests_and_the_models_logprobs() -> None:
    """Completions come in order, n for each prompt, with the model's own logprobs at the sampling temperature."""
    model = model_of(0)
    handle = start(model)
    sampling = SamplingParams(n=3, max_new_tokens=5, temperature=0.7, seed=4)
    completions = handle.engine.generate(handle, PROMPTS, sampling)
    assert [c.prompt_ids for c in completions] == [prompt.token_ids for prompt in PROMPTS for _ in range(3)]
    assert [c.sample_index for c in completions] == [0, 1, 2] * 3
    for completion in completions:
        expected = logprobs_under(model, completion.prompt_ids, completion.token_ids, 0.7)
        assert list(completion.logprobs) == pytest.approx(expected, abs=1e-5)
    assert len({completion.token_ids for completion in completions}) > 3


@pytest.mark.parametrize("tied", [True, False])
def test_after_a_sync_the_engine_is_the_trainer(tied: bool) -> None:
    """Greedy completions follow the trainer's weights after an update, and only then; versions are counted."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    old, new = model_of(1, tied=tied), model_of(2, tied=tied)
    with strategy.setup_inference_engine(EngineConfig(), actor=old) as engine:
        sampling = SamplingParams(max_new_tokens=6, temperature=0.0)
        before = strategy.gather_and_generate(engine, PROMPTS, sampling)
        report = strategy.update_engine_weights(engine, new)
        after = strategy.gather_and_generate(engine, PROMPTS, sampling)
        assert report.max_logprob_difference < 1e-5
        assert report.num_tensors == len(new.state_dict())
        assert [c.token_ids for c in before] != [c.token_ids for c in after]
        assert {c.weight_version for c in before} == {0}
        assert {c.weight_version for c in after} == {1}
        for completion in after:
            expected = new.generate(
                torch.tensor([completion.prompt_ids]),
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert tuple(expected[0, len(completion.prompt_ids) :].tolist()) == completion.token_ids


def test_layers_that_share_a_weight_are_generated_with_as_transformers_does() -> None:
    """Before a sync and after it: the value projection of one layer is that of the other."""

    def shared(seed: int) -> PreTrainedModel:
        model = model_of(seed)
        first, second = (model.get_submodule(f"model.layers.{layer}.self_attn.v_proj") for layer in range(2))
        second.weight = first.weight
        return model

    strategy = get_strategy(StrategyConfig(strategy="single"))
    old, new = shared(1), shared(2)
    with strategy.setup_inference_engine(EngineConfig(), actor=old) as engine:
        for model in (old, new):
            for made in strategy.gather_and_generate(engine, PROMPTS, SamplingParams(max_new_tokens=6, temperature=0)):
                expected = model.generate(
                    torch.tensor([made.prompt_ids]),
                    max_new_tokens=6,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                assert tuple(expected[0, len(made.prompt_ids) :].tolist()) == made.token_ids
                own = logprobs_under(model, made.prompt_ids, made.token_ids, 1.0)
                assert list(made.logprobs) == pytest.approx(own, abs=1e-5)
            if model is old:
                strategy.update_engine_weights(engine, new)


@pytest.mark.parametrize("break_it", [lambda names: names[1:], lambda names: [*names, "no.such.weight"]])
def test_a_sync_of_other_names_leaves_the_engine_torn(break_it: Callable[[list[str]], list[str]]) -> None:
    """Missing and unknown names raise, the engine refuses to generate, and a right sync mends it."""
    model = model_of(1)
    handle = start(model)
    tensors = model.state_dict()
    names = break_it(list(tensors))

    def put_and_commit() -> None:
        handle.engine.put(handle, [(name, tensors.get(name, torch.zeros(1))) for name in names])
        handle.engine.commit(handle)

    handle.engine.begin_update(handle)
    with pytest.raises(WeightSyncError):
        put_and_commit()
    with pytest.raises(EngineStateError, match="torn"):
        handle.engine.generate(handle, PROMPTS, SamplingParams())
    get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, model)
    assert len(handle.engine.generate(handle, PROMPTS, SamplingParams(max_new_tokens=2))) == 3


def test_sleep_and_wake_change_no_completion() -> None:
    """Sleep, wake, generate equals generate; asleep it refuses; flushing an engine without a cache changes nothing."""
    handle = start(model_of(3))
    sampling = SamplingParams(max_new_tokens=4, seed=1)
    before = handle.engine.generate(handle, PROMPTS, sampling)
    handle.engine.sleep(handle)
    with pytest.raises(EngineStateError, match="'asleep'; wake it first"):
        handle.engine.generate(handle, PROMPTS, sampling)
    handle.engine.wake(handle)
    handle.engine.flush_cache(handle)
    assert handle.engine.generate(handle, PROMPTS, sampling) == before


def test_a_sleep_that_fails_leaves_no_generator_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the generator had is released by then; it reads the weights again."""
    handle = start(model_of(3))
    sampling = SamplingParams(max_new_tokens=4, seed=1)
    before = handle.engine.generate(handle, PROMPTS, sampling)

    def fail(*args: object) -> None:
        raise MemoryError(args)

    monkeypatch.setattr(handle.state.weights.model, "to", fail)
    with pytest.raises(MemoryError):
        handle.engine.sleep(handle)
    assert handle.engine.generate(handle, PROMPTS, sampling) == before


def test_training_on_does_not_move_the_engine() -> None:
    """The engine's weights are its own: a change of the trainer's shows only after an update."""
    model = model_of(1)
    handle = start(model)
    sampling = SamplingParams(max_new_tokens=4, temperature=0.0)
    before = handle.engine.generate(handle, PROMPTS, sampling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert handle.engine.generate(handle, PROMPTS, sampling) == before


def test_what_the_engine_cannot_do_is_refused() -> None:
    """A model that is no language model of transformers, and images, are refused with the way out."""
    with pytest.raises(UnsupportedError, match="Linear is no causal language model of transformers"):
        start(nn.Linear(2, 2))
    handle = start(model_of(1))
    image = Image(width=1, height=1, pixels=bytes(3))
    with pytest.raises(UnsupportedError, match=r"prompts\[0\] has images and the engine no processor"):
        handle.engine.generate(handle, [Prompt(token_ids=(1,), images=(image,))], SamplingParams())


def test_an_aborted_update_is_torn() -> None:
    """Giving an update up leaves the engine torn."""
    handle = start(model_of(1))
    handle.engine.begin_update(handle)
    handle.engine.abort(handle)
    assert handle.status == "torn"


def test_finish_reasons_say_how_a_completion_ended() -> None:
    """A completion that reached a stop token says so, and one that reached the limit says that."""
    handle = start(model_of(0))
    limit = SamplingParams(max_new_tokens=4, temperature=0.0)
    completions = handle.engine.generate(handle, PROMPTS, limit)
    assert [c.finish_reason for c in completions] == ["length"] * 3
    stops = tuple({c.token_ids[1] for c in completions})
    for stopped in handle.engine.generate(handle, PROMPTS, attrs.evolve(limit, stop_token_ids=stops)):
        assert (stopped.finish_reason, len(stopped.token_ids) <= 2) == ("stop", True)


def test_the_batch_size_bounds_what_is_decoded_at_once() -> None:
    """No forward of the engine's model sees more sequences than batch_size, and the completions are the same.

    The engine claims to sample, wakes on its device, and holds nothing when it is closed.
    """
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=32, n_embd=8, n_layer=1, n_head=2)  # decoded by its own forward
    model = GPT2LMHeadModel(config).eval()
    made: list[object] = []
    for batch_size in (1, 2, 9):
        handle = build_hf(EngineConfig(batch_size=batch_size)).start(EngineSource(model=model, tokenizer=None))
        rows: list[int] = []

        def watch(module: nn.Module, args: tuple[torch.Tensor, ...], rows: list[int] = rows) -> None:
            del module
            rows.append(args[0].shape[0])

        handle.state.weights.model.get_input_embeddings().register_forward_pre_hook(watch)
        made.append([c.token_ids for c in handle.engine.generate(handle, PROMPTS, SamplingParams(max_new_tokens=3))])
        assert max(rows) == min(batch_size, len(PROMPTS))
        assert handle.engine.capabilities == frozenset({"images", "sampling", "seeds", "videos"})
        handle.engine.sleep(handle)
        handle.state.device = torch.device("meta")  # every machine has it
        handle.engine.wake(handle)
        assert {tensor.device.type for tensor in handle.state.weights.model.parameters()} == {"meta"}
        handle.engine.close(handle)
        assert handle.state is None
    assert made[0] == made[1] == made[2]
