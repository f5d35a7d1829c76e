"""Sequences of unequal length as rectangular batches.

Shapes: B sequences, T positions, N positions that predict a completion token, row by row.

A sequence s of L tokens (prompt, then completion) becomes L - 1 positions. Position t reads s[t] and predicts s[t + 1]:

    tokens       p0 p1 p2 c0 c1        prompt of 3, completion of 2
    input_ids    p0 p1 p2 c0
    targets      p1 p2 c0 c1
    mask         0  0  1  1            True where the target is a completion token
    logprobs     0  0  l0 l1           the engine's, of the target

So logits, targets, mask and logprobs stand at the same index, and nothing that uses them shifts anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from lightrft.errors import DataError

if TYPE_CHECKING:
    from lightrft.strategy.protocols.rollout import Completion

__all__ = ["TokenBatch", "pad_completions", "pad_right", "pad_sequences"]


@attrs.frozen(kw_only=True, eq=False)
class TokenBatch:
    """Padded sequences with what they predict; the module's text shows how the columns align.

    Attributes:
        input_ids_BT: (B, T) int64, padded on the right.
        targets_BT: (B, T) int64, the next token of each position.
        mask_BT: (B, T) bool, True where the target is a completion token.
        engine_logprobs_BT: (B, T) float32, the engine's logprob of the target in nats; 0 where the mask is False.
        lengths: real positions of each sequence, from 1 to T; plain numbers, so that trimming waits for no device.
    """

    input_ids_BT: Tensor
    targets_BT: Tensor
    mask_BT: Tensor
    engine_logprobs_BT: Tensor
    lengths: tuple[int, ...]

    @property
    def targets_N(self) -> Tensor:  # noqa: N802 (shape suffix)
        """Completion tokens, (N,) int64."""
        return self.targets_BT[self.mask_BT]

    @property
    def engine_logprobs_N(self) -> Tensor:  # noqa: N802 (shape suffix)
        """The engine's logprobs of the completion tokens, (N,) float32, in nats."""
        return self.engine_logprobs_BT[self.mask_BT]

    def select(self, indices: Sequence[int]) -> TokenBatch:
        """Return the sequences of these numbers, in this order, without the columns in which all of them are padding.

        Args:
            indices: numbers from 0 to B - 1, at least one; a range is as good as a list.
        """
        lengths = tuple(self.lengths[index] for index in indices)
        rows = torch.as_tensor(list(indices), device=self.mask_BT.device)
        length = max(lengths)
        return TokenBatch(
            input_ids_BT=self.input_ids_BT[rows, :length],
            targets_BT=self.targets_BT[rows, :length],
            mask_BT=self.mask_BT[rows, :length],
            engine_logprobs_BT=self.engine_logprobs_BT[rows, :length],
            lengths=lengths,
        )

    def to(self, device: torch.device | str) -> TokenBatch:
        """Return the batch with its tensors on a device.

        Args:
            device: where.
        """
        return attrs.evolve(
            self,
            input_ids_BT=self.input_ids_BT.to(device),
            targets_BT=self.targets_BT.to(device),
            mask_BT=self.mask_BT.to(device),
            engine_logprobs_BT=self.engine_logprobs_BT.to(device),
        )


def pad_right(sequences: Sequence[Sequence[int]], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return (ids, mask): the sequences side by side, shorter ones filled up on the right.

    Args:
        sequences: token ids, at least one sequence; each may be empty.
        pad_id: fills up.

    Returns:
        Ids (B, T) int64 with T the longest length, and mask (B, T) bool, True on real tokens.

    Raises:
        DataError: there is no sequence.

    Example:
        >>> pad_right([[5, 6], [7]], pad_id=0)[0]
        tensor([[5, 6],
                [7, 0]])
    """
    if not sequences:
        raise DataError("sequences=[] is empty; pad at least one sequence.")
    lengths_B = torch.tensor([len(sequence) for sequence in sequences])
    mask_BT = torch.arange(int(lengths_B.max()))[None] < lengths_B[:, None]
    ids_BT = torch.full(mask_BT.shape, pad_id, dtype=torch.int64)
    ids_BT[mask_BT] = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    return ids_BT, mask_BT


def pad_sequences(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    logprobs: Sequence[Sequence[float]] | None = None,
    pad_id: int = 0,
) -> TokenBatch:
    """Return prompts with their completions as one batch.

    Args:
        prompts: token ids of each prompt, at least one token.
        completions: token ids of each completion, at least one token.
        logprobs: the engine's logprob of each completion token, in nats; None means there was no engine (zeros).
        pad_id: fills up; which id does not matter to a causal model.

    Raises:
        DataError: nothing to pad, numbers that do not match, or an empty prompt or completion; its index is named.

    Example:
        >>> batch = pad_sequences([[5, 6]], [[7, 8]])
        >>> batch.input_ids_BT.tolist(), batch.targets_BT.tolist(), batch.mask_BT.tolist()
        ([[5, 6, 7]], [[6, 7, 8]], [[False, True, True]])
    """
    _check(prompts, completions, logprobs)
    whole = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    input_ids_BT, real_BT = pad_right([sequence[:-1] for sequence in whole], pad_id=pad_id)
    targets_BT, _ = pad_right([sequence[1:] for sequence in whole], pad_id=pad_id)
    # The last token of a prompt is the first position that predicts a token of the completion.
    first_B = torch.tensor([len(prompt) - 1 for prompt in prompts])
    mask_BT = real_BT & (torch.arange(real_BT.shape[1])[None] >= first_B[:, None])
    engine_logprobs_BT = torch.zeros(mask_BT.shape, dtype=torch.float32)
    if logprobs is not None:
        engine_logprobs_BT[mask_BT] = torch.tensor([value for row in logprobs for value in row], dtype=torch.float32)
    return TokenBatch(
        input_ids_BT=input_ids_BT,
        targets_BT=targets_BT,
        mask_BT=mask_BT,
        engine_logprobs_BT=engine_logprobs_BT,
        lengths=tuple(len(sequence) - 1 for sequence in whole),
    )


def pad_completions(completions: Sequence[Completion], *, pad_id: int = 0) -> TokenBatch:
    """Return an engine's completions, with their prompts and logprobs, as one batch.

    Args:
        completions: at least one, each with at least one token.
        pad_id: fills up.

    Raises:
        DataError: as for `pad_sequences`.
    """
    return pad_sequences(
        [completion.prompt_ids for completion in completions],
        [completion.token_ids for completion in completions],
        logprobs=[completion.logprobs for completion in completions],
        pad_id=pad_id,
    )


def _check(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]] | None,
) -> None:
    if len(prompts) != len(completions) or (logprobs is not None and len(logprobs) != len(completions)):
        raise DataError(
            f"len(completions)={len(completions)} differs from the number of prompts ({len(prompts)}) or of logprobs; "
            "give one of each."
        )
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt or not completion:
            empty = "completions" if prompt else "prompts"
            raise DataError(f"{empty}[{index}]=[] is empty; give it at least one token.")
        if logprobs is not None and len(logprobs[index]) != len(completion):
            raise DataError(
                f"len(logprobs[{index}])={len(logprobs[index])} differs from the {len(completion)} tokens of its "
                "completion; give one logprob a token."
            )
