"""Loads checkpoints while Python reports what it imports, compiles and unpickles. Run by test_no_code.py.

Reads one JSON object from stdin: the strategy, and directories. A checkpoint of this process's own is loaded first, so
that whatever loading itself imports is there. Prints one JSON object: by directory the events, and the error if it had
one.
"""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import suppress

import strategy_programs as programs
from torch import nn

from lightrft.config import EngineConfig, StrategyConfig
from lightrft.errors import CheckpointError
from lightrft.strategy import get_strategy
from lightrft.testing.ranks.here import scratch_directory
from lightrft.testing.subject import Rank

WATCHED = {
    "import",
    "exec",
    "compile",
    "pickle.find_class",
    "marshal.loads",
    "subprocess.Popen",
    "os.system",
    "ctypes.dlopen",
}


def main() -> None:
    request = json.load(sys.stdin)
    rank = Rank(
        rank=0, world_size=1, directory=None, build=get_strategy, config=StrategyConfig(), engine=EngineConfig()
    )
    job = programs.Job(strategy=request["strategy"], zero_stage=request["zero_stage"], directories=[], seed=3)
    strategy, trainable = programs.built(rank, job)
    programs.train(strategy, trainable, rank, range(1))
    with scratch_directory() as scratch:
        state = {"all": [2**70, float("inf"), {"$": 1}]}
        strategy.save_ckpt({"actor": trainable}, scratch, client_state=state)
        strategy.load_ckpt({"actor": trainable}, scratch)
        with suppress(CheckpointError):  # what a refusal imports
            strategy.load_ckpt({"actor": nn.Linear(1, 1)}, scratch)
    events: list[str] = []
    is_watching = False

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if is_watching and event in WATCHED:
            events.append(f"{event} {arguments[:1]}")

    sys.addaudithook(watch)
    found: dict[str, object] = {}
    for directory in request["directories"]:
        error = None
        is_watching = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                strategy.load_ckpt({"actor": trainable}, directory)
        except CheckpointError as refused:
            error = str(refused)
        is_watching = False
        found[directory] = {"events": [*events], "error": error}
        events.clear()
    found["is_evil_imported"] = "evil" in sys.modules
    print(json.dumps(found))  # noqa: T201 (it is read)


if __name__ == "__main__":
    main()
