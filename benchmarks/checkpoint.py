"""What saving and loading cost beside torch's own files and raw writes: wall time on a disk, and memory.

The state is a Qwen3 model of random weights with the moments of AdamW, float32, under the strategy "single". The
variants of a row take turns in an order that is new in every round, and the reference runs twice (A/A). Before each of
them, what the last one wrote is removed and the disk is synced.

- save_ckpt: beside `torch.save` of the state dicts of model and optimizer to one file, and an fsync of that. Ours
  takes the digest of every file and syncs directories too.
- save_model: beside `os.write` of the same bytes, which lie in memory, in large blocks, and an fsync.
- load_ckpt: beside `torch.load(weights_only=True)` of that one file into new memory, which neither verifies anything
  nor puts it into the live model and optimizer, as ours does. All files are in the page cache for both: a run that
  reads from the disk is void.
- in the background: how long save_ckpt keeps the caller, and how long until the state is copied, which the next
  step waits for, beside a copy of all tensors into new memory.
- memory: two ranks under "fsdp2". By how much anonymous memory grows at its peak while a rank saves or loads, of the
  rank that grows most. Its shard is there before, so that shard and growth are what it needs in all.

A row whose A/A is beyond {tolerance:.0%} is void, and the program exits with 3.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import attrs
import torch
from paired import (
    VOID_EXIT_CODE,
    check_control,
    control_error,
    describe_machine,
    format_table,
    interleave,
    median,
    paired_ratio,
    write_results,
)
from torch import nn
from torch.optim import Optimizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from lightrft.backends.checkpointing.sharded import local_part
from lightrft.backends.checkpointing.turns import BUCKET_SIZE
from lightrft.backends.copying import await_copy
from lightrft.strategy import Strategy, StrategyConfig, background_saves, get_strategy
from lightrft.testing.ranks.processes import processes
from lightrft.testing.subject import Rank, subject_of

REFERENCE, AGAIN, OURS = "reference", "reference again (A/A)", "lightrft"
TOLERANCE = 0.05  # of the A/A control: a disk is noisier than a processor
BLOCK_SIZE = 64 << 20  # bytes of one raw write
M_MMAP_THRESHOLD = -3  # of malloc.h: larger blocks come from the system, and go back to it
SAMPLING_SECONDS = 5e-4
TIMEOUT = 600.0  # seconds of the row of ranks

SHAPES: Mapping[int, tuple[int, int, int]] = {
    4: (8192, 128, 12),
    65: (32768, 512, 13),
    300: (32768, 1024, 17),
}
"""Vocabulary, width and layers, by million parameters."""


@attrs.frozen(kw_only=True, eq=False)
class State:
    """What is saved and loaded.

    Attributes:
        strategy: the strategy.
        model: prepared.
        optimizer: prepared, and stepped once.
    """

    strategy: Strategy
    model: nn.Module
    optimizer: Optimizer


@attrs.frozen(kw_only=True, eq=False)
class Row:
    """A row of the table of times.

    Attributes:
        name: the function.
        params: millions of parameters.
        num_bytes: what is written or read.
        seconds: of every round, by variant.
        target: what the ratio is at most to be.
    """

    name: str
    params: int
    num_bytes: int
    seconds: dict[str, list[float]]
    target: float


@attrs.frozen(kw_only=True)
class Case:
    """What the ranks do.

    Attributes:
        params: millions of parameters.
        directory: where to.
    """

    params: int
    directory: str


@attrs.frozen(kw_only=True)
class Memory:
    """What one rank saw, in bytes.

    Attributes:
        shard: its parts of parameters and moments.
        saving: growth while it saved.
        loading: growth while it loaded.
    """

    shard: int
    saving: int
    loading: int


def build_state(strategy: Strategy, params: int) -> State:
    """Return a prepared model whose optimizer has moments, between two windows."""
    vocabulary, hidden, num_layers = SHAPES[params]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        tie_word_embeddings=True,
    )
    plain = cast("nn.Module", Qwen3ForCausalLM(config))
    optimizer = strategy.create_optimizer(plain, lr=1e-5)
    model, optimizer, _ = strategy.prepare((plain, optimizer, None))
    loss = model(input_ids=torch.arange(8).reshape(1, 8), use_cache=False).logits.logsumexp(-1).mean()
    strategy.backward(loss, model, optimizer)
    strategy.optimizer_step(optimizer, model, None)
    return State(strategy=strategy, model=model, optimizer=optimizer)


def tensors_of(state: State) -> list[torch.Tensor]:
    """Return what both files hold: parameters, moments, and counts of steps."""
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    return [*state.model.parameters(), *(value for value in moments if isinstance(value, torch.Tensor))]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors, of sharded ones those of this rank."""
    return sum(local_part(tensor).nbytes for tensor in tensors)


def torch_save(state: State, path: Path) -> None:
    """Write what torch itself saves of the state, durably."""
    torch.save({"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}, path)
    sync(path)


def sync(path: Path) -> None:
    """Make a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def raw_write(content: bytes, path: Path) -> None:
    """Write bytes in large blocks, durably."""
    view = memoryview(content)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done : done + BLOCK_SIZE])
    os.fsync(descriptor)
    os.close(descriptor)


def empty(folder: Path) -> None:
    """Remove what is in a directory, and let the disk come to rest."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()


def times_of(
    reference: Callable[[], object], ours: Callable[[], object], rounds: int, before_each: Callable[[], object]
) -> dict[str, list[float]]:
    """Return the seconds of every round."""
    variants = {REFERENCE: reference, AGAIN: reference, OURS: ours}
    return interleave(variants, rounds, clock=time.perf_counter, before_each=before_each)


def save_rows(state: State, params: int, folder: Path, rounds: int) -> list[Row]:
    """Measure save_ckpt."""

    def reference() -> None:
        torch_save(state, folder / "state.pt")

    def ours() -> None:
        state.strategy.save_ckpt(state.model, folder, optimizer=state.optimizer)

    def before_each() -> None:
        empty(folder)

    seconds = times_of(reference, ours, rounds, before_each)
    size = bytes_of(tensors_of(state))
    return [Row(name="save_ckpt", params=params, num_bytes=size, seconds=seconds, target=1.0)]


def save_model_rows(state: State, params: int, folder: Path, rounds: int) -> list[Row]:
    """Measure save_model."""

    def ours() -> None:
        state.strategy.save_model(state.model, folder / "model")

    def before_each() -> None:
        empty(folder)

    before_each()
    ours()
    content = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}

    def reference() -> None:
        (folder / "model").mkdir()
        for name, file in content.items():
            raw_write(file, folder / "model" / name)

    seconds = times_of(reference, ours, rounds, before_each)
    size = sum(len(file) for file in content.values())
    return [Row(name="save_model", params=params, num_bytes=size, seconds=seconds, target=1.1)]


def load_rows(state: State, params: int, folder: Path, rounds: int) -> list[Row]:
    """Measure load_ckpt of files that the page cache holds."""
    empty(folder)
    torch_save(state, folder / "state.pt")
    state.strategy.save_ckpt(state.model, folder, optimizer=state.optimizer)
    held: list[object] = []  # until the time is taken: giving memory back is no part of loading
    read: list[int] = []
    # a process that loads has not loaded before: glibc must not hand out again what an earlier round let go of
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)

    def reference() -> None:
        held.append(torch.load(folder / "state.pt", weights_only=True))

    def ours() -> None:
        state.strategy.load_ckpt(state.model, folder, optimizer=state.optimizer)

    def before_each() -> None:
        held.clear()
        read.append(bytes_from_disk())

    seconds = times_of(reference, ours, rounds, before_each)
    held.clear()
    size = bytes_of(tensors_of(state))
    cold = bytes_from_disk() - read[3]  # the first three runs were to warm up
    if cold > len(seconds) * rounds * size // 100:  # of all that was read
        print(f"VOID: {cold / 1e6:.0f} MB were read from the disk, not from the page cache.", file=sys.stderr)
        raise SystemExit(VOID_EXIT_CODE)
    return [Row(name="load_ckpt", params=params, num_bytes=size, seconds=seconds, target=1.0)]


def background_rows(state: State, params: int, folder: Path, rounds: int) -> list[Row]:
    """Measure how long a save in the background keeps the caller, and the step after it."""
    tensors = [tensor.detach() for tensor in tensors_of(state)]
    held: list[torch.Tensor] = []
    called: list[float] = []

    def reference() -> None:
        held.extend(tensor.clone() for tensor in tensors)

    with background_saves(state.strategy) as background:

        def ours() -> None:
            start = time.perf_counter()
            state.strategy.save_ckpt(state.model, folder, optimizer=state.optimizer, background=background)
            called.append(time.perf_counter() - start)
            await_copy(state.optimizer)

        def before_each() -> None:
            background.wait()
            held.clear()
            empty(folder)

        seconds = times_of(reference, ours, rounds, before_each)
    size = bytes_of(tensors)
    returned = {**seconds, OURS: called[1:]}  # the first was to warm up
    return [
        Row(name="in the background: returns", params=params, num_bytes=size, seconds=returned, target=0.3),
        Row(name="in the background: copied", params=params, num_bytes=size, seconds=seconds, target=2.0),
    ]


def bytes_from_disk() -> int:
    """Return how many bytes this process has caused to be read from disks."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def anonymous_bytes() -> int:
    """Return the resident memory of this process that no file stands behind."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def sampled_growth() -> Generator[list[int]]:
    """Yield a list that ends with the most by which anonymous memory grew inside, looked at many times."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = anonymous_bytes()
    growth = [0]
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(SAMPLING_SECONDS):
            growth.append(max(growth[-1], anonymous_bytes() - before))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield growth
    finally:
        is_over.set()
        thread.join()


def measure_memory(rank: Rank, case: Case) -> Memory:
    """Save and load once to warm up, and once more."""
    torch.set_num_threads(1)
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    state = build_state(strategy, case.params)
    growths: list[int] = []

    def save() -> None:
        strategy.save_ckpt(state.model, case.directory, optimizer=state.optimizer, max_num=1)

    def load() -> None:
        strategy.load_ckpt(state.model, case.directory, optimizer=state.optimizer)

    for run in (save, load, save, load):
        with sampled_growth() as growth:
            run()
        growths.append(growth[-1])
    return Memory(shard=bytes_of(tensors_of(state)), saving=growths[2], loading=growths[3])


def memory_of(params: int, folder: Path) -> Memory:
    """Return the memory of the rank that grows most."""
    empty(folder)
    config = StrategyConfig(strategy="fsdp2", train_batch_size=2, micro_train_batch_size=1, timeout=TIMEOUT)
    subject = subject_of("lightrft.strategy.build:get_strategy", "strategy", config=config)
    with processes(subject, 2, timeout=TIMEOUT) as run_on_ranks:
        seen = run_on_ranks(measure_memory, Case(params=params, directory=str(folder)))
    empty(folder)
    return Memory(
        shard=max(rank.shard for rank in seen),
        saving=max(rank.saving for rank in seen),
        loading=max(rank.loading for rank in seen),
    )


HEADER = ["million parameters", "function", "MB", "reference s", "A/A", "lightrft s", "ratio", "at most", "MB/s"]
MEMORY_HEADER = [
    "million parameters",
    "shard MB",
    "bucket MB",
    "save_ckpt: growth MB",
    "load_ckpt: growth MB",
    "at most",
]


def controls_of(row: Row) -> dict[str, list[float]]:
    """Return the samples of the reference as shares of the other one's in the same round, which cancels drift."""
    pairs = zip(row.seconds[AGAIN], row.seconds[REFERENCE], strict=True)
    return {AGAIN: [a / b for a, b in pairs], REFERENCE: [1.0]}


def cells_of(row: Row) -> list[str]:
    """Return a row of the table of times."""
    return [
        str(row.params),
        row.name,
        f"{row.num_bytes / 1e6:.0f}",
        f"{median(row.seconds[REFERENCE]):.2f}",
        f"{control_error(controls_of(row), AGAIN, REFERENCE):+.1%}",
        f"{median(row.seconds[OURS]):.2f}",
        f"{paired_ratio(row.seconds, OURS, REFERENCE):.2f}",
        f"{row.target}",
        f"{row.num_bytes / 1e6 / median(row.seconds[OURS]):.0f}",
    ]


def memory_cells_of(params: int, found: Memory) -> list[str]:
    """Return a row of the table of memory."""
    sizes = (found.shard, BUCKET_SIZE, found.saving, found.loading, 2 * BUCKET_SIZE)
    return [str(params), *(f"{size / 1e6:.0f}" for size in sizes)]


def describe_disk(folder: Path) -> str:
    """Return the file system and the device of a directory."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if fields[2] == number:
            kind, source = fields[fields.index("-") + 1 :][:2]
            return f"{kind} on {source}"
    return f"device {number}"


ROWS: Mapping[str, Callable[[State, int, Path, int], list[Row]]] = {
    "save_ckpt": save_rows,
    "background": background_rows,
    "save_model": save_model_rows,
    "load_ckpt": load_rows,
}


def missed_targets(rows: Iterable[Row], memory: Mapping[int, Memory]) -> list[str]:
    """Return what is not as fast or as small as it is to be."""
    missed: list[str] = []
    for row in rows:
        ratio = paired_ratio(row.seconds, OURS, REFERENCE)
        if ratio > row.target:
            missed.append(f"{row.name} of {row.params} million takes {ratio:.2f}, more than {row.target}")
    for params, found in memory.items():
        for name, growth in (("save_ckpt", found.saving), ("load_ckpt", found.loading)):
            if growth > 2 * BUCKET_SIZE:
                missed.append(f"{name} of {params} million grows by {growth / BUCKET_SIZE:.1f} buckets, more than 2")
    return missed


def main() -> None:
    """Measure, print, check against the targets."""
    words = (__doc__ or "").format(tolerance=TOLERANCE).strip()
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", nargs="+", type=int, choices=list(SHAPES), default=[65, 300], help="millions")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each variant")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "memory"], default=[*ROWS, "memory"])
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk that is measured")
    parser.add_argument("--write", action="store_true", help="write results/checkpoint.md")
    args = parser.parse_args()
    rows: list[Row] = []
    memory: dict[int, Memory] = {}
    torch.set_num_threads(1)
    strategy = get_strategy(StrategyConfig(strategy="single", train_batch_size=1, micro_train_batch_size=1))
    strategy.setup_distributed()
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="checkpoint-benchmark-") as scratch:
        folder = Path(scratch).resolve() / "work"
        for params in args.params:
            if "memory" in args.rows:
                memory[params] = memory_of(params, folder)
                print(", ".join(memory_cells_of(params, memory[params])), file=sys.stderr, flush=True)
            state = build_state(strategy, params)
            for name in (name for name in ROWS if name in args.rows):
                found = ROWS[name](state, params, folder, args.rounds)
                rows += found
                print("\n".join(", ".join(cells_of(row)) for row in found), file=sys.stderr, flush=True)
            del state
        disk = describe_disk(Path(scratch))
    options = f"--params {' '.join(map(str, args.params))} --rounds {args.rounds} --rows {' '.join(args.rows)}"
    tables = [format_table(HEADER, [cells_of(row) for row in rows])] if rows else []
    if memory:
        cells = [memory_cells_of(params, found) for params, found in memory.items()]
        tables.append(format_table(MEMORY_HEADER, cells))
    machine = f"{describe_machine('torch', 'safetensors', 'transformers')}, {disk}"
    text = (
        "\n\n".join([f"# {words}", f"    python benchmarks/checkpoint.py {options} --write", *tables, machine]) + "\n"
    )
    print(text)
    for row in rows:
        check_control(controls_of(row), AGAIN, REFERENCE, TOLERANCE)
    if args.write:
        print(f"written to {write_results('checkpoint', text)}")
    missed = missed_targets(rows, memory)
    assert not missed, "; ".join(missed)


if __name__ == "__main__":
    import checkpoint  # ranks find its functions by the module's name, which is not __main__

    checkpoint.main()
