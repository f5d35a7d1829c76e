"""A server of SGLang in a process of its own, with a small model on this machine's CPU."""

from __future__ import annotations

import copy
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import attrs
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from lightrft.backends.rollout.sglang.server_calls import Server, ask
from lightrft.config import EngineConfig
from lightrft.errors import EngineCrashError

__all__ = ["Served", "serving", "settings_of"]

_START_SECONDS = 400  # on a machine that others use, too
_NUM_PORTS = 5  # somebody may take a free port before the server does

_ENVIRONMENT = {
    "SGLANG_PLATFORM": "lightrft_cpu",
    "SGLANG_USE_CPU_ENGINE": "0",
    "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    "OMP_NUM_THREADS": "1",
}

_OPTIONS = {
    "--host": "127.0.0.1",
    "--context-length": "64",  # more than any model here has, as some tokens of it are kept
    "--log-level": "error",
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--grammar-backend": "none",
    "--max-total-tokens": "4096",
    "--max-running-requests": "64",
}

_FLAGS = (
    "--skip-tokenizer-init",
    "--skip-server-warmup",
    "--disable-cuda-graph",
    "--disable-overlap-schedule",
    "--sleep-on-idle",
)


@attrs.frozen(kw_only=True)
class Served:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]


def settings_of(served: Served) -> EngineConfig:
    return EngineConfig(type="sglang", url=served.url, timeout_seconds=120.0)


@contextmanager
def serving(model: nn.Module, directory: Path, *, dtype: str = "float32") -> Generator[Served]:
    """Yield a server of a model, and end it."""
    inner = cast("PreTrainedModel", copy.deepcopy(model))
    inner.config.architectures, inner.config.eos_token_id = [type(inner).__name__], None
    cast("GenerationConfig", inner.generation_config).eos_token_id = None  # it would end texts by itself
    inner.save_pretrained(directory)
    of_model = {"--model-path": str(directory), "--dtype": dtype}
    options = [f"{name}={value}" for name, value in {**_OPTIONS, **of_model}.items()]
    served = _started([*options, *_FLAGS], directory)
    try:
        yield served
    finally:
        _end(served.process)


def _started(options: list[str], directory: Path) -> Served:
    for number in range(_NUM_PORTS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = directory / f"server-{number}.log"
        with log.open("wb") as lines:
            process = subprocess.Popen(  # noqa: S603 (our own program)
                # whatever ends the tests ends it, and its own processes with it
                [  # noqa: S607 (of every Linux)
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    sys.executable,
                    "-m",
                    "sglang.launch_server",
                    f"--port={port}",
                    *options,
                ],
                env={**os.environ, **_ENVIRONMENT},
                stdout=lines,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        served = Served(url=f"http://127.0.0.1:{port}", process=process)
        if _answers(served):
            return served
        _end(process)
    raise RuntimeError(f"no server came up; its log ends with {log.read_text(errors='replace')[-3000:]}")


def _answers(served: Served) -> bool:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and served.process.poll() is None:
        try:
            if ask(Server(url=served.url, timeout_seconds=10.0), "/health").status == 200:
                return True
        except EngineCrashError:
            time.sleep(0.2)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
