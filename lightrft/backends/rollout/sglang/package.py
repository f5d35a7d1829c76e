"""The package SGLang: which versions are known, and how it is imported and started without changing this process.

What is used of it is written down here as protocols.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Protocol

import attrs
import torch
from torch import nn

from lightrft.backends.rollout.guest import as_guest
from lightrft.backends.rollout.sglang.platform import PLATFORM
from lightrft.errors import MissingPackageError, UnsupportedError

__all__ = [
    "Answer",
    "CachePool",
    "FinishedReason",
    "Logprobs",
    "ModelRunner",
    "NextBatch",
    "Request",
    "Sampler",
    "Scheduler",
    "Sglang",
    "TpWorker",
    "WeightUpdater",
    "import_sglang",
    "require_sglang",
    "undisturbed",
]

_VERSIONS = ("0.5.23",)
"""Versions whose inside `inside` knows, each held to the laws of engines."""

_INSTALL = "make an environment of its own for it, as docs/how-to/sglang.md says"

_ENVIRONMENT = {
    "SGLANG_PLATFORM": PLATFORM,  # this machine's CPU; no plug-in of another package is loaded
    "SGLANG_USE_CPU_ENGINE": "0",  # that is for kernels that are not published
    "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # it keeps some tokens of a context for itself
    "SGLANG_MAX_NEW_TOKENS_LIMIT": "0",  # the request's own bound is the only one
}
"""What SGLang is told while it is imported, started and asked."""


class Answer(Protocol):
    """What SGLang says to a wish."""

    success: bool
    message: str


class FinishedReason(Protocol):
    """Why a request ended."""

    def to_json(self) -> Mapping[str, object]:
        """Return its "type": "stop", "length" or "abort", and more."""
        ...


class Logprobs(Protocol):
    """The log-probabilities of a request."""

    output_token_logprobs_val: Sequence[float]


class Request(Protocol):
    """A request on its way."""

    rid: str
    eos_token_ids: set[int]
    output_ids: Sequence[int]
    logprob: Logprobs
    finished_reason: FinishedReason


class Sampler(Protocol):
    """What draws tokens, with what ours is told besides."""

    rows: Sequence[Request]
    params: object
    keys_B: object
    never: Sequence[int]


class CachePool(Protocol):
    """The key-value cache, a tensor of keys and one of values for each layer."""

    k_buffer: list[torch.Tensor]
    v_buffer: list[torch.Tensor]


class ModelRunner(Protocol):
    """What runs the model and owns the key-value cache."""

    model: nn.Module
    sampler: Sampler
    token_to_kv_pool: CachePool


class TpWorker(Protocol):
    """What owns the runner."""

    model_runner: ModelRunner


class WeightUpdater(Protocol):
    """What takes new weights."""

    def begin_weight_update(self, request: object) -> Answer:
        """Open an update."""
        ...

    def end_weight_update(self, request: object) -> Answer:
        """Close it."""
        ...


class NextBatch(Protocol):
    """What is to be computed next."""

    running_batch: object
    batch_to_run: object


class Scheduler(Protocol):
    """What owns everything else: `sglang.srt.managers.scheduler.Scheduler`."""

    tp_worker: TpWorker
    weight_updater: WeightUpdater
    running_batch: object
    last_batch: object

    def process_input_requests(self, requests: list[object]) -> None:
        """Take requests."""
        ...

    def is_fully_idle(self) -> bool:
        """Return whether no request is under way."""
        ...

    def get_next_batch_to_run(self, *, running_batch: object, last_batch: object) -> NextBatch:
        """Return what is to be computed next."""
        ...

    def run_batch(self, batch: object) -> object:
        """Compute it."""
        ...

    def process_batch_result(self, batch: object, result: object) -> None:
        """Give the tokens to their requests."""
        ...

    def init_running_status(self) -> None:
        """Forget the requests under way."""
        ...

    def init_chunked_prefill(self) -> None:
        """Forget the request of which a part was read."""
        ...

    def flush_cache(self, *, empty_cache: bool) -> bool:
        """Forget the keys and values of earlier prompts; return whether that was done."""
        ...

    def release_host_resources(self) -> None:
        """Free what is not memory of the model."""
        ...


@attrs.frozen(kw_only=True, eq=False)
class Sglang:
    """The modules of SGLang that are used."""

    bootstrap: ModuleType
    io_struct: ModuleType
    mm_schedule: ModuleType
    parallel_state: ModuleType
    runtime_context: ModuleType
    sampler: ModuleType
    sampling_params: ModuleType
    schedule_batch: ModuleType
    scheduler: ModuleType
    server_args: ModuleType
    tp_worker: ModuleType
    weight_utils: ModuleType


def require_sglang() -> None:
    """Refuse to go on without SGLang in a version that is known; it is not imported.

    Raises:
        MissingPackageError: it is not installed, or in another version.
    """
    wanted, number = " or ".join(_VERSIONS), _version()
    if number is None:
        raise MissingPackageError(f"package='sglang' is not installed ({wanted}); {_INSTALL}.")
    if number.split("+")[0] not in _VERSIONS:
        raise MissingPackageError(f"package='sglang' is {number} and must be {wanted}; {_INSTALL}.")


def _version() -> str | None:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def import_sglang() -> Sglang:
    """Return the package's modules; environment and random streams are afterwards what they were.

    Raises:
        MissingPackageError: it cannot be imported.
        UnsupportedError: the machine has an accelerator, or SGLang was imported for another device.
    """
    if torch.cuda.is_available():
        raise UnsupportedError(
            "engine='sglang' was never held to its laws on a GPU, and there is one; hide it with "
            "CUDA_VISIBLE_DEVICES=, or use the engine 'hf'."
        )
    if "SGLANG_LOGGING_CONFIG_PATH" not in os.environ:
        # it warns of much that is as it should be here, such as models of other kinds whose packages are missing
        logging.getLogger("sglang").setLevel(logging.ERROR)
    with undisturbed():
        try:
            platform = import_module("sglang.srt.platforms").current_platform  # looked for when it is first asked for
            package = Sglang(
                bootstrap=import_module("sglang.srt.distributed.bootstrap"),
                io_struct=import_module("sglang.srt.managers.io_struct"),
                mm_schedule=import_module("sglang.srt.managers.mm_schedule"),
                parallel_state=import_module("sglang.srt.distributed.parallel_state"),
                runtime_context=import_module("sglang.srt.runtime_context"),
                sampler=import_module("sglang.srt.layers.sampler"),
                sampling_params=import_module("sglang.srt.sampling.sampling_params"),
                schedule_batch=import_module("sglang.srt.managers.schedule_batch"),
                scheduler=import_module("sglang.srt.managers.scheduler"),
                server_args=import_module("sglang.srt.server_args"),
                tp_worker=import_module("sglang.srt.managers.tp_worker"),
                weight_utils=import_module("sglang.srt.model_loader.weight_utils"),
            )
        except Exception as error:  # of one of the hundred packages below it
            said = " ".join(str(error).split())[:200]
            raise MissingPackageError(f"package='sglang' cannot be imported ({said}); {_INSTALL}.") from error
    if type(platform).__module__ != import_module("lightrft.backends.rollout.sglang.platform").__name__:
        raise UnsupportedError(
            f"package='sglang' was imported by something else, for the device {platform.device_name!r}; start the "
            "engine 'sglang' first."
        )
    return package


@contextmanager
def undisturbed() -> Generator[None]:
    """Give SGLang its environment, and put back afterwards what it changes of the process."""
    with as_guest(_ENVIRONMENT):
        yield
