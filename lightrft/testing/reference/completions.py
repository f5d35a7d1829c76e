"""What completions must be, by a computation that shares nothing with an engine: the model's own forward, in float64.

T tokens, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, Protocol

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lightrft.errors import LawError
from lightrft.strategy.protocols import Completion, Prompt, SamplingParams
from lightrft.testing.reference.requests import completions_problem

__all__ = [
    "BOUND",
    "DrawAgain",
    "Refusal",
    "refusal",
    "require_greedy",
    "require_logprobs",
    "require_refusal",
    "require_requests",
    "require_same",
    "require_same_draws",
    "require_same_greedy",
    "trainer_logits",
]

BOUND = 1e-4
"""In nats. Right engines differ from the trainer by 5e-7 to 1e-5 in float32, a wrong weight or position by 1e-2 or
more; for logits it is also the distance below which two tokens count as tied."""

_Params = ParamSpec("_Params")


@attrs.frozen(kw_only=True)
class Refusal:
    """An error that a call raised.

    Attributes:
        kinds: names of its type and of the types that it refines.
        message: what it says.
    """

    kinds: tuple[str, ...]
    message: str


def refusal(call: Callable[_Params, object], *args: _Params.args, **kwargs: _Params.kwargs) -> Refusal | None:
    """Return the error of a call, or None if there was none.

    Args:
        call: what to call.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    try:
        call(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 (which one it must be is the law's to say)
        return Refusal(kinds=tuple(kind.__name__ for kind in type(error).__mro__), message=str(error))
    return None


def require_refusal(seen: Refusal | None, kind: type[Exception], *, of: str, naming: Sequence[str] = ()) -> None:
    """Raise unless a call was refused with an error of a type that says what it must.

    Args:
        seen: what `refusal` returned.
        kind: the type of error.
        of: the call, in words.
        naming: texts that must occur in its message.

    Raises:
        LawError: the call went through, or failed in another way.
    """
    if seen is None:
        raise LawError(f"{of} went through and must raise {kind.__name__}.")
    if kind.__name__ not in seen.kinds:
        raise LawError(f"{of} raised {seen.kinds[0]}({seen.message!r}) and must raise {kind.__name__}.")
    missing = [text for text in naming if text not in seen.message]
    if missing:
        raise LawError(f"{of} raised {seen.kinds[0]}({seen.message!r}), which must name {' and '.join(missing)}.")


def require_requests(
    made: Sequence[Completion], prompts: Sequence[tuple[int, ...]], sampling: SamplingParams, *, version: int
) -> None:
    """Raise unless completions are those that were asked for, by number, order, length and end.

    Args:
        made: the completions.
        prompts: token ids of each prompt.
        sampling: how tokens were drawn.
        version: version of the weights that made them.

    Raises:
        LawError: they are not.
    """
    asked = [Prompt(token_ids=prompt) for prompt in prompts]
    problem = completions_problem(made, asked, sampling, weight_version=version)
    if problem is not None:
        raise LawError(f"{problem}; sampling was {sampling}, and made were {list(made)}.")


def trainer_logits(
    model: nn.Module, made: Sequence[Completion], beside: Sequence[Mapping[str, Tensor]] = ()
) -> list[Tensor]:
    """Return for each completion the trainer's logits (T, V) before each of its tokens, in float64.

    Args:
        model: the plain model; called as `model(input_ids)`, it returns logits or an object with `logits`.
        made: the completions.
        beside: what the model is given beside the tokens of each completion; empty where all are of text.
    """
    if not made:
        return []
    rows = [torch.tensor(completion.prompt_ids + completion.token_ids) for completion in made]
    with torch.no_grad():
        logits = (
            # one by one: images of several sequences are arranged in a way of each model's own
            [
                _logits(model(row_T[None], **_as_long_as(row_T, inputs)))[0]
                for row_T, inputs in zip(rows, beside, strict=True)
            ]
            if beside
            # what follows a sequence on the right cannot be seen by a causal model
            else _logits(model(pad_sequence(rows, batch_first=True)))
        )
    places = [(len(completion.prompt_ids) - 1, len(completion.token_ids)) for completion in made]
    return [row_TV[start : start + length] for row_TV, (start, length) in zip(logits, places, strict=True)]


def _as_long_as(row_T: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a model is given beside a prompt with types of text for the completion, where tokens have types."""
    return {
        name: pad(tensor, (0, len(row_T) - tensor.shape[-1])) if name.endswith("token_type_ids") else tensor
        for name, tensor in inputs.items()
    }


def _logits(output: Tensor) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits.double()


def require_logprobs(
    made: Sequence[Completion],
    model: nn.Module,
    *,
    temperature: float,
    beside: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Raise unless every logprob is the trainer's own at the sampling temperature, before top-k and top-p.

    Args:
        made: the completions.
        model: the trainer's model.
        temperature: of the sampling; 0 means logprobs at 1.
        beside: as for `trainer_logits`.

    Raises:
        LawError: a logprob differs by more than `BOUND`.
    """
    for completion, logits_TV in zip(made, trainer_logits(model, made, beside), strict=True):
        policy_TV = torch.log_softmax(logits_TV / (temperature or 1.0), dim=-1)
        wanted_T = policy_TV.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        difference = (wanted_T - torch.tensor(completion.logprobs, dtype=torch.float64)).abs().max().item()
        if not difference <= BOUND:  # NaN is no agreement
            wanted = [round(value, 6) for value in wanted_T.tolist()]
            raise LawError(f"{completion}: its logprobs must be the trainer's, {wanted}, within {BOUND} nats.")


def require_greedy(
    made: Sequence[Completion],
    model: nn.Module,
    sampling: SamplingParams,
    *,
    beside: Sequence[Mapping[str, Tensor]] = (),
    never: Sequence[int] = (),
) -> None:
    """Raise unless every token has the trainer's largest logit, ties aside.

    Args:
        made: greedy completions.
        model: the trainer's model.
        sampling: how they were made; stop tokens do not count before `min_new_tokens`.
        beside: as for `trainer_logits`.
        never: tokens that do not count.

    Raises:
        LawError: a token has a smaller logit.
    """
    for completion, logits_TV in zip(made, trainer_logits(model, made, beside), strict=True):
        logits_TV[:, list(never)] = float("-inf")
        logits_TV[: sampling.min_new_tokens, list(sampling.stop_token_ids)] = float("-inf")
        seen_T = logits_TV.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        below_T = logits_TV.amax(-1) - seen_T > BOUND
        if below_T.any():
            best = logits_TV.argmax(-1).tolist()
            raise LawError(f"{completion}: greedy tokens must be those of the trainer's largest logits, {best}.")


def require_same_greedy(
    made: Sequence[Completion],
    wanted: Sequence[Completion],
    model: nn.Module,
    *,
    beside: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Raise unless two greedy completions of each prompt are the same up to their first tie.

    Args:
        made: the completions.
        wanted: what they must be.
        model: the trainer's model, which says what is a tie.
        beside: as for `trainer_logits`.

    Raises:
        LawError: they differ where there is no tie.
    """
    for seen, must, logits_TV in zip(made, wanted, trainer_logits(model, wanted, beside), strict=True):
        pairs = zip(seen.token_ids, must.token_ids, logits_TV, strict=False)
        split = next(((one, other, logits_V) for one, other, logits_V in pairs if one != other), None)
        if split is None and len(seen.token_ids) == len(must.token_ids):
            continue
        if split is None or abs(split[2][split[0]] - split[2][split[1]]) > BOUND:
            raise LawError(f"{seen} must be {must}.")


class DrawAgain(Protocol):
    """Draws with another seed what was compared."""

    def __call__(self, seed: int, /) -> tuple[Sequence[Completion], Sequence[Completion]]:
        """Return the completions, and what they must be.

        Args:
            seed: of the sampling.
        """
        ...


def require_same_draws(
    made: Sequence[Completion], wanted: Sequence[Completion], *, why: str, again: DrawAgain, seed: int
) -> None:
    """Raise unless completions have the same tokens.

    A draw within rounding of the border between two tokens can fall on either side. A border is 1e-7 wide, so it does
    not happen twice: where completions differ, other seeds decide, and none of theirs may.

    Args:
        made: the completions.
        wanted: what they must be.
        why: the rule, in words.
        again: draws both with another seed.
        seed: of `made` and `wanted`.

    Raises:
        LawError: they differ.
    """
    if not _different(made, wanted):
        return
    for other in range(seed + 1, seed + 1 + _NUM_OTHER_SEEDS):
        made, wanted = again(other)
        different = _different(made, wanted)
        if different:
            seen, must = different[0]
            raise LawError(
                f"{why}: with seed={seed} completions differ, and with seed={other} {len(different)} of {len(wanted)} "
                f"do, {seen} must be {must}."
            )


def require_same(
    made: Sequence[Completion],
    wanted: Sequence[Completion],
    model: nn.Module,
    *,
    sampling: SamplingParams,
    why: str,
    again: DrawAgain,
    beside: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Raise unless completions are the same: up to their first tie at temperature 0, by their draws at others.

    Args:
        made: the completions.
        wanted: what they must be.
        model: the trainer's model, which says what is a tie.
        sampling: how tokens were drawn.
        why: the rule, in words.
        again: draws both with another seed.
        beside: as for `trainer_logits`.

    Raises:
        LawError: they differ.
    """
    if sampling.temperature == 0:
        require_same_greedy(made, wanted, model, beside=beside)
    else:
        require_same_draws(made, wanted, why=why, again=again, seed=sampling.seed)


_NUM_OTHER_SEEDS = 3
"""A fault in one draw of three shows in one of them, or in another example."""


def _different(made: Sequence[Completion], wanted: Sequence[Completion]) -> list[tuple[Completion, Completion]]:
    return [(seen, must) for seen, must in zip(made, wanted, strict=True) if seen.token_ids != must.token_ids]
