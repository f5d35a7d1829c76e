"""How a running server of SGLang is asked: JSON over HTTP, a time limit for each call, and one clear error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import TYPE_CHECKING, cast
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import attrs

from lightrft.errors import EngineCrashError, EngineStateError

if TYPE_CHECKING:
    from lightrft.strategy.protocols.rollout import SamplingParams

__all__ = ["Answer", "Drawn", "Server", "ask", "draw", "require_success", "require_weights", "said_by", "weights_of"]


@attrs.frozen(kw_only=True)
class Server:
    """A server that somebody started.

    Attributes:
        url: such as "http://127.0.0.1:30000".
        timeout_seconds: how long a call may take; the setting `engine.timeout_seconds`.
    """

    url: str
    timeout_seconds: float


@attrs.frozen(kw_only=True)
class Answer:
    """What a server said.

    Attributes:
        status: of HTTP.
        content: the JSON; text that is none as it came.
    """

    status: int
    content: object


@attrs.frozen(kw_only=True)
class Drawn:
    """What came of one request."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def ask(server: Server, path: str, content: Mapping[str, object] | None = None) -> Answer:
    """Return what a server answers, whatever that is.

    Args:
        server: the server.
        path: of the endpoint, such as "/generate".
        content: what is sent; None asks without.

    Raises:
        EngineCrashError: no answer came, or not in time.
    """
    body = None if content is None else json.dumps(content).encode()
    request = Request(server.url.rstrip("/") + path, data=body, headers={"Content-Type": "application/json"})  # noqa: S310 (the settings take http alone)
    opener = build_opener(ProxyHandler({}))  # prompts go to this server, and to nobody between
    try:
        with opener.open(request, timeout=server.timeout_seconds) as answer:
            return Answer(status=answer.status, content=_read(answer.read()))
    except HTTPError as refusal:
        with refusal:
            return Answer(status=refusal.code, content=_read(refusal.read()))
    except (OSError, HTTPException) as error:
        raise EngineCrashError(_no_answer(server, path, error)) from error


def _no_answer(server: Server, path: str, error: Exception) -> str:
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, TimeoutError):
        return (
            f"engine.timeout_seconds={server.timeout_seconds:g} passed before url={server.url!r} gave an answer to "
            f"{path}; raise it if calls take so long, or look at the server's log, and sync."
        )
    said = str(reason) or type(reason).__name__
    return f"url={server.url!r} gives no answer to {path} ({said}); look at the server's log, start it again and sync."


def require_success(answer: Answer, what: str) -> None:
    """Raise where a server did not do what it was asked for.

    Args:
        answer: what it said.
        what: the call, for the message.

    Raises:
        EngineStateError: it says no.
    """
    if answer.status != 200:
        raise EngineStateError(f"{what}: SGLang's server says {said_by(answer)}; look at its log.")


def said_by(answer: Answer) -> str:
    """Return an answer in one line of a message."""
    return f"{answer.status} ({' '.join(str(answer.content).split())[:300]})"


def weights_of(server: Server) -> str:
    """Return the name of the weights that a server has.

    Args:
        server: the server.

    Raises:
        EngineCrashError: no answer came.
        EngineStateError: it says no.
    """
    told = ask(server, "/model_info")
    require_success(told, "model_info")
    content = cast("dict[str, object]", told.content if isinstance(told.content, dict) else {})
    return str(content.get("weight_version"))


def require_weights(server: Server, found: object, given: str) -> None:
    """Raise where a server has other weights than those that it was given.

    Args:
        server: the server.
        found: the name of its weights.
        given: the name of those that it was given.

    Raises:
        EngineCrashError: the names differ.
    """
    if found != given:
        raise EngineCrashError(
            f"url={server.url!r} has the weights {found!r} and was given {given!r}: it was started again, or somebody "
            "else gave it weights; sync again."
        )


def draw(
    server: Server, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seeds: Sequence[int], version: str
) -> list[Drawn]:
    """Return what came of each request.

    Args:
        server: the server.
        prompts: token ids of each request.
        params: how tokens are drawn, by temperature alone.
        seeds: of the requests; a server draws by them where it was started with `--enable-deterministic-inference`.
        version: the name that its weights must have.

    Raises:
        EngineCrashError: no answer came, or the server has other weights.
        EngineStateError: the server says no, or made something else than what was asked for.
    """
    asked = {
        "input_ids": [list(prompt) for prompt in prompts],
        "sampling_params": [_params(params, seed) for seed in seeds],
        "return_logprob": True,
        "logprob_start_len": -1,
    }
    if not prompts:
        return []
    require_weights(server, weights_of(server), version)  # whoever has others there may have put it to sleep
    answer = ask(server, "/generate", asked)
    require_success(answer, "generate")
    made = cast("list[dict[str, object]]", answer.content)
    if len(made) != len(prompts):
        raise EngineStateError(f"generate: {len(made)} completions came for {len(prompts)} requests; look at its log.")
    return [_drawn(cast("dict[str, object]", one["meta_info"]), server, params, version=version) for one in made]


def _params(params: SamplingParams, seed: int) -> dict[str, object]:
    return {
        "temperature": params.temperature,
        "max_new_tokens": params.max_new_tokens,
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": not params.stop_token_ids,  # it ignores stop tokens, too
        "sampling_seed": seed,
        # a server can be told other values for those who say nothing
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "min_new_tokens": 0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
    }


def _drawn(told: Mapping[str, object], server: Server, params: SamplingParams, *, version: str) -> Drawn:
    require_weights(server, told.get("weight_version"), version)
    pairs = cast("list[tuple[float | None, int, object]]", told["output_token_logprobs"])
    reason = cast("dict[str, object]", told["finish_reason"])
    token_ids, logprobs = tuple(pair[1] for pair in pairs), tuple(pair[0] for pair in pairs)
    if reason["type"] == "stop" and token_ids[-1] not in params.stop_token_ids:
        raise EngineStateError(
            f"generate: the server's model ends texts at token {token_ids[-1]}; give it to stop_token_ids, too."
        )
    if reason["type"] not in {"stop", "length"} or (reason["type"] == "length" and len(pairs) != params.max_new_tokens):
        raise EngineStateError(
            f"generate: SGLang ended a request of {params.max_new_tokens} tokens after {len(pairs)} ({reason}); start "
            "it with a larger --context-length."
        )
    finite = tuple(value for value in logprobs if value is not None and math.isfinite(value))
    if len(finite) != len(logprobs):
        raise EngineStateError(f"generate: a logprob is {logprobs}; the weights are not finite, sync them again.")
    return Drawn(token_ids=token_ids, logprobs=finite, finish_reason=str(reason["type"]))


def _read(body: bytes) -> object:
    text = body.decode(errors="replace")
    try:
        content: object = json.loads(text)
    except ValueError:
        return text
    return content
