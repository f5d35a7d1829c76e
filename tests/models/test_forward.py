from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightrft.algorithms.fused_loss import fused_policy_loss
from lightrft.algorithms.logprobs import token_logprobs
from lightrft.backends.training.autocast import wrap_autocast
from lightrft.config.sections import ModelConfig
from lightrft.data.padding import pad_right
from lightrft.errors import UnsupportedError
from lightrft.models.build import build_model
from lightrft.models.forward import call_with_head, check_head
from lightrft.models.tokenizer import build_character_tokenizer

TOKENIZER = build_character_tokenizer("abcdefgh")


def _model(architecture: str) -> nn.Module:
    config = ModelConfig(architecture=architecture, hidden_size=16, num_layers=2, num_heads=2, max_length=32)
    return build_model(config, TOKENIZER, seed=0)


def product(hidden_BTH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """What the head itself computes."""
    return hidden_BTH @ weight_VH.T


def hidden_states(hidden_BTH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """What the head is given."""
    del weight_VH
    return hidden_BTH


MODELS = {name: _model(name) for name in ("qwen3", "llama", "gpt2")}


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=10)
@given(
    sequences=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=4),
    pad=st.integers(0, 9),
)
def test_right_padded_batches_give_what_each_sequence_gives_alone(
    name: str, sequences: list[list[int]], pad: int
) -> None:
    """Without a mask, real tokens of a padded batch have the logits of the sequence alone, whatever the padding."""
    model = MODELS[name]
    ids_BT, mask_BT = pad_right(sequences, pad_id=pad)
    with torch.no_grad():
        logits_BTV = call_with_head(model, ids_BT, product)
        expected = [model(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences]
    torch.testing.assert_close(logits_BTV[mask_BT], torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_through_the_logits(name: str) -> None:
    """A loss formed in the head's place gives every parameter the gradient that the full model gives."""
    model = MODELS[name]
    ids_BT = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]])
    parameters = list(model.parameters())

    def loss_of_head(hidden_BTH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        return (hidden_BTH @ weight_VH.T).logsumexp(-1).sum()

    ours = torch.autograd.grad(call_with_head(model, ids_BT, loss_of_head), parameters)
    theirs = torch.autograd.grad(model(input_ids=ids_BT).logits.logsumexp(-1).sum(), parameters)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("is_training", [True, False])
def test_check_head_passes_plain_heads_and_leaves_the_model_as_it_was(name: str, is_training: bool) -> None:
    """A head that is a matrix passes, with dropout in the model too; modes, hooks and parameters stay."""
    model = _model(name).train(is_training)
    model.get_decoder().eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_head(model)
    assert [module.training for module in model.modules()] == modes
    assert "forward" not in vars(model.get_output_embeddings())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "options", "said"),
    [
        ("phi", {}, "has a head with a bias"),
        ("gemma2", {"final_logit_softcapping": 30.0, "head_dim": 8, "num_key_value_heads": 1}, "softcap or a scale"),
        ("cohere", {"logit_scale": 0.0625}, "softcap or a scale"),
        ("bert", {"is_decoder": False}, "has a head with a bias"),
    ],
)
def test_check_head_refuses_logits_that_are_more_than_a_product(
    architecture: str, options: dict[str, object], said: str
) -> None:
    """Bias, softcap and scale are found in models with fresh weights, where they hardly change a logit yet."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(architecture, vocab_size=10, max_position_embeddings=32, **sizes, **options)
    config.pad_token_id = config.eos_token_id = config.bos_token_id = 0
    with pytest.raises(UnsupportedError, match=said):
        check_head(AutoModelForCausalLM.from_config(config))


class _ToyDecoder(nn.Module):
    """Embeddings that are hidden states, each of which sees its own token alone."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.embeddings = nn.Embedding(10, 4)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        hidden_BTH = self.embeddings(input_ids)
        if self.fault == "not causal":
            hidden_BTH = hidden_BTH + hidden_BTH.mean(1, keepdim=True)
        return SimpleNamespace(last_hidden_state=hidden_BTH)


class _Toy(nn.Module):
    """The parts of a causal model that `check_head` looks at, with one thing wrong in each variant."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.decoder = _ToyDecoder(fault)
        self.head = (
            nn.Sequential(nn.Linear(4, 10, bias=False)) if fault == "no linear head" else nn.Linear(4, 10, bias=False)
        )
        if fault == "no linear head":
            self.head.weight = nn.Parameter(torch.randn(10, 4))

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.fault == "no head" else self.head

    def forward(self, *, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        hidden_BTH = self.decoder(input_ids).last_hidden_state
        if self.fault == "between":
            hidden_BTH = hidden_BTH / 2
        if self.fault == "last to the head":
            hidden_BTH = hidden_BTH[:, -1:]
        if self.fault == "past the head":
            return SimpleNamespace(logits=hidden_BTH @ self.head.weight.T)
        if self.fault == "last alone":
            return SimpleNamespace(logits=self.head(hidden_BTH)[:, -1:])
        return SimpleNamespace(logits=self.head(hidden_BTH))


@pytest.mark.parametrize("fault", ["none", "between"])
def test_a_model_of_ones_own_needs_one_method_alone(fault: str) -> None:
    """What is asked of a model is get_output_embeddings; what happens to hidden states before the head is its own."""
    model = _Toy(fault)
    check_head(model)
    ids_BT = torch.tensor([[1, 2]])
    torch.testing.assert_close(call_with_head(model, ids_BT, product), model(input_ids=ids_BT).logits)


def test_hooks_on_the_head_run_and_its_forward_comes_back() -> None:
    """Hooks before and after, forward and backward, see the head's call; a forward of the head's own is put back."""
    model = _model("qwen3")
    head, seen = model.get_output_embeddings(), []

    def own(hidden_BTH: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_BTH, head.weight)

    head.forward = own
    head.register_forward_pre_hook(lambda *_: seen.append("before"))
    head.register_forward_hook(lambda *_: seen.append("after"))
    head.register_full_backward_hook(lambda *_: seen.append("backward"))
    call_with_head(
        model, torch.tensor([[2, 3]]), lambda hidden_BTH, weight_VH: product(hidden_BTH, weight_VH).sum()
    ).backward()
    assert seen == ["before", "after", "backward"]
    assert head.forward is own


@pytest.mark.parametrize("is_fused", [True, False])
def test_a_weight_that_is_whole_inside_of_the_heads_call_alone_is_enough(is_fused: bool) -> None:
    """Hooks that hold the weight back elsewhere, as sharded training does, change neither loss nor gradients."""
    ids_BT, targets_N = torch.tensor([[2, 3, 4], [5, 6, 7]]), torch.tensor([3, 4, 1, 6, 7, 1])

    def loss_of_head(hidden_BTH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        hidden_NH = hidden_BTH.flatten(0, 1)
        if is_fused:
            return fused_policy_loss(hidden_NH, weight_VH, targets_N, lambda logprobs_C, _: -logprobs_C, {}).loss
        return -token_logprobs(hidden_NH, weight_VH, targets_N).logprobs_N.sum()

    plain, sharded = _model("gpt2"), _untied_from(_model("gpt2"))
    expected = call_with_head(plain, ids_BT, loss_of_head)
    expected.backward()
    head = sharded.get_output_embeddings()
    weight, whole, nothing = head.weight, head.weight.data, torch.empty(0)

    def gather(*_: object) -> None:
        weight.data = whole

    def free(*_: object) -> None:
        weight.data = nothing

    head.register_forward_pre_hook(gather)
    head.register_forward_hook(free)
    head.register_full_backward_pre_hook(gather)
    weight.data = nothing
    loss = call_with_head(sharded, ids_BT, loss_of_head)
    assert weight.numel() == 0
    loss.backward()
    assert torch.equal(loss, expected)
    torch.testing.assert_close(
        weight.grad + sharded.get_input_embeddings().weight.grad, plain.get_input_embeddings().weight.grad
    )


def _untied_from(model: nn.Module) -> nn.Module:
    """The same model with a head of its own."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    return model


def test_an_error_in_the_heads_place_leaves_the_model_whole() -> None:
    """After a function that raised, the model has its own head again."""
    model = _model("qwen3")
    ids_BT = torch.tensor([[2, 3]])
    expected = model(ids_BT).logits

    def raise_error(hidden_BTH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"{hidden_BTH.shape} {weight_VH.shape}")

    with pytest.raises(ValueError, match="16"):
        call_with_head(model, ids_BT, raise_error)
    assert torch.equal(model(ids_BT).logits, expected)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no linear head", "not linear"),
        ("no head", r"has no get_output_embeddings\(\)"),
        ("last to the head", "hidden states of all positions"),
        ("past the head", "does not call its head once"),
        ("not causal", "lets a position see later ones"),
        ("last alone", "changes the logits"),
    ],
)
def test_check_head_says_what_is_wrong(fault: str, said: str) -> None:
    """Each way in which a model may differ has its own reason, and the message names the model's class."""
    with pytest.raises(UnsupportedError, match=f"model=_Toy .*{said}"):
        check_head(_Toy(fault))


def test_a_module_that_is_no_language_model_is_refused() -> None:
    """A plain module has no head."""
    with pytest.raises(UnsupportedError, match=r"model=Linear has no get_output_embeddings\(\)"):
        call_with_head(nn.Linear(2, 2), torch.tensor([[0]]), product)


def test_what_is_wrapped_around_a_model_takes_part() -> None:
    """Under a wrapper that computes in bfloat16 the hidden states are bfloat16; the function runs outside of it."""
    model = wrap_autocast(_model("llama" if "llama" in MODELS else next(iter(MODELS))))
    modes: list[bool] = []

    def look(hidden_BTH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        modes.append(torch.is_autocast_enabled("cpu"))
        assert weight_VH.dtype == hidden_BTH.dtype
        return hidden_BTH

    hidden_BTH = call_with_head(model, torch.tensor([[2, 3, 4]]), look)
    plain_BTH = call_with_head(model.module, torch.tensor([[2, 3, 4]]), look)
    assert modes == [False, False]
    assert not torch.equal(hidden_BTH.float(), plain_BTH)
    torch.testing.assert_close(hidden_BTH.float(), plain_BTH, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_a_context_shorter_than_the_probe_is_checked_too(architecture: str) -> None:
    """A model that takes fewer tokens than the probe would have is held to the same, with learnt positions too."""
    config = ModelConfig(architecture=architecture, hidden_size=16, num_layers=1, num_heads=2, max_length=3)
    check_head(build_model(config, TOKENIZER, seed=0))


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(is_reentrant: bool) -> None:
    """Layers that are computed again in the backward pass give the gradients of those that are kept."""
    config = ModelConfig(hidden_size=128, num_layers=2, num_heads=4, max_length=128)
    ids_BT = torch.arange(8 * 100).remainder(len(TOKENIZER)).view(8, 100)  # large enough for oneDNN
    gradients = []
    for is_repeated in (False, True):
        model = build_model(config, TOKENIZER, seed=0).train()
        if is_repeated:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": is_reentrant})
            model.enable_input_require_grads()
        call_with_head(model, ids_BT, hidden_states).square().sum().backward()
        gradients.append(model.get_parameter("model.layers.0.mlp.up_proj.weight").grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)
