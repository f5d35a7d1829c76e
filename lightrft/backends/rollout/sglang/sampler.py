"""How SGLang draws tokens here: by our own function, in the place of its sampler.

SGLang's own sampler takes top-p of all tokens and not of what top-k leaves, reports logprobs from after
`min_new_tokens` banned tokens, and has random streams only together with other changes of its computation.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from lightrft.backends.rollout.random_streams import uniforms_at
from lightrft.backends.rollout.sampling import sample_tokens
from lightrft.backends.rollout.sglang.package import Request, Sampler, Sglang
from lightrft.strategy.protocols.rollout import SamplingParams

__all__ = ["own_sampler", "sample_rows"]


def own_sampler(package: Sglang, never: Sequence[int] = ()) -> Sampler:
    """Return a sampler of SGLang's kind; who runs SGLang sets its `params`, `keys_B` and the requests of its `rows`.

    Args:
        package: a running SGLang.
        never: ids that are not drawn.
    """

    def forward(sampler: Any, output: Any, *args: object, **kwargs: object) -> torch.Tensor:
        del args, kwargs  # what SGLang knows of the requests is not what they asked for
        tokens_B, output.next_token_logprobs = sample_rows(
            output.next_token_logits,
            rows=sampler.rows,
            keys_B=sampler.keys_B,
            params=sampler.params,
            never=sampler.never,
        )
        return tokens_B

    told: dict[str, object] = {"forward": forward, "rows": (), "params": None, "keys_B": None, "never": never}
    return cast("Sampler", type("OwnSampler", (package.sampler.Sampler,), told)())


def sample_rows(
    logits_BV: torch.Tensor,
    *,
    rows: Sequence[Request],
    keys_B: torch.Tensor,
    params: SamplingParams,
    never: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token for each row, and its logprob under the policy.

    Args:
        logits_BV: logits (B, V) of those requests of a call that are computed together.
        rows: these requests; the number of each in the call is its `rid`.
        keys_B: the random streams of all requests of the call.
        params: how tokens are drawn.
        never: ids that are not drawn.

    Returns:
        tokens (B,), int64, and logprobs (B,), float32.
    """
    numbers_B = torch.tensor([int(row.rid) for row in rows])
    lengths_B = torch.tensor([len(row.output_ids) for row in rows])
    uniforms_B = uniforms_at(keys_B[numbers_B], lengths_B)
    may_stop_B = lengths_B >= params.min_new_tokens
    never_C = torch.tensor(never, dtype=torch.int64)
    early_C = torch.tensor([*never, *params.stop_token_ids], dtype=torch.int64)
    tokens_B, logprobs_B = torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows))
    for of_B, banned_C in ((may_stop_B, never_C), (~may_stop_B, early_C)):
        places = of_B.nonzero()[:, 0]
        if len(places):
            tokens_B[places], logprobs_B[places] = sample_tokens(
                logits_BV[places],
                uniforms_B=uniforms_B[places],
                params=params,
                banned_C=banned_C if len(banned_C) else None,
            )
    return tokens_B, logprobs_B
