"""What the demo reaches: held-out accuracy before and after reinforcement, and its training time, for some seeds.

The seed changes the model's weights, the problems and the sampling. Training time is the sum of the steps' own times,
warm-up and reinforcement; the wall time of the command beside it has evaluations, checkpoints and start-up in it too.

    python benchmarks/demo.py --seeds 0 1 2 --write

Another engine changes nothing else: `--engine vllm` writes a table of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from paired import describe_machine, format_table, write_results

CONFIG = Path(__file__).resolve().parents[1] / "examples" / "demo.toml"
HEADER = ["seed", "before", "after", "points", "warm-up steps", "warm-up s", "reinforcement s", "command s"]


def rows_of(path: Path) -> list[dict[str, object]]:
    """Return the rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(seed: int, engine: str, folder: Path) -> list[str]:
    """Run the demo with a seed and an engine, and return its row of the table."""
    settings = [f"run.dir={folder}", f"strategy.seed={seed}", f"data.seed={seed}", "--engine", engine]
    started = time.perf_counter()
    command = [sys.executable, "-m", "lightrft", "train", str(CONFIG), *settings, "--quiet"]
    subprocess.run(command, check=True, stdout=sys.stderr)  # noqa: S603  # our own command
    seconds = time.perf_counter() - started
    accuracies = [row["accuracy"] for row in rows_of(folder / "metrics.jsonl") if row["kind"] == "evaluation"]
    spent: dict[str, list[float]] = {"warmup": [], "step": []}
    for row in rows_of(folder / "timings.jsonl"):
        spent[str(row["kind"])].append(float(str(row["seconds"])))
    before, after = float(str(accuracies[0])), float(str(accuracies[-1]))
    return [
        str(seed),
        f"{before:.1%}",
        f"{after:.1%}",
        f"{100 * (after - before):+.1f}",
        str(len(spent["warmup"])),
        f"{sum(spent['warmup']):.0f}",
        f"{sum(spent['step']):.0f}",
        f"{seconds:.0f}",
    ]


def main() -> None:
    """Print the table, and write it to results/demo.md when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--engine", default="hf", help="registry key of the engine (default hf)")
    parser.add_argument(
        "--write", action="store_true", help="write results/demo.md, or demo_ENGINE.md of another engine"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            rows.append(run(seed, arguments.engine, Path(folder) / str(seed)))
            print(rows[-1], file=sys.stderr)
    machine = describe_machine("torch", "transformers", "reasoning-gym")
    text = f"{format_table(HEADER, rows)}\n\n{machine}, engine {arguments.engine}\n"
    print(text)
    if arguments.write:
        name = "demo" if arguments.engine == "hf" else f"demo_{arguments.engine}"
        write_results(name, f"# {__doc__.strip()}\n\n{text}")


if __name__ == "__main__":
    main()
