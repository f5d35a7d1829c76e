"""What all ranks must know before any goes on: results, and errors of any of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import cast

import torch

from lightrft.errors import CheckpointError, LightRFTError
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.strategy.protocols.collectives import Collectives

__all__ = ["together"]


def together(collectives: Collectives, action: Callable[[], dict[str, Json]]) -> list[dict[str, Json]]:
    """Do something on every rank, and return the results of all in rank order.

    Args:
        collectives: what carries the results.
        action: what this rank does.

    Raises:
        Exception: this rank's own error.
        CheckpointError: another rank's, with its number.
    """
    result: dict[str, Json] = {}
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001 (of a user's tokenizer, say: others must not wait for this rank)
        failure = error
    told = None if failure is None else str(failure) if isinstance(failure, LightRFTError) else repr(failure)
    messages = _exchange(collectives, {"error": told, "result": result})
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message["error"] is not None:
            raise CheckpointError(f"rank {rank}: {message['error']}")
    return [cast("dict[str, Json]", message["result"]) for message in messages]


def _exchange(collectives: Collectives, message: dict[str, Json]) -> list[dict[str, Json]]:
    line = bytearray(
        json.dumps(message).encode("ascii") + b"\n"
    )  # ranks' messages differ in length, so each ends its line
    gathered = collectives.all_gather(torch.frombuffer(line, dtype=torch.uint8))
    return [cast("dict[str, Json]", json.loads(one)) for one in bytes(gathered.tolist()).splitlines()]
