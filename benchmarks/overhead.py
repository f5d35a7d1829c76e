"""What the strategy layer costs: microseconds that it adds to a step, and milliseconds that it adds to an import.

Step: Linear(4, 4), one sample, forward, backward, clipping, fused AdamW, gradients cleared. A model this small leaves
nothing but overhead, so what a variant adds to the raw loop is what it adds to every step of every model. Raw PyTorch,
"single", Lightning Fabric and Accelerate run in one process, interleaved, and must end with equal losses.

Import: CPU time of `import lightrft` and `import lightrft.strategy` in a process that has imported torch, from compiled
bytecode, as every import but the first one is.

    python benchmarks/overhead.py [--rounds 300] [--steps 40] [--write]

Every figure is a median of CPU time with an A/A control beside it (raw against raw); a run whose control is off by more
than 2 % of a raw step is void and exits with 3.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import torch
from paired import check_control, describe_machine, format_table, interleave, last_line_of, median, write_results
from torch import nn

from lightrft.strategy import get_strategy

MAX_STEP_US = 30.0
MAX_IMPORT_MS = 50.0
MAX_NORM = 1e-3  # the loss is linear, so its gradient stays the same and above this: every step of every variant clips
LEARNING_RATE = 1e-3

Run = Callable[[], None]


def make_model() -> nn.Linear:
    """Return the model that every variant begins with."""
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return the optimizer of every variant that does not make its own."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


INPUTS = torch.linspace(-1.0, 1.0, 4).reshape(1, 4)


def build_raw(steps: int, losses: list[float]) -> Run:
    """Return the loop that one writes without a strategy."""
    model = make_model()
    optimizer = make_optimizer(model)

    def run() -> None:
        for _ in range(steps):
            loss = model(INPUTS).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    return run


def build_single(steps: int, losses: list[float]) -> Run:
    """Return the same loop under the strategy "single", which checks every gradient as well."""
    strategy = get_strategy({"strategy": "single", "max_norm": MAX_NORM})
    plain = make_model()
    optimizer = strategy.create_optimizer(plain, lr=LEARNING_RATE)
    model, optimizer, _ = strategy.prepare((plain, optimizer, None))

    def run() -> None:
        for _ in range(steps):
            loss = model(INPUTS).mean()
            strategy.backward(loss, model, optimizer)
            strategy.optimizer_step(optimizer, model, None)
        losses.append(loss.item())

    return run


def build_fabric(steps: int, losses: list[float]) -> Run:
    """Return the same loop under Lightning Fabric."""
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    plain = make_model()
    model, optimizer = fabric.setup(plain, make_optimizer(plain))

    def run() -> None:
        for _ in range(steps):
            loss = model(INPUTS).mean()
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    return run


def build_accelerate(steps: int, losses: list[float]) -> Run:
    """Return the same loop under Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    plain = make_model()
    model, optimizer = accelerator.prepare(plain, make_optimizer(plain))

    def run() -> None:
        for _ in range(steps):
            loss = model(INPUTS).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    return run


BUILDERS: Mapping[str, tuple[Callable[[int, list[float]], Run], str, str]] = {
    # name: (builder, package that it needs, how to install it)
    "raw": (build_raw, "torch", "pip install torch"),
    "raw again (A/A)": (build_raw, "torch", "pip install torch"),
    "lightrft single": (build_single, "lightrft", "pip install lightrft"),
    "Lightning Fabric": (build_fabric, "lightning_fabric", "pip install lightning-fabric"),
    "Accelerate": (build_accelerate, "accelerate", "pip install accelerate"),
}


def measure_steps(rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the microseconds of a step in every round, by variant; all variants must end with equal losses."""
    losses: dict[str, list[float]] = {}
    runs: dict[str, Run] = {}
    for name, (build, package, _) in BUILDERS.items():
        if importlib.util.find_spec(package) is not None:
            losses[name] = []
            runs[name] = build(steps, losses[name])
    gc.freeze()  # or the collection before every measurement would walk through all that the peers have imported
    seconds = interleave(runs, rounds, warmup=3)
    for name, found in losses.items():
        assert all(map(math.isclose, found, losses["raw"])), f"{name} computed other losses than the raw loop"
    return {name: [second / steps * 1e6 for second in samples] for name, samples in seconds.items()}


def added(samples: Mapping[str, Sequence[float]], name: str) -> float:
    """Return the median over rounds of what a variant adds to the raw loop of its round."""
    return median([mine - raw for mine, raw in zip(samples[name], samples["raw"], strict=True)])


def step_table(samples: Mapping[str, Sequence[float]]) -> str:
    """Return the table of steps."""
    rows: list[list[str]] = []
    for name, (_, _, install) in BUILDERS.items():
        if name not in samples:
            rows.append([name, "absent", f"`{install}`"])
        else:
            rows.append([name, f"{median(samples[name]):.1f}", f"{added(samples, name):+.1f}"])
    return format_table(["null step", "us", "us added to raw"], rows)


PROBE = """
import sys, time
import {first}
before, start = set(sys.modules), time.process_time()
{second}
print(time.process_time() - start, len(set(sys.modules) - before))
"""

IMPORTS = {
    "nothing (A/A)": "pass",
    "import lightrft": "import lightrft",
    "import lightrft.strategy": "import lightrft.strategy",
}


def measure_imports(rounds: int) -> dict[str, tuple[float, int]]:
    """Return (median CPU milliseconds, modules loaded) of every import, each in fresh processes that have torch."""
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in IMPORTS}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as bytecode:
        for _ in range(rounds + 1):
            for name, second in IMPORTS.items():
                program = PROBE.format(first="torch", second=second)
                command = [sys.executable, "-X", f"pycache_prefix={bytecode}", "-c", program]
                time, modules = last_line_of(command).split()
                found[name].append((float(time) * 1e3, int(modules)))
    # the first round compiled
    return {name: (median([time for time, _ in pairs[1:]]), pairs[0][1]) for name, pairs in found.items()}


def import_table(found: Mapping[str, tuple[float, int]]) -> str:
    """Return the table of imports."""
    rows = [[name, f"{time:.1f}", str(modules)] for name, (time, modules) in found.items()]
    return format_table(["after `import torch`", "CPU ms", "modules"], rows)


def main() -> None:
    """Measure, print, check against the targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="rounds of the null step")
    parser.add_argument("--steps", type=int, default=40, help="steps of one measurement")
    parser.add_argument("--import-rounds", type=int, default=7, help="fresh processes per import")
    parser.add_argument("--write", action="store_true", help="write results/overhead.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples = measure_steps(args.rounds, args.steps)
    imports = measure_imports(args.import_rounds)
    peers = [package for package in ("lightning_fabric", "accelerate") if importlib.util.find_spec(package)]
    machine = describe_machine("torch", *peers)
    text = f"# Overhead of the strategy layer\n\n{machine}\n\n{step_table(samples)}\n\n{import_table(imports)}\n"
    print(text)
    check_control(samples, "raw", "raw again (A/A)")
    single, strategy_import = added(samples, "lightrft single"), imports["import lightrft.strategy"][0]
    assert single <= MAX_STEP_US, f"single adds {single:.1f} us to a step, more than {MAX_STEP_US}"
    assert strategy_import <= MAX_IMPORT_MS, f"importing adds {strategy_import:.1f} ms, more than {MAX_IMPORT_MS}"
    if args.write:
        print(f"written to {write_results('overhead', text)}")


if __name__ == "__main__":
    main()
