"""The forward pass up to the head, so that losses are formed without the logits of all tokens.

Shapes: B sequences, T positions, H hidden size, V vocabulary size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from lightrft.errors import UnsupportedError
from lightrft.models.context import context_size
from lightrft.models.onednn import linear_by_onednn

__all__ = ["check_head", "hidden_states_and_head"]

_PROBE_LENGTH = 6
"""Tokens of the probe: enough for a sequence, little enough to cost nothing."""

_PROBE_LOGIT = 100.0
"""Size of the planted logits: beyond any softcap in use (10 to 50), which small logits would hide."""


def hidden_states_and_head(model: nn.Module, input_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states after the last norm, and the head's weight: logits are `hidden @ weight.T`.

    Sequences are padded on the right, and no attention mask is passed: under causal attention a position sees only what
    stands before it, so padding never reaches a real token, and attention without a mask takes the fastest kernel. What
    comes out at padded positions has no meaning; leave it out by a mask of your own. `check_head` refuses other
    models.

    Args:
        model: a causal language model with transformers' `get_decoder` and `get_output_embeddings`.
        input_ids_BT: (B, T) int64; shorter sequences are padded on the right with any valid id.

    Returns:
        Hidden states (B, T, H) and weight (V, H) in the model's dtype; both can be differentiated.

    Raises:
        UnsupportedError: the model has no decoder or no output embeddings.

    Example:
        >>> from lightrft.config import ModelConfig
        >>> from lightrft.models.build import build_model_and_tokenizer
        >>> model, tokenizer = build_model_and_tokenizer(ModelConfig(hidden_size=16), seed=0)
        >>> ids_BT = torch.tensor([[2, 3, 1]])
        >>> hidden_BTH, weight_VH = hidden_states_and_head(model, ids_BT)
        >>> torch.allclose(hidden_BTH @ weight_VH.T, model(ids_BT).logits, atol=1e-5)
        True
    """
    return _hidden_states(model, input_ids_BT), cast("Tensor", _head(model).weight)


def check_head(model: nn.Module) -> None:
    """Refuse a model for which `hidden_states_and_head` would not mean the same as its logits.

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
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(p.name == "logits_to_keep" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise _refusal(model, "takes no logits_to_keep, so that every forward makes all logits")
    weight_VH = cast("Tensor", _head(model).weight)
    length = min(_PROBE_LENGTH, context_size(model) or _PROBE_LENGTH)
    ids_BT = (torch.arange(length, device=weight_VH.device) % len(weight_VH))[None]
    with torch.no_grad(), _evaluating(model):
        hidden_BTH = _hidden_states(model, ids_BT)
        _check_linear(model, hidden_BTH)
        _check_logits(model, ids_BT, hidden_BTH)
        _check_causal(model, ids_BT, hidden_BTH)


def _hidden_states(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Call the whole model, so that what a strategy wrapped around it takes part; pick up what its decoder returns."""
    decoder = cast("nn.Module", _ask(model, "get_decoder"))
    seen: list[Tensor] = []

    def pick_up(module: nn.Module, arguments: object, output: _DecoderOutput) -> None:
        del module, arguments
        seen.append(output.last_hidden_state)

    # Gradient checkpointing computes layers again in the backward pass, outside of this block, and demands the same
    # operators there.
    is_repeated = bool(getattr(model, "is_gradient_checkpointing", False))
    hook = decoder.register_forward_hook(pick_up)
    try:
        with nullcontext() if is_repeated else linear_by_onednn():
            # the logits of no position at all: the head's matrix product is left to the losses
            model(input_ids=ids_BT, attention_mask=None, use_cache=False, logits_to_keep=ids_BT[0, :0])
    finally:
        hook.remove()
    return seen[0]


def _head(model: nn.Module) -> nn.Module:
    return cast("nn.Module", _ask(model, "get_output_embeddings"))


def _ask(model: nn.Module, method: str) -> object:
    get = cast("Callable[[], object] | None", getattr(model, method, None))
    answer = None if get is None else get()
    if answer is None:
        raise _refusal(model, f"has no {method}()")
    return answer


def _check_linear(model: nn.Module, hidden_BTH: Tensor) -> None:
    head = _head(model)
    # A bias is zero in a fresh model, so that its effect would not show yet.
    if getattr(head, "bias", None) is not None:
        raise _refusal(model, "has a head with a bias")
    if not _equal(head(hidden_BTH), hidden_BTH @ cast("Tensor", head.weight).T):
        raise _refusal(model, "has a head that is not linear in the hidden states")


def _check_logits(model: nn.Module, ids_BT: Tensor, hidden_BTH: Tensor) -> None:
    """Plant large outputs of the head and look whether the model hands them on untouched."""
    seen: list[Tensor] = []
    vocabulary_size = len(cast("Tensor", _head(model).weight))
    planted_V = torch.linspace(-_PROBE_LOGIT, _PROBE_LOGIT, vocabulary_size, device=hidden_BTH.device)
    planted_BTV = planted_V.expand(*ids_BT.shape, vocabulary_size).to(hidden_BTH.dtype)

    def plant(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        del module, output
        seen.append(arguments[0])
        return planted_BTV

    hook = _head(model).register_forward_hook(plant)
    try:
        logits_BTV = cast("Tensor", model(input_ids=ids_BT, use_cache=False).logits)
    finally:
        hook.remove()
    if len(seen) != 1 or not _equal(seen[0], hidden_BTH):
        raise _refusal(model, "changes the hidden states between decoder and head")
    if not _equal(logits_BTV, planted_BTV):
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


class _DecoderOutput(Protocol):
    """What a decoder of transformers returns."""

    @property
    def last_hidden_state(self) -> Tensor: ...


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
