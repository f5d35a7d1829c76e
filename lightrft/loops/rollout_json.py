"""A scored rollout as JSON, for a checkpoint: whoever goes on from there learns from it, bit for bit.

Shapes: B completions.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Literal, cast

import attrs
import torch

from lightrft.data.prompts import Problem
from lightrft.loops.collect import Scored
from lightrft.loops.ranks import cut
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.strategy.protocols.rollout import Completion, FinishReason

__all__ = ["rollout_from_json", "rollout_to_json"]


def rollout_to_json(scored: Scored) -> dict[str, Json]:
    """Return a rollout as JSON; its tokens and their logprobs are packed, since there may be millions.

    Args:
        scored: completions, those of a problem adjacent.
    """
    completions = scored.completions
    tokens = [token for completion in completions for token in completion.token_ids]
    logprobs = [value for completion in completions for value in completion.logprobs]
    # each problem once, with the number of its completions
    problems: list[Json] = []
    places: list[Json] = []
    last: Problem | None = None
    for problem, completion in zip(scored.problems, completions, strict=True):
        if problem is not last:
            own: dict[str, Json] = attrs.asdict(problem)
            problems.append({**own, "prompt_ids": list(completion.prompt_ids)})
            last = problem
        places.append(len(problems) - 1)
    return {
        "problems": problems,
        "places": places,
        "lengths": [len(completion.token_ids) for completion in completions],
        "token_ids": _pack(tokens, "q"),
        "logprobs": _pack(logprobs, "d"),
        "finish_reasons": [completion.finish_reason for completion in completions],
        "weight_versions": [completion.weight_version for completion in completions],
        "sample_indices": [completion.sample_index for completion in completions],
        "texts": list(scored.texts),
        "rewards": list[Json](scored.rewards_B.tolist()),
    }


def rollout_from_json(written: dict[str, Json]) -> Scored:
    """Return the rollout that `rollout_to_json` wrote.

    Args:
        written: what it returned.

    Raises:
        KeyError: something is missing.
        TypeError: something is of another type.
        ValueError: parts do not fit together.
    """
    # each value has the type that `rollout_to_json` gave it; the digest of the checkpoint vouches for that
    problems = [dict(one) for one in cast("list[dict[str, Json]]", written["problems"])]
    prompts = [tuple(cast("list[int]", one.pop("prompt_ids"))) for one in problems]
    known = [Problem(**one) for one in problems]  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    places = cast("list[int]", written["places"])
    lengths = cast("list[int]", written["lengths"])
    columns = zip(
        places,
        cut(cast("tuple[int, ...]", _unpack(written["token_ids"], "q")), lengths),
        cut(_unpack(written["logprobs"], "d"), lengths),
        cast("list[FinishReason]", written["finish_reasons"]),
        cast("list[int]", written["weight_versions"]),
        cast("list[int]", written["sample_indices"]),
        strict=True,
    )
    completions = [
        Completion(
            prompt_ids=prompts[place],
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            weight_version=weight_version,
            sample_index=sample_index,
        )
        for place, token_ids, logprobs, finish_reason, weight_version, sample_index in columns
    ]
    return Scored(
        problems=tuple(known[place] for place in places),
        completions=tuple(completions),
        texts=tuple(cast("list[str]", written["texts"])),
        rewards_B=torch.tensor(written["rewards"], dtype=torch.float32),
    )


def _pack(values: Sequence[float], kind: Literal["q", "d"]) -> str:
    # 8 bytes each, the lowest first, on every machine
    return base64.b64encode(struct.pack(f"<{len(values)}{kind}", *values)).decode("ascii")


def _unpack(packed: Json, kind: Literal["q", "d"]) -> tuple[float, ...]:
    data = base64.b64decode(cast("str", packed), validate=True)
    return struct.unpack(f"<{len(data) // 8}{kind}", data)
