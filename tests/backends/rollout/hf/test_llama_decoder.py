"""Tests that the fused decoder computes what transformers computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pytest
import torch
from transformers import PreTrainedModel

from lightrft.backends.rollout.hf import llama_decoder
from lightrft.backends.rollout.hf.llama_decoder import build_llama_decoder
from lightrft.errors import EngineStateError


class BuildTinyModel(Protocol):
    def __call__(self, model_type: str, **overrides: object) -> PreTrainedModel: ...


MODELS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4, "head_dim": 12}),
    ("qwen2", {"num_key_value_heads": 1}),
    ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4, "head_dim": 8}),
    # Large enough for packed weights.
    ("qwen2", {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 600}),
]
RAGGED = [[5, 3, 9], [1], [7, 7, 2, 4, 11, 30], [8, 1, 4]]
EVEN = [[5, 3, 9], [1, 60, 2]]


def _model_logits(model: PreTrainedModel, sequence: Sequence[int]) -> torch.Tensor:
    """The logits (V,) that transformers gives after one unpadded sequence, without a cache."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([list(sequence)]), use_cache=False).logits
    return logits[0, -1]


@pytest.mark.parametrize("prompts", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize(("model_type", "overrides"), MODELS)
def test_logits_equal_transformers(
    tiny_model: BuildTinyModel, model_type: str, overrides: dict[str, object], prompts: list[list[int]]
) -> None:
    """After the prompts, after each step and after dropping sequences, logits equal the model's own to 1e-5."""
    model = tiny_model(model_type, **overrides)
    decoder = build_llama_decoder(model)
    decoder.refresh()
    rows = [0, 0, *range(len(prompts))]
    sequences = [list(prompts[row]) for row in rows]
    with torch.inference_mode():
        logits_BV, cache = decoder.prefill(prompts, torch.tensor(rows), 6)
        for position in range(6):
            expected_BV = torch.stack([_model_logits(model, sequence) for sequence in sequences])
            torch.testing.assert_close(logits_BV, expected_BV, atol=1e-5, rtol=1e-5)
            tokens_B = (torch.arange(len(sequences)) * 7 + position * 5) % 61
            if position == 2:
                kept_B = torch.tensor([0, *range(2, len(sequences))])
                decoder.keep_rows(cache, kept_B)
                sequences, tokens_B = [sequences[row] for row in kept_B.tolist()], tokens_B[kept_B]
            for sequence, token in zip(sequences, tokens_B.tolist(), strict=True):
                sequence.append(token)
            if position < 5:  # the last token of all is never read, so the cache has no room for it
                logits_BV = decoder.step(cache, tokens_B)


def test_passes_bound_the_tokens(tiny_model: BuildTinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts computed in several passes, one longer than a pass among them, give the same logits as in one."""
    decoder = build_llama_decoder(tiny_model("llama"))
    decoder.refresh()
    with torch.inference_mode():
        whole_BV, _ = decoder.prefill(RAGGED, torch.arange(4), 2)
        monkeypatch.setattr(llama_decoder, "_PREFILL_TOKENS", 5)
        split_BV, _ = decoder.prefill(RAGGED, torch.arange(4), 2)
    torch.testing.assert_close(split_BV, whole_BV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model_type", "overrides"), [MODELS[1], MODELS[-1]])
def test_refresh_follows_the_weights(tiny_model: BuildTinyModel, model_type: str, overrides: dict[str, object]) -> None:
    """After every parameter changed in place and a refresh, logits equal the changed model's; released, it refuses."""
    model = tiny_model(model_type, **overrides)
    decoder = build_llama_decoder(model)
    decoder.refresh()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1).add_(0.01)
    decoder.refresh()
    with torch.inference_mode():
        logits_BV, _ = decoder.prefill([[4, 2]], torch.tensor([0]), 2)
        torch.testing.assert_close(logits_BV[0], _model_logits(model, [4, 2]), atol=2e-5, rtol=2e-5)
        decoder.release()
        with pytest.raises(EngineStateError, match="refresh"):
            decoder.prefill([[4, 2]], torch.tensor([0]), 2)
        decoder.refresh()
        torch.testing.assert_close(decoder.prefill([[4, 2]], torch.tensor([0]), 2)[0], logits_BV)


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [
        ([3, 1, 4, 2], [[1, 3], [0], [2]]),
        ([1, 3], [[0, 1]]),
        ([2, 2, 2], [[0, 1], [2]]),
        ([9, 1], [[1], [0]]),
        ([1, 1, 1, 1, 1], [[0, 1, 2, 3], [4]]),
    ],
)
def test_prompts_are_read_in_passes_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], passes: list[list[int]]
) -> None:
    """Prompts come by ascending length; a pass takes as many as its tokens allow, and at least one."""
    monkeypatch.setattr(llama_decoder, "_PREFILL_TOKENS", 4)
    assert list(llama_decoder._passes(lengths)) == passes
