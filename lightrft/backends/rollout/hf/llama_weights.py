"""The weights of a Llama-like model in the form in which the fused decoder multiplies with them.

Query, key and value projections become one matrix, and so do gate and up. The rows of queries and keys are reordered
so that the two numbers that a rotary embedding rotates stand side by side: then the rotation is one complex product.
The order is the same in queries and keys, so their dot products are unchanged.

Shapes: H hidden, V vocabulary, D head size, Q query heads, K key-value heads, A query and key heads (Q + K).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from torch import nn

from lightrft.backends.rollout.projection import Project, build_projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LayerWeights", "ModelShape", "read_head", "read_layer", "read_shape"]


@attrs.frozen(kw_only=True)
class ModelShape:
    """The sizes that the decoder needs.

    Attributes:
        num_layers: layers.
        num_heads: query heads (Q).
        num_kv_heads: key-value heads (K).
        head_size: D.
        norm_eps: epsilon of every RMSNorm.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    norm_eps: float


@attrs.frozen(kw_only=True, eq=False)
class LayerWeights:
    """One layer.

    Attributes:
        attention_norm_H: weight of the norm before attention.
        qkv: H -> (Q + 2K) * D, heads of queries, keys and values in this order.
        qk_norm_AD: weights of the norms of queries and keys, or None for models that have none.
        attention_output: Q * D -> H.
        mlp_norm_H: weight of the norm before the MLP.
        gate_up: H -> 2 * intermediate size, gate first.
        down: intermediate size -> H.
    """

    attention_norm_H: torch.Tensor
    qkv: Project
    qk_norm_AD: torch.Tensor | None
    attention_output: Project
    mlp_norm_H: torch.Tensor
    gate_up: Project
    down: Project


def read_shape(model: PreTrainedModel) -> ModelShape:
    """Return the sizes of a model that `explain_unsupported` has nothing against."""
    config = model.config
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        norm_eps=config.rms_norm_eps,
    )


def read_layer(model: PreTrainedModel, shape: ModelShape, layer: int) -> LayerWeights:
    """Return the weights of one layer as they are now.

    Args:
        model: a model that `explain_unsupported` has nothing against.
        shape: its sizes.
        layer: number of the layer.
    """
    parameters = dict(model.get_submodule(f"model.layers.{layer}").named_parameters())

    def join(*names: str) -> Project:
        weight_OI = _joined([parameters[f"{name}.weight"] for name in names], _num_rotary(names), shape)
        biases = [
            _rotary_rows(name, parameters[f"{name}.bias"], shape) for name in names if f"{name}.bias" in parameters
        ]
        return build_projection(weight_OI, torch.cat(biases) if biases else None)

    return LayerWeights(
        attention_norm_H=parameters["input_layernorm.weight"].detach(),
        qkv=join("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        qk_norm_AD=_qk_norm(parameters, shape),
        attention_output=join("self_attn.o_proj"),
        mlp_norm_H=parameters["post_attention_layernorm.weight"].detach(),
        gate_up=join("mlp.gate_proj", "mlp.up_proj"),
        down=join("mlp.down_proj"),
    )


def read_head(model: PreTrainedModel) -> Project:
    """Return the map from hidden states to logits as it is now, tied to the embeddings or not."""
    return build_projection(model.get_parameter("lm_head.weight"), None)


def _num_rotary(names: Sequence[str]) -> int:
    """Return how many of the projections, which are the first ones, make what is rotated."""
    return sum(name.endswith(("q_proj", "k_proj")) for name in names)


def _joined(parameters: Sequence[nn.Parameter], num_rotary: int, shape: ModelShape) -> torch.Tensor:
    """Return weights as one matrix.

    Those that keep the order of their rows become views of it: whoever writes into them later has written into it, and
    to join them again costs nothing. The first ones, whose rows are reordered, are copied each time.
    """
    if len(parameters) == 1:
        return parameters[0].detach()
    last, sizes = parameters[-1], [len(parameter) for parameter in parameters]
    shape_OI = (sum(sizes), last.shape[1])
    is_joined = last.untyped_storage().nbytes() == shape_OI[0] * shape_OI[1] * last.element_size() and [
        parameter.untyped_storage().data_ptr() == last.untyped_storage().data_ptr() for parameter in parameters
    ] == [place >= num_rotary for place in range(len(parameters))]
    joined_OI = (
        last.new_empty(0).set_(last.untyped_storage(), 0, shape_OI, (shape_OI[1], 1))
        if is_joined
        else last.new_empty(shape_OI)
    )
    for place, (part, parameter) in enumerate(zip(torch.split(joined_OI, sizes), parameters, strict=True)):
        if place < num_rotary:
            _write_rotary_rows(part, parameter.detach(), shape)
        elif not is_joined:
            part.copy_(parameter)
            parameter.data = part
    return joined_OI


def _write_rotary_rows(part: torch.Tensor, values: torch.Tensor, shape: ModelShape) -> None:
    """Write the rows of each query or key head reordered."""
    pairs = values.view(-1, 2, shape.head_size // 2, *values.shape[1:]).transpose(1, 2)
    part.view(pairs.shape).copy_(pairs)


def _rotary_rows(name: str, bias: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """Return a projection's bias, with that of each query or key head reordered."""
    if not name.endswith(("q_proj", "k_proj")):
        return bias.detach()
    return _interleave(bias.detach().view(-1, shape.head_size)).flatten()


def _qk_norm(parameters: dict[str, nn.Parameter], shape: ModelShape) -> torch.Tensor | None:
    if "self_attn.q_norm.weight" not in parameters:
        return None
    query_1D = _interleave(parameters["self_attn.q_norm.weight"].detach().unsqueeze(0))
    key_1D = _interleave(parameters["self_attn.k_norm.weight"].detach().unsqueeze(0))
    return torch.cat([query_1D.expand(shape.num_heads, -1), key_1D.expand(shape.num_kv_heads, -1)])


def _interleave(heads: torch.Tensor) -> torch.Tensor:
    """Return (heads, D, ...) with the order 0, D/2, 1, D/2 + 1, ... along D."""
    size = heads.shape[1]
    order_D = torch.arange(size, device=heads.device).view(2, size // 2).T.flatten()
    return heads[:, order_D]
