"""Small models as plain data, so small in their numbers that sums of gradients have no rounding error."""

from __future__ import annotations

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor, nn

__all__ = ["PARTS", "ModelCase", "SmallModel", "build_model", "model_cases"]

PARTS = ("embedding", "middle", "bias", "scale", "odd")
"""Parts of a model whose parameters can be frozen."""


@attrs.frozen(kw_only=True)
class ModelCase:
    """A small language model.

    Attributes:
        vocabulary: number of token ids.
        hidden: size of the hidden states.
        tied: whether the head's weight is the embedding's.
        normed: whether there is a layer norm, which rounds.
        frozen: parts that ask for no gradient; what else there is keeps the model trainable.
        odd: shape of a parameter that fits no matrix product: 0-d, empty, prime sizes.
        seed: of the weights and of the offset, which are multiples of 1/4, and of the count of steps.
    """

    vocabulary: int = 7
    hidden: int = 4
    tied: bool = False
    normed: bool = False
    frozen: tuple[str, ...] = ()
    odd: tuple[int, ...] = (3,)
    seed: int = 0


class SmallModel(nn.Module):
    """A language model without attention: logits of a position follow from its token.

    Without a norm they are a polynomial of the weights with few terms, so that small multiples of 1/4 as weights and
    whole numbers as targets make losses and gradients that float32 holds exactly, in any order of summation.
    """

    def __init__(self, case: ModelCase) -> None:
        """Make the parameters.

        Args:
            case: what to build.
        """
        super().__init__()
        self.embedding: nn.Embedding = nn.Embedding(case.vocabulary, case.hidden)
        self.middle: nn.Linear = nn.Linear(case.hidden, case.hidden)
        self.norm: nn.Module = nn.LayerNorm(case.hidden) if case.normed else nn.Identity()
        self.scale: nn.Parameter = nn.Parameter(torch.empty(()))
        self.odd: nn.Parameter = nn.Parameter(torch.empty(case.odd))
        self.head: nn.Linear = nn.Linear(case.hidden, case.vocabulary, bias=False)
        self.steps: Tensor = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.offset: Tensor = nn.Buffer(torch.zeros(2))
        if case.tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids_BT: Tensor, broken: int | None = None) -> Tensor:
        """Return logits (B, T, V).

        Args:
            input_ids_BT: (B, T) int64 in [0, vocabulary).
            broken: place, among the parameters that are trained, of one whose gradient will not be a number; the
                logits stay what they are.
        """
        hidden_BTH = self.norm(self.middle(self.embedding(input_ids_BT)) * self.scale)
        logits_BTV: Tensor = self.head(hidden_BTH) + (self.odd.sum() + self.offset.sum())
        if broken is None:
            return logits_BTV
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad and parameter.numel()]
        # the slope of a root at zero is infinite
        return logits_BTV + (trained[broken].sum() * 0.0).abs().sqrt()


def build_model(case: ModelCase) -> SmallModel:
    """Return the model that a case describes; equal cases give equal bits.

    Args:
        case: what to build.

    Example:
        >>> build_model(ModelCase(vocabulary=5))(torch.tensor([[0, 4]])).shape
        torch.Size([1, 2, 5])
    """
    with torch.random.fork_rng(devices=[]):  # initialisation draws numbers that are thrown away
        model = SmallModel(case)
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("norm."):
                parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator) / 4)
        # never zero, which is what a buffer is that nobody restored
        model.steps.copy_(torch.randint(1, 1000, (), generator=generator))
        model.offset.copy_(torch.randint(1, 9, (2,), generator=generator) / 4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(_belongs(name, part) for part in case.frozen))
    return model


def _belongs(name: str, part: str) -> bool:
    owner = {"bias": "middle.bias", "middle": "middle.weight"}.get(part, part)
    return name == owner or name.startswith(f"{owner}.")


@st.composite
def model_cases(draw: DrawFn, *, exact: bool = True) -> ModelCase:
    """Return a strategy for small models, tied and untied, with frozen parts and odd shapes.

    Args:
        draw: hypothesis' own.
        exact: draw models without a norm alone.
    """
    case = ModelCase(
        vocabulary=draw(st.integers(2, 9)),
        hidden=draw(st.integers(1, 5)),
        tied=draw(st.booleans()),
        normed=not exact and draw(st.booleans()),
        frozen=tuple(sorted(draw(st.sets(st.sampled_from(PARTS), max_size=len(PARTS) - 1)))),
        odd=tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=2))),
        seed=draw(st.integers(0, 100)),
    )
    # a gradient without elements is finite whatever the loss, so something with elements is trained
    return attrs.evolve(case, frozen=()) if case.tied and 0 in case.odd and "odd" not in case.frozen else case
