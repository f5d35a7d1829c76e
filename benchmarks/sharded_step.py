"""What a step through "fsdp2" and "deepspeed" costs beside the raw loops: wall time, CPU time, collectives.

A step of a Qwen3 model of random weights, float32, on two processes over gloo with a thread each: two micro-batches
forward and backward, their gradient summed over ranks, clipped, AdamW, loss and norm read. The raw loops are
`fully_shard` on every layer with `clip_grad_norm_`, and `deepspeed.initialize` with the JSON that lightrft writes, but
that DeepSpeed counts micro-batches and clips by itself. Both have the kernel of AdamW that lightrft uses there, one
parameter group, and gradients that fsdp2 sums and stage 1 averages in the last micro-batch alone.

The variants of a row run in one launch, in an order that is new in every round and the same on all ranks. Ranks wait
for each other before and after a step, so its time is that of the slowest one. All variants must see the same losses
and norms in every step. A row is several launches whose rounds are put together, with the variants built in another
order in each: where a model happens to lie in memory stays for a launch, and is worth some percent.

- ratio: median over rounds of lightrft / raw, of which at most 1.03 is the target.
- A/A: the same of two copies of the raw loop, less 1. A row beyond 2 % is void, and the program exits with 3.
- CPU A/A, CPU ratio: the same of the CPU time of rank 0, which what else the machine does disturbs less.
- collectives: calls of torch.distributed's operators in a step, which must be the same by name.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import attrs
import torch
import torch.distributed as dist
from paired import (
    check_control,
    control_error,
    describe_machine,
    format_table,
    interleave,
    median,
    paired_ratio,
    write_results,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from lightrft.backends.training.zero.settings import zero_settings
from lightrft.backends.zero.package import import_deepspeed
from lightrft.config import ModelConfig, StrategyConfig
from lightrft.models.build import build_model_and_tokenizer
from lightrft.strategy import Strategy
from lightrft.testing.ranks.processes import processes
from lightrft.testing.subject import Rank, subject_of

TARGET = 1.03
WORLD_SIZE = 2
MICRO_BATCHES = 2
MICRO_BATCH_SIZE = 2
LENGTH = 64
LEARNING_RATE = 1e-5  # small, or rounding would grow apart over many steps
MAX_NORM = 1e-3  # below the norm of every step, so that every step clips
WARMUP = 4  # DeepSpeed's stage 3 learns in the first steps what to gather when
TIMEOUT = 1800.0  # seconds of one row
MODEL = ModelConfig(hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=4, num_key_value_heads=2)
RAW, AGAIN, OURS = "raw", "raw again (A/A)", "lightrft"

Step = Callable[[], tuple[float, float]]
"""Takes a step and returns its last loss on this rank, and the norm of its gradient."""


@attrs.frozen(kw_only=True)
class Case:
    """A row of the table.

    Attributes:
        strategy: registry key.
        zero_stage: of the strategy "deepspeed".
        rounds: how often each variant is measured.
        seed: of the order in which variants are built, and of that in which they run.
    """

    strategy: str
    zero_stage: int
    rounds: int
    seed: int


@attrs.frozen(kw_only=True)
class Measured:
    """What a rank saw, by variant.

    Attributes:
        seconds: of every round.
        cpu_seconds: of this process in every round.
        collectives: of a step, by name.
    """

    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]]
    collectives: dict[str, dict[str, int]]


ROWS: Mapping[str, tuple[str, int]] = {
    "fsdp2": ("fsdp2", 0),
    "deepspeed-1": ("deepspeed", 1),
    "deepspeed-2": ("deepspeed", 2),
    "deepspeed-3": ("deepspeed", 3),
}
"""Strategy and stage of every row."""


class RawEngine(Protocol):
    """What the raw loop uses of DeepSpeed's engine."""

    def backward(self, loss: Tensor, /) -> object: ...  # noqa: D102 (DeepSpeed's)
    def step(self) -> None: ...  # noqa: D102
    def get_global_grad_norm(self) -> float | Tensor: ...  # noqa: D102


def new_model() -> nn.Module:
    """Return the model that every variant begins with."""
    model, _ = build_model_and_tokenizer(MODEL, seed=0)
    return model


def micro_batches_of(rank: int) -> list[Tensor]:
    """Return a rank's token ids, which are the same in every step."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(2, 90, (MICRO_BATCH_SIZE, LENGTH), generator=generator) for _ in range(MICRO_BATCHES)]


def loss_of(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token."""
    logits_BTV: Tensor = model(input_ids=ids_BT, attention_mask=None, use_cache=False).logits
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def build_ours(strategy: Strategy, rank: int) -> Step:
    """Return the loop under a strategy."""
    plain = new_model()
    optimizer = strategy.create_optimizer(plain, lr=LEARNING_RATE)
    model, optimizer, _ = strategy.prepare((plain, optimizer, None))
    batches = micro_batches_of(rank)

    def step() -> tuple[float, float]:
        loss, norm = torch.tensor(math.nan), None
        for number, ids_BT in enumerate(batches, start=1):
            is_last = number == MICRO_BATCHES
            loss = loss_of(model, ids_BT)
            strategy.backward(loss, model, optimizer, is_boundary=is_last)
            norm = strategy.optimizer_step(optimizer, model, None, is_boundary=is_last).grad_norm
        assert norm is not None, "the window is not complete"
        return loss.item(), norm

    return step


def build_raw_fsdp2(rank: int) -> Step:
    """Return the loop that one writes over `fully_shard`."""
    model = new_model()
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]  # type: ignore[operator]  # noqa: SLF001
    for module in (*layers, model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, foreach=True
    )
    batches = micro_batches_of(rank)

    def step() -> tuple[float, float]:
        loss = torch.tensor(math.nan)
        for number, ids_BT in enumerate(batches, start=1):
            cast("FSDPModule", model).set_requires_gradient_sync(number == MICRO_BATCHES)
            loss = loss_of(model, ids_BT)
            (loss / MICRO_BATCHES).backward()  # type: ignore[no-untyped-call]  # so in torch
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    return step


def build_raw_deepspeed(config: StrategyConfig, rank: int) -> Step:
    """Return the loop that one writes over `deepspeed.initialize`."""
    model = new_model()
    settings = raw_settings(config, num_elements=sum(parameter.numel() for parameter in model.parameters()))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, foreach=False
    )
    made, *_ = import_deepspeed().initialize(model=model, optimizer=optimizer, config=settings)
    engine = cast("RawEngine", made)
    batches = micro_batches_of(rank)

    def step() -> tuple[float, float]:
        loss = torch.tensor(math.nan)
        for ids_BT in batches:
            loss = loss_of(cast("nn.Module", engine), ids_BT)
            engine.backward(loss)
            engine.step()
        return loss.item(), float(engine.get_global_grad_norm())

    return step


def raw_settings(config: StrategyConfig, *, num_elements: int) -> dict[str, object]:
    """Return the JSON of the raw loop: ours, but with DeepSpeed's own count of micro-batches, norm and bound."""
    settings = zero_settings(
        config,
        stage=config.zero_stage,
        num_elements=num_elements,
        world_size=WORLD_SIZE,
        on_cpu=True,
        is_trained=True,
    )
    zero = cast("dict[str, object]", settings["zero_optimization"])
    zero.pop("compute_grad_norm", None)
    del settings["managed_gradient_accumulation"]
    return settings | {
        "train_micro_batch_size_per_gpu": MICRO_BATCH_SIZE,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "train_batch_size": config.train_batch_size,
        "gradient_clipping": MAX_NORM,
    }


def build_steps(rank: Rank, case: Case) -> dict[str, Step]:
    """Return the step of every variant."""
    config = attrs.evolve(
        rank.config,
        strategy=case.strategy,
        zero_stage=case.zero_stage,
        max_norm=MAX_NORM,
        train_batch_size=MICRO_BATCH_SIZE * MICRO_BATCHES * rank.world_size,
        micro_train_batch_size=MICRO_BATCH_SIZE,
        timeout=TIMEOUT,
    )
    strategy = rank.build(config)
    strategy.setup_distributed()

    def build_raw() -> Step:
        return build_raw_fsdp2(rank.rank) if case.strategy == "fsdp2" else build_raw_deepspeed(config, rank.rank)

    def build(name: str) -> Step:
        return build_ours(strategy, rank.rank) if name == OURS else build_raw()

    names = random.Random(case.seed).sample((RAW, AGAIN, OURS), 3)  # noqa: S311  # an order needs no cryptography
    return {name: build(name) for name in names}


def measure(rank: Rank, case: Case) -> Measured:
    """Take the steps of all variants in turn, and count the collectives of one more."""
    torch.set_num_threads(1)
    steps = build_steps(rank, case)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in steps}

    def noting(name: str, step: Step) -> Callable[[], None]:
        def run() -> None:
            start = time.process_time()
            seen[name].append(step())
            cpu_seconds[name].append(time.process_time() - start)

        return run

    runs = {name: noting(name, step) for name, step in steps.items()}
    seconds = interleave(runs, case.rounds, case.seed, warmup=WARMUP, clock=clock_of_all_ranks)
    collectives = {name: collectives_of(run) for name, run in runs.items()}
    require_alike(seen)
    measured = {name: samples[WARMUP:-1] for name, samples in cpu_seconds.items()}
    return Measured(seconds=seconds, cpu_seconds=measured, collectives=collectives)


def collectives_of(run: Callable[[], None]) -> dict[str, int]:
    """Return how often torch.distributed's operators are called, by name, wherever they are called from."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    return dict(Counter(event.name for event in profiled.events() or () if event.name.startswith("c10d::")))


def clock_of_all_ranks() -> float:
    """Return the time, once every rank has come here."""
    dist.barrier()
    return time.perf_counter()


def require_alike(seen: Mapping[str, list[tuple[float, float]]]) -> None:
    """Refuse variants whose losses or norms differ in a step, and steps that clipped nothing."""
    for name, steps in seen.items():
        for number, (found, expected) in enumerate(zip(steps, seen[RAW], strict=True)):
            alike = all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(found, expected, strict=True))
            assert alike, f"step {number}: {name} saw loss and norm {found}, and the raw loop {expected}"
            assert found[1] > MAX_NORM, f"step {number} of {name} clipped nothing"


def measure_row(name: str, *, launches: int, rounds: int) -> Measured:
    """Return what rank 0 saw in all launches of a row, whose collectives must be those of the raw loop in each."""
    subject = subject_of("lightrft.strategy.build:get_strategy", "strategy")
    strategy, stage = ROWS[name]
    found: list[Measured] = []
    for launch in range(launches):
        with processes(subject, WORLD_SIZE, timeout=TIMEOUT) as run_on_ranks:
            case = Case(strategy=strategy, zero_stage=stage, rounds=rounds, seed=launch)
            found.append(run_on_ranks(measure, case)[0])
        counted = found[-1].collectives
        assert counted[OURS] == counted[RAW], f"{name}: lightrft calls {counted[OURS]}, the raw loop {counted[RAW]}"
    return Measured(
        seconds={key: [one for each in found for one in each.seconds[key]] for key in (RAW, AGAIN, OURS)},
        cpu_seconds={key: [one for each in found for one in each.cpu_seconds[key]] for key in (RAW, AGAIN, OURS)},
        collectives=found[0].collectives,
    )


HEADER = ["two ranks", "raw ms", "A/A", "lightrft ms", "ratio", "CPU A/A", "CPU ratio", "raw collectives", "lightrft"]


def controls_of(samples: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Return the samples of both raw loops as shares of the first one's in the same round, which cancels drift."""
    return {AGAIN: [a / b for a, b in zip(samples[AGAIN], samples[RAW], strict=True)], RAW: [1.0]}


def row_of(name: str, found: Measured) -> list[str]:
    """Return a row of the table."""
    seconds, collectives = found.seconds, found.collectives
    return [
        name,
        f"{median(seconds[RAW]) * 1e3:.1f}",
        f"{control_error(controls_of(seconds), AGAIN, RAW):+.1%}",
        f"{median(seconds[OURS]) * 1e3:.1f}",
        f"{paired_ratio(seconds, OURS, RAW):.3f}",
        f"{control_error(controls_of(found.cpu_seconds), AGAIN, RAW):+.1%}",
        f"{paired_ratio(found.cpu_seconds, OURS, RAW):.3f}",
        str(sum(collectives[RAW].values())),
        str(sum(collectives[OURS].values())),
    ]


def main() -> None:
    """Measure, print, check against the targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=4, help="of every row")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each variant in a launch")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="rows of the table")
    parser.add_argument("--write", action="store_true", help="write results/sharded_step.md")
    args = parser.parse_args()
    found: dict[str, Measured] = {}
    for name in args.rows:
        found[name] = measure_row(name, launches=args.launches, rounds=args.rounds)
        print(", ".join(row_of(name, found[name])), file=sys.stderr, flush=True)
    machine = describe_machine("torch", "deepspeed", "transformers")
    table = format_table(HEADER, [row_of(name, one) for name, one in found.items()])
    options = f"--launches {args.launches} --rounds {args.rounds} --rows {' '.join(args.rows)}"
    command = f"python benchmarks/sharded_step.py {options} --write"
    text = f"# {(__doc__ or '').strip()}\n\n    {command}\n\n{table}\n\n{machine}\n"
    print(text)
    for one in found.values():
        check_control(controls_of(one.seconds), AGAIN, RAW)
    if args.write:
        print(f"written to {write_results('sharded_step', text)}")
    for name, one in found.items():
        ratio = paired_ratio(one.seconds, OURS, RAW)
        assert ratio <= TARGET, f"{name} takes {ratio:.3f} of a raw step, more than {TARGET}"


if __name__ == "__main__":
    import sharded_step  # ranks find its functions by the module's name, which is not __main__

    sharded_step.main()
