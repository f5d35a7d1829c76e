"""The scripted engine: prepared tokens, real log-probabilities."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightrft.backends.rollout.scripted import build_scripted
from lightrft.backends.rollout.weights import begin_write, check_coverage, copy_model, tensors_of, write_tensors
from lightrft.config.sections import EngineConfig
from lightrft.errors import ConfigError, DataError, UnsupportedError, WeightSyncError
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy.protocols.images import Image
from lightrft.strategy.protocols.rollout import EngineHandle, EngineSource, Prompt, SamplingParams


class Bytes:
    """A tokenizer whose tokens are the bytes of the text."""

    eos_token_id = 0

    def encode(self, text: str, /, *, add_special_tokens: bool = False) -> list[int]:
        assert not add_special_tokens
        return list(text.encode())

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = False) -> str:
        assert not skip_special_tokens
        return bytes(token_ids).decode()


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(128, 4), nn.Linear(4, 128))


def start(*script: str, model: nn.Module | None = None) -> EngineHandle:
    config = EngineConfig(type="scripted", script=script)
    return build_scripted(config).start(EngineSource(model=model or tiny_model(), tokenizer=Bytes()))


def test_completions_follow_the_script_in_turn() -> None:
    """Completion i of a call is entry i of the script, ended by the stop token, for every sample of every prompt."""
    handle = start("ab", "c")
    sampling = SamplingParams(n=2, max_new_tokens=8, stop_token_ids=(0,))
    completions = handle.engine.generate(handle, [Prompt(token_ids=(1,)), Prompt(token_ids=(2,))], sampling)
    assert [c.token_ids for c in completions] == [(97, 98, 0), (99, 0), (97, 98, 0), (99, 0)]
    assert [c.prompt_ids for c in completions] == [(1,), (1,), (2,), (2,)]
    assert [c.sample_index for c in completions] == [0, 1, 0, 1]
    assert {c.finish_reason for c in completions} == {"stop"}


def test_a_part_of_a_request_goes_on_in_the_script() -> None:
    """The number of the first prompt is the place in the script, counted in completions."""
    handle = start("a", "b", "c")
    sampling = SamplingParams(n=2, max_new_tokens=8, stop_token_ids=(0,), first_prompt=1)
    completions = handle.engine.generate(handle, [Prompt(token_ids=(1,))], sampling)
    assert [c.token_ids for c in completions] == [(99, 0), (97, 0)]


def test_an_empty_text_of_the_script_is_a_completion_that_ends_at_once() -> None:
    """An empty text gives the stop token alone, and no echo; without a stop token there is nothing to give."""
    handle = start("", "a")
    prompt, sampling = Prompt(token_ids=(5,)), SamplingParams(n=2, max_new_tokens=4, stop_token_ids=(0,))
    made = handle.engine.generate(handle, [prompt], sampling)
    assert [(one.token_ids, one.finish_reason) for one in made] == [((0,), "stop"), ((97, 0), "stop")]
    with pytest.raises(ConfigError, match="there is no stop token"):
        handle.engine.generate(handle, [prompt], SamplingParams())


def test_a_completion_ends_at_its_first_stop_token() -> None:
    """What a script, or an echo, holds after a stop token is not given out."""
    sampling = SamplingParams(max_new_tokens=5, stop_token_ids=(0, ord("+")))
    for handle in (start("7+8"), start()):
        (one,) = handle.engine.generate(handle, [Prompt(token_ids=(ord("7"), ord("+")))], sampling)
        assert (one.token_ids, one.finish_reason) == ((ord("7"), ord("+")), "stop")


def test_without_a_script_it_echoes_the_prompt_up_to_the_limit() -> None:
    """An engine without a script repeats the prompt and stops at max_new_tokens."""
    handle = start()
    (completion,) = handle.engine.generate(handle, [Prompt(token_ids=(5, 6))], SamplingParams(max_new_tokens=3))
    assert completion.token_ids == (5, 6, 5)
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
def test_logprobs_are_the_models_own(temperature: float) -> None:
    """The log-probability of each scripted token is log softmax of the model's logits at the sampling temperature."""
    model = tiny_model()
    handle = start("ab", model=model)
    sampling = SamplingParams(max_new_tokens=4, temperature=temperature)
    (completion,) = handle.engine.generate(handle, [Prompt(token_ids=(7, 9))], sampling)
    with torch.no_grad():
        logits = model(torch.tensor([9, 97])) / (temperature or 1.0)
    expected = torch.log_softmax(logits, dim=-1)[torch.arange(2), torch.tensor([97, 98])]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-6)


def test_bad_requests_name_the_prompt() -> None:
    """An empty prompt, one with images, and a script without a tokenizer are refused with a reason."""
    handle = start("a")
    with pytest.raises(DataError, match=r"prompts\[1\]=\[\] is empty"):
        handle.engine.generate(handle, [Prompt(token_ids=(1,)), Prompt(token_ids=())], SamplingParams())
    with pytest.raises(UnsupportedError, match=r"prompts\[0\] has images"):
        handle.engine.generate(
            handle, [Prompt(token_ids=(1,), images=(Image(width=1, height=1, pixels=bytes(3)),))], SamplingParams()
        )
    with pytest.raises(ConfigError, match="there is no tokenizer"):
        build_scripted(EngineConfig(script=("a",))).start(EngineSource(model=tiny_model(), tokenizer=None))


def test_the_copy_shares_no_memory_and_leaves_gradients_behind() -> None:
    """Training on changes neither the engine's weights nor loses the trainer's gradients."""
    model = tiny_model()
    model(torch.tensor([1])).sum().backward()
    weights = copy_model(model)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in weights.model.parameters())
    before = {name: tensor.clone() for name, tensor in tensors_of(weights).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(weights).items())


def test_tensors_that_do_not_fit_are_refused() -> None:
    """A repeated name and another shape raise, naming the tensor."""
    weights = copy_model(tiny_model())
    bias = ("1.bias", torch.zeros(128))
    with pytest.raises(WeightSyncError, match=r"'1\.bias' came twice"):
        write_tensors(weights, [bias, bias])
    with pytest.raises(
        WeightSyncError, match=r"shape \(2,\) and the engine's \(128, 4\); start the engine from this model\.$"
    ):
        write_tensors(weights, [("1.weight", torch.zeros(2))])


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    """A model that keeps a tensor of a graph is refused with a reason."""
    model = tiny_model()
    model.register_module("cache", nn.Identity())
    model.cache.kept = model(torch.tensor([1]))  # not a leaf: torch refuses to copy it
    with pytest.raises(UnsupportedError, match=r"model=Sequential cannot be copied \(.+\); detach the tensors"):
        copy_model(model)


def test_a_script_that_the_tokenizer_cannot_read_names_the_character() -> None:
    """A character outside of the alphabet is named when the engine starts."""
    tokenizer = build_character_tokenizer("abc")
    config = EngineConfig(type="scripted", script=("abz",))
    with pytest.raises(DataError, match="'abz' holds 'z'"):
        build_scripted(config).start(EngineSource(model=tiny_model(), tokenizer=tokenizer))


def test_logprobs_belong_to_the_completion_alone() -> None:
    """A prompt longer than its completion has no part in the logprobs; a model may return an object with logits."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: torch.Tensor) -> object:
            return SimpleNamespace(logits=self.inner(ids))

    model = tiny_model()
    with torch.no_grad():
        logits = model(torch.tensor([3, 97]))
    expected = torch.log_softmax(logits, dim=-1)[torch.arange(2), torch.tensor([97, 98])]
    for one in (model, Wrapped(model)):
        handle = start("ab", model=one)
        prompt = Prompt(token_ids=(7, 9, 11, 3))
        with torch.device("meta"):  # what is computed stays with the model, whatever torch's default device is
            (completion,) = handle.engine.generate(handle, [prompt], SamplingParams(max_new_tokens=4))
        assert (len(completion.logprobs), completion.weight_version) == (2, 0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-6)


def test_missing_tensors_are_counted_and_the_first_five_named() -> None:
    """An update that left out many tensors says how many, and names five; of five or fewer it names all."""
    weights = copy_model(nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(7)))
    first = ", ".join(f"{i}.weight" for i in range(5))
    with pytest.raises(WeightSyncError, match=rf"^7 of 7 tensors were not written \({first}, \.\.\.\); send all"):
        check_coverage(weights)
    write_tensors(weights, [("6.weight", torch.zeros(1, 1))])
    with pytest.raises(WeightSyncError, match=rf"^6 of 7 tensors were not written \({first}, \.\.\.\); send all"):
        check_coverage(weights)
    write_tensors(weights, [("5.weight", torch.zeros(1, 1))])
    with pytest.raises(WeightSyncError, match=rf"^5 of 7 tensors were not written \({first}\); send all"):
        check_coverage(weights)
    write_tensors(weights, [(f"{i}.weight", torch.zeros(1, 1)) for i in range(5)])
    check_coverage(weights)


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.5), ("top_k", 3), ("min_new_tokens", 1)])
def test_what_would_choose_among_tokens_is_refused(name: str, value: float) -> None:
    """An engine that draws nothing claims no sampling, and names the setting that it cannot follow."""
    handle = start("ab")
    assert handle.engine.capabilities == frozenset({"seeds"})
    sampling = SamplingParams(max_new_tokens=4, **{name: value})
    with pytest.raises(UnsupportedError, match=rf"^{name}={value} chooses among tokens .*; leave it at "):
        handle.engine.generate(handle, [Prompt(token_ids=(1,))], sampling)


def test_buffers_that_a_move_replaced_are_written() -> None:
    """A move makes new buffers, as sleep and wake do on a device; an update after it writes those that are read."""
    model = nn.BatchNorm1d(2)
    weights = copy_model(model)
    weights.model.double()
    weights.model.float()
    model.running_mean.fill_(3.0)
    begin_write(weights)
    write_tensors(weights, model.state_dict().items())
    check_coverage(weights)
    assert weights.model.running_mean.tolist() == [3.0, 3.0]
