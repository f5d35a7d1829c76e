"""The forward pass with a head of one's own, so that losses are formed without the logits of all tokens.

Shapes: B sequences, T positions, H hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction

from lightrft.errors import UnsupportedError
from lightrft.models.context import context_size
from lightrft.models.onednn import linear_by_onednn

__all__ = ["HeadFunction", "call_with_head", "check_head"]

_PROBE_LENGTH = 6
"""Tokens of the probe: enough for a sequence, little enough to cost nothing."""

_PROBE_LOGIT = 100.0
"""Size of the planted logits: beyond any softcap in use (10 to 50), which small logits would hide."""


class HeadFunction(Protocol):
    """What takes the place of a head."""

    def __call__(self, hidden_BTH: Tensor, weight_VH: Tensor, /) -> Tensor:
        """Return what is made of the hidden states, such as a loss; the head's logits are `hidden @ weight.T`.

        The weight may be whole inside of this call alone. What is to have a gradient must be what is returned; anything
        else that is kept must be detached.

        Args:
            hidden_BTH: (B, T, H), what the head is given.
            weight_VH: (V, H), in the dtype of the hidden states.
        """
        ...


def call_with_head(model: nn.Module, input_ids_BT: Tensor, head_fn: HeadFunction) -> Tensor:
    """Return what `head_fn` returns, which the model calls in place of its head.

    The whole model is called, and its head with the function as its forward. So everything that a strategy hung on
    model, layers and head takes part, forward and backward: weights that are spread over ranks are gathered when their
    turn comes. The function itself runs outside of autocast.

    Sequences are padded on the right, and no attention mask is passed: under causal attention a position sees only what
    stands before it, so padding never reaches a real token, and attention without a mask takes the fastest kernel. What
    comes out at padded positions has no meaning; leave it out by a mask of your own. `check_head` refuses other
    models.

    Args:
        model: a prepared or plain causal language model with transformers' `get_output_embeddings`.
        input_ids_BT: (B, T) int64; shorter sequences are padded on the right with any valid id.
        head_fn: called once.

    Raises:
        UnsupportedError: the model has no output embeddings.

    Example:
        >>> from lightrft.config import ModelConfig
        >>> from lightrft.models.build import build_model_and_tokenizer
        >>> model, tokenizer = build_model_and_tokenizer(ModelConfig(hidden_size=16), seed=0)
        >>> ids_BT = torch.tensor([[2, 3, 1]])
        >>> def last_logits(hidden_BTH, weight_VH):
        ...     return hidden_BTH[:, -1] @ weight_VH.T
        >>> torch.allclose(call_with_head(model, ids_BT, last_logits), model(ids_BT).logits[:, -1], atol=1e-5)
        True
    """
    head = _head(model)

    def forward(hidden_BTH: Tensor) -> Tensor:
        weight_VH = cast("Tensor", head.weight)
        # a mode sees every function that is called, at some microseconds each; this is for layers alone
        with torch.autocast(hidden_BTH.device.type, enabled=False), DisableTorchFunction():
            return head_fn(hidden_BTH, weight_VH.to(hidden_BTH.dtype))

    # Gradient checkpointing computes layers again in the backward pass, outside of this block, and demands the same
    # operators there.
    is_repeated = bool(getattr(model, "is_gradient_checkpointing", False))
    with _forward_replaced(head, forward), nullcontext() if is_repeated else linear_by_onednn():
        output = cast("_ModelOutput", model(input_ids=input_ids_BT, attention_mask=None, use_cache=False))
    return output.logits


def check_head(model: nn.Module) -> None:
    """Refuse a model for which `call_with_head` would not mean the same as its logits.

    Its logits must be `hidden @ weight.T` and nothing else (no bias, scale or softcap, whatever the weights become),
    and no position may see a later one. Modes and parameters of the model stay as they are. Costs three forwards.

    Args:
        model: the plain model, before it is prepared.

    Raises:
        UnsupportedError: the logits are something else, or attention is not causal.

    Example:
        >>> from lightrft.config import ModelConfig
        >>> from lightrft.models.build import build_model_and_tokenizer
        >>> check_head(build_model_and_tokenizer(ModelConfig(hidden_size=16), seed=0)[0])
    """
    weight_VH = cast("Tensor", _head(model).weight)
    length = min(_PROBE_LENGTH, context_size(model) or _PROBE_LENGTH)
    ids_BT = (torch.arange(length, device=weight_VH.device) % len(weight_VH))[None]
    with torch.no_grad(), _evaluating(model):
        _check_logits(model, ids_BT)
        hidden_BTH = _hidden_states(model, ids_BT)
        _check_linear(model, hidden_BTH)
        _check_causal(model, ids_BT, hidden_BTH)


def _hidden_states(model: nn.Module, ids_BT: Tensor) -> Tensor:
    def hand_on(hidden_BTH: Tensor, weight_VH: Tensor) -> Tensor:
        del weight_VH
        return hidden_BTH

    return call_with_head(model, ids_BT, hand_on)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Generator[None]:
    """Replace a module's forward for the time of the block; its hooks stay."""
    own = vars(module).get("forward")  # a backend may have put its own there
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _head(model: nn.Module) -> nn.Module:
    get = cast("Callable[[], nn.Module | None] | None", getattr(model, "get_output_embeddings", None))
    head = None if get is None else get()
    if head is None:
        raise _refusal(model, "has no get_output_embeddings()")
    return head


def _check_linear(model: nn.Module, hidden_BTH: Tensor) -> None:
    head = _head(model)
    # A bias is zero in a fresh model, so that its effect would not show yet.
    if getattr(head, "bias", None) is not None:
        raise _refusal(model, "has a head with a bias")
    if not _equal(head(hidden_BTH), hidden_BTH @ cast("Tensor", head.weight).T):
        raise _refusal(model, "has a head that is not linear in the hidden states")


def _check_logits(model: nn.Module, ids_BT: Tensor) -> None:
    """Plant large outputs of the head and look whether the model hands them on untouched."""
    seen: list[Tensor] = []

    def plant(hidden_BTH: Tensor, weight_VH: Tensor) -> Tensor:
        planted_V = torch.linspace(-_PROBE_LOGIT, _PROBE_LOGIT, len(weight_VH), device=hidden_BTH.device)
        seen.append(planted_V.expand(*hidden_BTH.shape[:-1], -1).to(hidden_BTH.dtype))
        return seen[-1]

    logits_BTV = call_with_head(model, ids_BT, plant)
    if len(seen) != 1 or seen[0].shape[:-1] != ids_BT.shape:
        raise _refusal(model, "does not call its head once, with the hidden states of all positions")
    if not _equal(logits_BTV, seen[0]):
        raise _refusal(model, "changes the logits after the head (a softcap or a scale)")


def _check_causal(model: nn.Module, ids_BT: Tensor, hidden_BTH: Tensor) -> None:
    other_BT = ids_BT.clone()
    other_BT[:, -1] = (other_BT[:, -1] + 1) % len(cast("Tensor", _head(model).weight))
    if not _equal(_hidden_states(model, other_BT)[:, :-1], hidden_BTH[:, :-1]):
        raise _refusal(model, "lets a position see later ones")


def _equal(left: Tensor, right: Tensor) -> bool:
    # Sums in another order agree to some units of the last place; a softcap, a scale or a later token moves far more.
    if left.shape != right.shape:
        return False
    largest = max(1.0, right.abs().max().item())
    return (left - right).abs().max().item() <= 64 * torch.finfo(right.dtype).eps * largest


def _refusal(model: nn.Module, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"model={type(model).__name__} {reason}; use a causal language model whose logits are hidden @ weight.T, "
        "such as Qwen3 or Llama."
    )


class _ModelOutput(Protocol):
    """What a language model of transformers returns."""

    @property
    def logits(self) -> Tensor: ...


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Switch dropout off for the time of the block; each module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training
