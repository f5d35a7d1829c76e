"""The machinery that every benchmark here shares: interleaved timing, an A/A control, peak memory, tables.

The method, and why each part is needed:

- One process, one thread (`OMP_NUM_THREADS=1`) and CPU time, so that what other processes do costs us little.
- Variants run in a new random order in every round, so that drift (frequency, caches, neighbours) hits all alike.
- Medians over rounds, and ratios formed inside a round before their median is taken.
- One variant runs twice under two names (the A/A control). If its two medians differ by more than the tolerance, then
  the run could not have seen a real difference of that size either: it is void, not failed, and is to be repeated.
- Memory in a fresh process per variant, because an allocator keeps what an earlier variant has freed.

Use it from a script in this folder with `from paired import ...`. Only Linux has the files under /proc that it reads.
"""

from __future__ import annotations

import ctypes
import datetime as dt
import gc
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

__all__ = [
    "CONTROL_TOLERANCE",
    "VOID_EXIT_CODE",
    "check_control",
    "control_error",
    "describe_machine",
    "format_table",
    "interleave",
    "last_line_of",
    "median",
    "paired_ratio",
    "peak_bytes",
    "peak_bytes_above_now",
    "peak_memory",
    "print_table",
    "write_results",
]

CONTROL_TOLERANCE = 0.02
"""How far the two halves of the A/A control may differ in one process, as a fraction. Two processes want 0.05."""

VOID_EXIT_CODE = 3
"""What a void run exits with; a failed assertion exits with 1, as Python does."""


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    seed: int = 0,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.process_time,
    before_each: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of every round of every variant, measured in a new random order in each round.

    Args:
        variants: what to run, by name. Name one function twice to have an A/A control.
        rounds: how often each variant is measured.
        seed: of the order of variants.
        warmup: how often each variant runs unmeasured before the first round.
        clock: CPU seconds of this process; `time.perf_counter` for variants that wait for other processes or a disk.
        before_each: called before each run, unmeasured, such as to remove what the last one wrote.
    """

    def prepare() -> None:
        if before_each is not None:
            before_each()

    order = list(variants)
    generator = random.Random(seed)  # noqa: S311  # an order of runs needs no cryptography
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for run in variants.values():
        for _ in range(warmup):
            prepare()
            run()
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            prepare()
            seconds[name].append(_seconds_of(variants[name], clock))
    return seconds


def _seconds_of(run: Callable[[], object], clock: Callable[[], float]) -> float:
    gc.collect()  # one variant does not pay for what another one left
    start = clock()
    run()
    return clock() - start


def median(samples: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(samples)


def paired_ratio(samples: Mapping[str, Sequence[float]], numerator: str, denominator: str) -> float:
    """Return the median over rounds of numerator / denominator, which cancels the drift that both of a round share."""
    return median([a / b for a, b in zip(samples[numerator], samples[denominator], strict=True)])


def control_error(samples: Mapping[str, Sequence[float]], first: str, second: str) -> float:
    """Return by what fraction the medians of the two names of one variant differ: 0 on a machine without noise."""
    return median(samples[first]) / median(samples[second]) - 1.0


def check_control(
    samples: Mapping[str, Sequence[float]], first: str, second: str, tolerance: float = CONTROL_TOLERANCE
) -> None:
    """End the program with `VOID_EXIT_CODE` and a message if the A/A control is off by more than `tolerance`.

    Call it after the table is printed, so that a void run can still be looked at.
    """
    error = control_error(samples, first, second)
    if abs(error) > tolerance:
        print(f"VOID: A/A={error:+.1%} is outside +-{tolerance:.0%}; run again on a quieter machine.", file=sys.stderr)
        raise SystemExit(VOID_EXIT_CODE)


def peak_bytes_above_now(run: Callable[[], object]) -> int:
    """Return by how many bytes the resident memory of this process grows at most while `run` runs.

    Free pages go back to the system first, because a page that the allocator kept would be used again unseen. Run once
    before measuring if what happens on a first call only (imports, compilation) is not to count.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="ascii"
    )  # 5: the high-water mark becomes what is resident now
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def peak_bytes() -> int:
    """Return the peak resident bytes of this process since its program began (`ru_maxrss` would count its parent's)."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))  # "VmRSS:  123 kB"


def peak_memory(command: Sequence[str]) -> int:
    """Return the bytes that `command` prints as its last line; it is run in a fresh process.

    The command measures with `peak_bytes_above_now` and prints the number; mostly it is the calling script itself.
    """
    return int(last_line_of(command))


def last_line_of(command: Sequence[str]) -> str:
    """Return the last line that `command` prints.

    Raises:
        subprocess.CalledProcessError: if it fails; what it wrote to stderr has been shown.
    """
    done = subprocess.run(list(command), check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603  # our own scripts
    return done.stdout.strip().splitlines()[-1]


def describe_machine(*packages: str) -> str:
    """Return one line about the processor, the load, the threads and the versions of Python and `packages`."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    today = f"{dt.datetime.now(tz=dt.UTC):%Y-%m-%d}"
    return (
        f"{today}, {model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"OMP_NUM_THREADS={threads}, Python {platform.python_version()}, {versions}"
    )


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up, the first to the left and the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), "|" + "|".join(f" {cell} " for cell in rule) + "|", *(line(row) for row in rows)])


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print `format_table(header, rows)`."""
    print(format_table(header, rows), flush=True)


def write_results(name: str, text: str) -> Path:
    """Write `text` to results/<name>.md beside this file and return the path."""
    path = Path(__file__).parent / "results" / f"{name}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
