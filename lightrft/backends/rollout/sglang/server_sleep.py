"""A server of SGLang asleep and awake: the name of its weights says which it is.

SGLang ends where it is told to release memory that is released, or to resume memory that is not, and tells nobody which
is the case. So an engine that puts a server to sleep renames its weights, and whoever finds that name wakes it.
"""

from __future__ import annotations

from typing import cast

from lightrft.backends.rollout.sglang.server_calls import Server, ask, require_success, weights_of

__all__ = ["flush", "put_to_sleep", "wake_up"]

_ASLEEP = "-asleep"
"""What the name of weights ends with while the server sleeps."""

_CACHE = {"tags": ["kv_cache"]}
"""What sleeps: the server would forget released weights."""

_IDLE_SECONDS = 60
"""How long the server may take to end what it was asked before; with requests under way it drops nothing."""


def flush(server: Server) -> None:
    """Let a server end what it was asked before, and drop what it keeps of it.

    Args:
        server: the server.
    """
    require_success(ask(server, f"/flush_cache?timeout={_IDLE_SECONDS}", {}), "flush_cache")


def put_to_sleep(server: Server, name: str) -> bool:
    """Release the memory of a server's cache, and return whether it was done: not where its weights are of others.

    Args:
        server: the server.
        name: of the weights that it was given.
    """
    if weights_of(server) != name:
        return False
    flush(server)
    # first, so that no server is asleep without the name, whichever of the two calls fails
    _rename(server, name + _ASLEEP)
    require_success(ask(server, "/release_memory_occupation", _CACHE), "sleep")
    return True


def wake_up(server: Server, name: str | None = None) -> None:
    """Wake a server that an engine put to sleep; any other one is left as it is.

    Where the last call gets no answer nobody knows whether the server is awake, and its name says that it is.

    Args:
        server: the server.
        name: of the weights with which it was put to sleep; None wakes it whoever did.
    """
    found = weights_of(server)
    if not found.endswith(_ASLEEP) or name not in {None, found.removesuffix(_ASLEEP)}:
        return
    # first, so that nobody resumes twice, whichever call fails
    _rename(server, found.removesuffix(_ASLEEP))
    if not _saves_memory(server):
        # then both calls only keep books: a second release is legal, and somebody may have resumed it by hand
        flush(server)
        require_success(ask(server, "/release_memory_occupation", _CACHE), "wake")
    require_success(ask(server, "/resume_memory_occupation", _CACHE), "wake")


def _rename(server: Server, name: str) -> None:
    wanted = {"new_version": name, "abort_all_requests": False}
    require_success(ask(server, "/update_weight_version", wanted), "update_weight_version")


def _saves_memory(server: Server) -> bool:
    told = ask(server, "/server_info")
    require_success(told, "server_info")
    content = cast("dict[str, object]", told.content if isinstance(told.content, dict) else {})
    return content.get("enable_memory_saver") is not False
