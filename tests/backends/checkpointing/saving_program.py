"""A run that saves when it is told to, beside another one. Run by test_faults.py, two at a time.

Each line on stdin is one save: a JSON object with what `save_ckpt` is told, and the value of the only weight. Each is
answered by a line: the directory that was written, or the error.
"""

from __future__ import annotations

import json
import sys

from torch import nn

from lightrft.errors import CheckpointError
from lightrft.strategy import StrategyConfig, get_strategy


def main() -> None:
    strategy = get_strategy(StrategyConfig(strategy="single"))
    strategy.setup_distributed()
    print("ready", flush=True)  # noqa: T201 (it is read)
    for line in sys.stdin:
        request = json.loads(line)
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, request.pop("value"))
        try:
            answer = {"saved": str(strategy.save_ckpt(model, **request))}
        except CheckpointError as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
