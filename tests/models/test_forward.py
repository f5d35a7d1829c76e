from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightrft.backends.training.autocast import wrap_autocast
from lightrft.config.sections import ModelConfig
from lightrft.data.padding import pad_right
from lightrft.errors import UnsupportedError
from lightrft.models.build import build_model
from lightrft.models.forward import check_head, hidden_states_and_head
from lightrft.models.tokenizer import build_character_tokenizer

TOKENIZER = build_character_tokenizer("abcdefgh")


def _model(architecture: str) -> nn.Module:
    config = ModelConfig(architecture=architecture, hidden_size=16, num_layers=2, num_heads=2, max_length=32)
    return build_model(config, TOKENIZER, seed=0)


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
        hidden_BTH, weight_VH = hidden_states_and_head(model, ids_BT)
        expected = [model(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences]
    torch.testing.assert_close((hidden_BTH @ weight_VH.T)[mask_BT], torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_through_the_logits(name: str) -> None:
    """A loss from hidden states and weight gives every parameter the gradient that the full model gives."""
    model = MODELS[name]
    ids_BT = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]])
    hidden_BTH, weight_VH = hidden_states_and_head(model, ids_BT)
    parameters = list(model.parameters())
    ours = torch.autograd.grad((hidden_BTH @ weight_VH.T).logsumexp(-1).sum(), parameters)
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
    assert not model.get_output_embeddings()._forward_hooks
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

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.fault == "no head" else self.head

    def forward(self, *, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        hidden_BTH = self.decoder(input_ids).last_hidden_state
        if self.fault == "between":
            hidden_BTH = hidden_BTH / 2
        if self.fault == "last alone":
            return SimpleNamespace(logits=self.head(hidden_BTH)[:, -1:])
        return SimpleNamespace(logits=self.head(hidden_BTH))


def test_a_model_of_ones_own_needs_the_two_methods_alone() -> None:
    """What is asked of a model is get_decoder and get_output_embeddings, not a class of transformers."""
    model = _Toy("none")
    check_head(model)
    hidden_BTH, weight_VH = hidden_states_and_head(model, torch.tensor([[1, 2]]))
    assert torch.equal(hidden_BTH @ weight_VH.T, model(input_ids=torch.tensor([[1, 2]])).logits)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no linear head", "not linear"),
        ("no head", r"has no get_output_embeddings\(\)"),
        ("between", "between decoder and head"),
        ("not causal", "lets a position see later ones"),
        ("last alone", "changes the logits"),
    ],
)
def test_check_head_says_what_is_wrong(fault: str, said: str) -> None:
    """Each way in which a model may differ has its own reason, and the message names the model's class."""
    with pytest.raises(UnsupportedError, match=f"model=_Toy .*{said}"):
        check_head(_Toy(fault))


def test_a_module_that_is_no_language_model_is_refused() -> None:
    """A plain module has no decoder."""
    with pytest.raises(UnsupportedError, match=r"model=Linear has no get_decoder\(\)"):
        hidden_states_and_head(nn.Linear(2, 2), torch.tensor([[0]]))


def test_a_model_that_always_makes_all_logits_is_refused() -> None:
    """Without `logits_to_keep` the forward pass would make the logits that this function is there to avoid."""
    model = _Toy("none")

    def forward(input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=model.head(model.decoder(input_ids).last_hidden_state))

    model.forward = forward
    with pytest.raises(UnsupportedError, match="takes no logits_to_keep"):
        check_head(model)


def test_what_is_wrapped_around_a_model_takes_part() -> None:
    """Under a wrapper that computes in bfloat16 the hidden states are bfloat16, as the wrapper's logits are."""
    model = wrap_autocast(_model("llama" if "llama" in MODELS else next(iter(MODELS))))
    hidden_BTH, _ = hidden_states_and_head(model, torch.tensor([[2, 3, 4]]))
    plain_BTH, _ = hidden_states_and_head(model.module, torch.tensor([[2, 3, 4]]))
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
        hidden_BTH, _ = hidden_states_and_head(model, ids_BT)
        hidden_BTH.square().sum().backward()
        gradients.append(model.get_parameter("model.layers.0.mlp.up_proj.weight").grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)
