from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.data.padding import TokenBatch, pad_completions, pad_right, pad_sequences
from lightrft.errors import DataError
from lightrft.strategy.protocols.rollout import Completion

IDS = st.lists(st.integers(1, 99), min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5)


def _batch(pairs: list[tuple[list[int], list[int]]], pad_id: int = 0) -> TokenBatch:
    completions = [
        Completion(
            prompt_ids=tuple(prompt),
            token_ids=tuple(completion),
            logprobs=tuple(-float(token) - row / 8 for token in completion),
            finish_reason="stop",
            weight_version=0,
            sample_index=row,
        )
        for row, (prompt, completion) in enumerate(pairs)
    ]
    return pad_completions(completions, pad_id=pad_id)


@settings(deadline=None, max_examples=60)
@given(pairs=PAIRS, pad_id=st.integers(0, 9))
def test_every_column_aligns_with_the_token_that_it_predicts(
    pairs: list[tuple[list[int], list[int]]], pad_id: int
) -> None:
    """Position t reads token t and predicts token t + 1; mask and logprobs stand where that is a completion token."""
    batch = _batch(pairs, pad_id)
    assert batch.input_ids_BT.shape[1] == max(len(prompt) + len(completion) for prompt, completion in pairs) - 1
    for row, (prompt, completion) in enumerate(pairs):
        whole = prompt + completion
        for position in range(batch.input_ids_BT.shape[1]):
            is_real, is_completion = position < len(whole) - 1, len(prompt) <= position + 1 < len(whole)
            logprob = -float(whole[position + 1]) - row / 8 if is_completion else 0.0
            assert batch.input_ids_BT[row, position] == (whole[position] if is_real else pad_id)
            assert batch.targets_BT[row, position] == (whole[position + 1] if is_real else pad_id)
            assert batch.mask_BT[row, position] == is_completion
            assert batch.engine_logprobs_BT[row, position] == logprob
    assert batch.lengths == tuple(len(prompt) + len(completion) - 1 for prompt, completion in pairs)
    assert batch.targets_N.tolist() == [token for _, completion in pairs for token in completion]
    assert batch.engine_logprobs_N.tolist() == [-token - row / 8 for row, (_, c) in enumerate(pairs) for token in c]


@settings(deadline=None, max_examples=40)
@given(pairs=PAIRS, data=st.data())
def test_selecting_rows_is_padding_those_rows_alone(
    pairs: list[tuple[list[int], list[int]]], data: st.DataObject
) -> None:
    """A micro-batch of any rows in any order is the batch that these rows alone would have made."""
    indices = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=6))
    whole = pad_sequences(*zip(*pairs, strict=True), pad_id=7)
    alone = pad_sequences(*zip(*[pairs[index] for index in indices], strict=True), pad_id=7)
    selected = whole.select(indices)
    for name in ("input_ids_BT", "targets_BT", "mask_BT", "engine_logprobs_BT"):
        assert torch.equal(getattr(selected, name), getattr(alone, name)), name
    assert selected.lengths == alone.lengths


def test_dtypes_and_moving() -> None:
    """Ids are int64, the mask is bool, logprobs are float32; `to` moves every tensor."""
    batch = _batch([([1, 2], [3])])
    tensors = [batch.input_ids_BT, batch.targets_BT, batch.mask_BT, batch.engine_logprobs_BT]
    assert [tensor.dtype for tensor in tensors] == [torch.int64, torch.int64, torch.bool, torch.float32]
    moved = batch.to("meta")
    assert {
        tensor.device.type for tensor in (moved.input_ids_BT, moved.targets_BT, moved.mask_BT, moved.engine_logprobs_BT)
    } == {"meta"}
    assert moved.lengths == (2,)


def test_rows_can_be_selected_by_a_range() -> None:
    """A range is as good as a list."""
    batch = _batch([([1], [2]), ([3, 4, 5], [6]), ([7], [8])])
    assert batch.select(range(0, 3, 2)).input_ids_BT.tolist() == [[1], [7]]


@given(sequences=st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_padding_on_the_right_keeps_every_token(sequences: list[list[int]]) -> None:
    """The mask marks the real tokens, which are all there; the rest is the padding id, empty sequences too."""
    ids_BT, mask_BT = pad_right(sequences, pad_id=77)
    assert [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)] == sequences
    assert set(ids_BT[~mask_BT].tolist()) <= {77}
    assert ids_BT.shape == mask_BT.shape == (len(sequences), max(map(len, sequences)))


@pytest.mark.parametrize(
    ("prompts", "completions", "logprobs", "said"),
    [
        ([], [], None, "sequences=.. is empty"),
        ([[1]], [], None, r"len\(completions\)=0 differs"),
        ([[1]], [[2]], [], r"len\(completions\)=1 differs"),
        ([[1], []], [[2], [3]], None, r"prompts\[1\]=\[\] is empty"),
        ([[1], [2]], [[], [3]], None, r"completions\[0\]=\[\] is empty"),
        ([[1]], [[2, 3]], [[0.5]], r"len\(logprobs\[0\]\)=1 differs from the 2 tokens"),
    ],
)
def test_what_cannot_be_a_batch_is_named(
    prompts: list[list[int]], completions: list[list[int]], logprobs: list[list[float]] | None, said: str
) -> None:
    """Nothing, numbers that do not match, and a completion that no token predicts are data errors."""
    with pytest.raises(DataError, match=said):
        pad_sequences(prompts, completions, logprobs=logprobs)
