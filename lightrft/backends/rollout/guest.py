"""What an engine changes of the process that trains while it is a guest there, put back.

Engines such as vLLM and SGLang are made to own their process: they set environment variables, seed every random stream,
write to the root logger, replace functions of torch and freeze the garbage collector.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib import import_module

import torch

__all__ = ["as_guest"]


@contextmanager
def as_guest(environment: Mapping[str, str]) -> Generator[None]:
    """Give an engine its environment, and put back afterwards what it changes of the process.

    Args:
        environment: what the engine is told; a variable that the user has set is overwritten for the while.
    """
    before, set_num_threads = dict(os.environ), torch.set_num_threads
    num_threads, was_frozen = torch.get_num_threads(), gc.get_freeze_count() > 0
    state, numpy_random = random.getstate(), import_module("numpy").random
    numpy_state = numpy_random.get_state()
    root, hook = logging.getLogger(), sys.excepthook
    handlers, level = root.handlers[:], root.level
    os.environ.update(environment)
    if not was_frozen:
        gc.freeze()  # they collect garbage several times while they start; so it looks through their own objects alone
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _put_back(before)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        random.setstate(state)
        numpy_random.set_state(numpy_state)
        root.handlers[:] = handlers
        root.setLevel(level)
        sys.excepthook = hook
        if not was_frozen:
            gc.unfreeze()  # vLLM leaves frozen what is the trainer's, too


def _put_back(environment: Mapping[str, str]) -> None:
    """Write what differs and nothing else: a thread that reads a variable meanwhile may find it gone, or crash."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
