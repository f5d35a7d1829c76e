"""Tests of the decoder that calls a model's own forward."""

from __future__ import annotations

from typing import Protocol

import pytest
import torch
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from lightrft.backends.rollout.hf.transformers_decoder import build_transformers_decoder
from lightrft.errors import UnsupportedError


class BuildTinyModel(Protocol):
    def __call__(self, model_type: str, **overrides: object) -> PreTrainedModel: ...


MODELS = [
    ("qwen3", {"head_dim": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("gemma2", {"head_dim": 8, "sliding_window": 4}),
    ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    ("bloom", {"n_head": 4, "n_layer": 2}),
]
PROMPTS = [[5, 3, 9], [1], [7, 7, 2, 4, 11, 30]]


@pytest.mark.parametrize(("model_type", "overrides"), MODELS, ids=[name for name, _ in MODELS])
def test_logits_equal_unpadded_sequences(
    tiny_model: BuildTinyModel, model_type: str, overrides: dict[str, object]
) -> None:
    """With ragged prompts, after expansion and after dropping sequences, logits equal those of each sequence alone.

    The models cover rotary, learnt and linear-bias positions, sliding windows and soft-capped logits.
    """
    model = tiny_model(model_type, **overrides)
    decoder = build_transformers_decoder(model)
    sequences = [list(PROMPTS[row]) for row in (0, 1, 1, 2)]
    with torch.inference_mode():
        logits_BV, cache = decoder.prefill(PROMPTS, torch.tensor([0, 1, 1, 2]), 6)
        for position in range(6):
            alone = [model(input_ids=torch.tensor([sequence])).logits[0, -1] for sequence in sequences]
            torch.testing.assert_close(logits_BV, torch.stack(alone), atol=2e-5, rtol=2e-5)
            tokens_B = (torch.arange(len(sequences)) * 7 + position * 5) % 61
            if position == 2:
                decoder.keep_rows(cache, torch.tensor([0, 2, 3]))
                sequences, tokens_B = [sequences[0], *sequences[2:]], tokens_B[[0, 2, 3]]
            for sequence, token in zip(sequences, tokens_B.tolist(), strict=True):
                sequence.append(token)
            logits_BV = decoder.step(cache, tokens_B)


def test_encoder_decoder_models_are_refused() -> None:
    """T5 is no decoder-only model, and the error says what to use."""
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(UnsupportedError, match=r"T5ForConditionalGeneration.*AutoModelForCausalLM"):
        build_transformers_decoder(T5ForConditionalGeneration(config))
