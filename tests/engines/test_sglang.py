"""The engine "sglang" with the real SGLang, in an environment of its own: `make test-sglang`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightrft.backends.rollout import sglang_load
from lightrft.backends.rollout.sglang_inside import Inside
from lightrft.backends.rollout.sglang_package import require_sglang
from lightrft.config import EngineConfig, ModelConfig
from lightrft.errors import ConfigError, EngineStateError, MissingPackageError, UnsupportedError, WeightSyncError
from lightrft.models.build import build_model
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy import Completion, EngineHandle, Prompt, SamplingParams, StrategyConfig, get_strategy

try:
    require_sglang()
except MissingPackageError as missing:
    pytest.skip(str(missing), allow_module_level=True)

# other people's packages warn while they are imported
pytestmark = pytest.mark.filterwarnings("ignore")

ENGINE = EngineConfig(type="sglang", cache_gb=0.01, batch_size=64)
PROMPTS = ((1, 2, 3), (4,), tuple(range(13)))
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=4)
HOT = SamplingParams(temperature=1.7, max_new_tokens=6, n=3, seed=5)


def policy(*, tied: bool = False, seed: int = 0, length: int = 32, hidden_size: int = 64) -> nn.Module:
    """Return a small Qwen3 whose logits have an opinion."""
    config = ModelConfig(
        architecture="qwen3",
        hidden_size=hidden_size,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        num_key_value_heads=1,
        max_length=length,
        tie_embeddings=tied,
        initializer_range=0.25,
    )
    return build_model(config, build_character_tokenizer("0123456789+"), seed=seed)


@pytest.fixture
def engines() -> Iterator[ExitStack]:
    """Yield what closes the engines of a test, whatever came of it."""
    with ExitStack() as stack:
        yield stack


def start(engines: ExitStack, model: nn.Module, config: EngineConfig = ENGINE) -> EngineHandle:
    strategy = get_strategy(StrategyConfig(strategy="single"))
    return engines.enter_context(strategy.setup_inference_engine(config, actor=model))


def generate(
    handle: EngineHandle, sampling: SamplingParams, prompts: Sequence[tuple[int, ...]] = PROMPTS
) -> list[Completion]:
    return handle.engine.generate(handle, [Prompt(token_ids=prompt) for prompt in prompts], sampling)


def logprob_difference(made: Sequence[Completion], model: nn.Module, *, temperature: float) -> float:
    """Return the largest distance of a logprob from that of the model's own forward, one sequence at a time."""
    differences = [0.0]
    for completion in made:
        ids = torch.tensor([completion.prompt_ids + completion.token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(completion.prompt_ids) - 1 : -1] / temperature
        own = torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        differences.append((own - torch.tensor(completion.logprobs)).abs().max().item())
    return max(differences)


@pytest.mark.parametrize("tied", [True, False])
def test_after_rounds_of_training_logprobs_are_the_trainers(engines: ExitStack, tied: bool) -> None:
    """Logprobs are the trainer's within 1e-5 before training and after each of 20 rounds of a step and a sync."""
    strategy = get_strategy(StrategyConfig(strategy="single", micro_train_batch_size=1, train_batch_size=1))
    model = policy(tied=tied)
    optimizer = strategy.create_optimizer(model, lr=1e-2)
    handle = start(engines, model)
    before = generate(handle, GREEDY)
    assert logprob_difference(before, model, temperature=1.0) < 1e-5
    assert logprob_difference(generate(handle, HOT), model, temperature=1.7) < 1e-5
    for step in range(20):
        ids = torch.randint(0, 13, (4, 16), generator=torch.Generator().manual_seed(step))
        strategy.backward(model(input_ids=ids, labels=ids).loss, model, optimizer)
        assert strategy.optimizer_step(optimizer, model, None).stepped
        report = strategy.update_engine_weights(handle, model)
        assert report.weight_version == step + 1
        assert report.max_logprob_difference < 1e-5
        made = generate(handle, HOT)
        assert {completion.weight_version for completion in made} == {step + 1}
        assert logprob_difference(made, model, temperature=1.7) < 1e-5
    assert [c.logprobs for c in before] != [c.logprobs for c in generate(handle, GREEDY)]


@pytest.mark.parametrize("tied", [True, False])
def test_its_completions_are_those_of_the_engine_hf(engines: ExitStack, tied: bool) -> None:
    """Draws are by the seed alone, so two engines make the same completions of the same weights, whatever is asked."""
    model, hf = policy(tied=tied), EngineConfig(type="hf")
    here, there = start(engines, model), start(engines, model, hf)
    for sampling in (
        GREEDY,
        HOT,
        SamplingParams(temperature=1.3, top_k=5, top_p=0.8, max_new_tokens=9, n=4, seed=1),
        SamplingParams(temperature=1.3, max_new_tokens=9, min_new_tokens=4, stop_token_ids=(1, 2, 3), n=4, seed=2),
        SamplingParams(temperature=0.9, top_p=0.5, max_new_tokens=3, n=2, seed=3, first_prompt=7),
    ):
        made, wanted = generate(here, sampling), generate(there, sampling)
        assert [c.token_ids for c in made] == [c.token_ids for c in wanted]
        assert [c.finish_reason for c in made] == [c.finish_reason for c in wanted]
        assert [c.sample_index for c in made] == [c.sample_index for c in wanted]


def test_a_cache_that_is_full_changes_no_completion(engines: ExitStack) -> None:
    """Sequences that do not fit into the cache wait or are computed again, and are what they would have been."""
    model, sampling = policy(), SamplingParams(temperature=1.0, max_new_tokens=19, n=8, seed=4)
    large = start(engines, model)
    wanted = [c.token_ids for c in generate(large, sampling)]
    large.engine.close(large)
    # the cache holds 48 tokens, and each of the 24 sequences comes to 20 and more
    small = start(engines, model, EngineConfig(type="sglang", cache_gb=48.5 * 512 / 1e9, batch_size=64))
    assert small.state.inside.scheduler.max_total_num_tokens == 48  # type: ignore[attr-defined]
    made = generate(small, sampling)
    assert [c.token_ids for c in made] == wanted
    assert logprob_difference(made, model, temperature=1.0) < 1e-5


def test_a_long_prompt_is_read_in_parts(engines: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that SGLang cuts into chunks is completed as one that it does not cut."""
    model = policy(length=512)
    prompts = [tuple(place % 13 for place in range(length)) for length in (300, 1, 490)]
    handle = start(engines, model)
    wanted = [c.token_ids for c in generate(handle, HOT, prompts)]
    handle.engine.flush_cache(handle)
    scheduler = handle.state.inside.scheduler  # type: ignore[attr-defined]
    monkeypatch.setattr(scheduler, "chunked_prefill_size", 64)
    assert [c.token_ids for c in generate(handle, HOT, prompts)] == wanted


def test_a_parameter_of_sglang_that_no_name_reaches_is_noticed(
    engines: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update of which SGLang's loader takes some names and drops others ends torn, with the parameter's name."""
    handle = start(engines, policy())
    load = sglang_load.load

    def drop(inside: Inside, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        load(inside, [(name, tensor) for name, tensor in tensors if "k_proj" not in name])

    with monkeypatch.context() as patch:
        patch.setattr("lightrft.backends.rollout.sglang.load", drop)
        with pytest.raises(
            WeightSyncError, match=r"2 parameters of SGLang's model were not written \(model\.layers\.0\.self_attn\.qkv"
        ):
            get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, policy(seed=1))
    with pytest.raises(EngineStateError, match="torn"):
        generate(handle, GREEDY)
    new = policy(seed=2)
    assert get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, new).weight_version == 1
    assert logprob_difference(generate(handle, HOT), new, temperature=1.7) < 1e-5


def test_an_answer_of_no_is_an_error(engines: ExitStack) -> None:
    """Where SGLang says that it does not begin an update, the call raises: it would go on with the old weights."""
    handle = start(engines, policy())
    inside = cast("Inside", handle.state.inside)  # type: ignore[attr-defined]
    messages = inside.package.io_struct
    assert inside.scheduler.weight_updater.begin_weight_update(messages.BeginWeightUpdateReqInput()).success
    with pytest.raises(WeightSyncError, match=r"SGLang refuses an update of its weights .*already open"):
        handle.engine.begin_update(handle)
    assert handle.status == "torn"


def test_keys_and_values_of_earlier_weights_are_forgotten(engines: ExitStack) -> None:
    """A prompt that lies in the prefix cache is computed anew after its weights changed, and not before."""
    prompt = tuple(place % 13 for place in range(300))
    old, new = policy(length=512), policy(length=512, seed=1)
    handle = start(engines, old)
    first, second = (generate(handle, GREEDY, [prompt]) for _ in range(2))
    assert [c.token_ids for c in first] == [c.token_ids for c in second]
    cached = handle.state.inside.scheduler.tree_cache.evictable_size()  # type: ignore[attr-defined]
    assert cached >= 300
    get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, new)
    assert logprob_difference(generate(handle, GREEDY, [prompt]), new, temperature=1.0) < 1e-5


def test_asleep_it_has_no_cache_and_awake_it_goes_on(engines: ExitStack) -> None:
    """Sleep frees the key-value cache to the last byte; after waking the same completions come."""
    handle = start(engines, policy())
    pool = handle.state.inside.scheduler.tp_worker.model_runner.token_to_kv_pool  # type: ignore[attr-defined]
    caches = cast("list[torch.Tensor]", [*pool.k_buffer, *pool.v_buffer])
    before, size = generate(handle, HOT), sum(cache.untyped_storage().nbytes() for cache in caches)
    handle.engine.sleep(handle)
    assert size > 5e6
    assert sum(cache.untyped_storage().nbytes() for cache in caches) == 0
    handle.engine.wake(handle)
    assert [c.token_ids for c in generate(handle, HOT)] == [c.token_ids for c in before]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_interrupt_leaves_no_request_behind(engines: ExitStack, number: int) -> None:
    """After Ctrl-C in the middle of a call the next one is given its own completions, and no other."""
    handle = start(engines, policy())
    wanted, calls = [c.token_ids for c in generate(handle, HOT)], iter(range(number + 1))

    def interrupt(module: nn.Module, args: object) -> None:
        del module, args
        if next(calls) == number:
            raise KeyboardInterrupt

    layer = handle.state.inside.model.get_submodule("model.layers.1")  # type: ignore[attr-defined]
    hook = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(handle, HOT)
    hook.remove()
    assert [c.token_ids for c in generate(handle, HOT)] == wanted
    scheduler = handle.state.inside.scheduler  # type: ignore[attr-defined]
    handle.engine.flush_cache(handle)
    assert scheduler.token_to_kv_pool_allocator.available_size() == scheduler.max_total_num_tokens


def surroundings() -> dict[str, object]:
    """Return what of this process SGLang could have changed."""
    return {
        "environment": dict(os.environ),
        "threads": (torch.get_num_threads(), torch.set_num_threads),
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002 (what SGLang seeds)
        "frozen": gc.get_freeze_count(),
        "dtype": torch.get_default_dtype(),
        "affinity": os.sched_getaffinity(0),
        "signals": {number: signal.getsignal(number) for number in signal.Signals},
        "logging": (logging.getLogger().handlers[:], logging.getLogger().level),
        "loops": type(asyncio.get_event_loop_policy()),
        "threads of python": {thread.name for thread in threading.enumerate()},
        "reductions": dict(ForkingPickler._extra_reducers),
    }


def ports_of(process: psutil.Process) -> set[tuple[str, int]]:
    return {(connection.laddr.ip, connection.laddr.port) for connection in process.net_connections()}


def test_the_process_is_left_as_it_was(engines: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting, generating, syncing and closing leave environment, random streams, threads and ports as they were."""
    old, new = policy(), policy(seed=1)
    start(engines, old).__exit__()  # the first one imports, and torch makes the directory of its compiler
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    strategy, process = get_strategy(StrategyConfig(strategy="single")), psutil.Process()
    gc.collect()  # what a test before this one left to be collected has ports
    before, ports = surroundings(), ports_of(process)
    handle = start(engines, old)
    assert {ip for ip, _ in ports_of(process) - ports} == {"127.0.0.1"}  # gloo's, of no fixed port
    assert process.children(recursive=True) == []
    generate(handle, HOT)
    strategy.update_engine_weights(handle, new)
    assert surroundings() == before
    weights = weakref.ref(handle.state.inside.model)  # type: ignore[attr-defined]
    handle.engine.close(handle)
    assert surroundings() == before
    assert ports_of(process) <= ports
    assert list(tmp_path.iterdir()) == []
    assert not dist.is_initialized()
    assert weights() is None


def test_a_process_group_of_the_trainer_is_left_alone(engines: ExitStack) -> None:
    """An engine that starts beside a process group neither makes another one nor destroys it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        handle = start(engines, policy())
        assert len(generate(handle, GREEDY)) == len(PROMPTS)
        handle.engine.close(handle)
        assert dist.group.WORLD is group
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 1
    finally:
        dist.destroy_process_group()


def test_a_second_engine_of_a_process_is_refused(engines: ExitStack) -> None:
    """Two at a time cannot be, as SGLang's state is of the whole process; the first goes on, and then the second."""
    first = start(engines, policy())
    wanted = [c.token_ids for c in generate(first, GREEDY)]
    with pytest.raises(EngineStateError, match="runs in this process already"):
        start(engines, policy())
    assert [c.token_ids for c in generate(first, GREEDY)] == wanted
    first.engine.close(first)
    assert [c.token_ids for c in generate(start(engines, policy()), GREEDY)] == wanted


def test_what_sglang_cannot_run_is_refused_when_it_starts(engines: ExitStack) -> None:
    """A cache that is too small, a model without attention and one that SGLang does not know are refused."""
    with pytest.raises(ConfigError, match=r"cache_gb=1e-06 does not suffice for one sequence of 32 tokens"):
        start(engines, policy(), EngineConfig(type="sglang", cache_gb=1e-6))
    with pytest.raises(UnsupportedError, match="is no causal language model"):
        start(engines, nn.Linear(2, 2))
    strange = type("StrangeForCausalLM", (type(policy()),), {})
    model = policy()
    model.__class__ = strange
    with pytest.raises(UnsupportedError, match="model=StrangeForCausalLM"):
        start(engines, model)
    assert not dist.is_initialized()
    assert len(generate(start(engines, policy()), GREEDY)) == len(PROMPTS)


def test_a_model_that_sglang_computes_otherwise_is_refused(engines: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the probe sees when the engine starts keeps it from starting, and nothing of it stays."""
    load = sglang_load.load

    def scale(inside: Inside, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        load(inside, [(name, tensor * 1.1) for name, tensor in tensors])

    with monkeypatch.context() as patch:
        patch.setattr("lightrft.backends.rollout.sglang.load", scale)
        with pytest.raises(UnsupportedError, match=r"model=Qwen3ForCausalLM is another one in SGLang: a logprob is"):
            start(engines, policy())
    assert not dist.is_initialized()
    assert len(generate(start(engines, policy()), GREEDY)) == len(PROMPTS)


def test_the_platform_is_for_who_asks_by_name() -> None:
    """SGLang started by somebody else does not find the platform: the entry point answers no unless it is named."""
    program = (
        "import os; os.environ.pop('SGLANG_PLATFORM', None)\n"
        "from sglang.srt.platforms import current_platform\n"
        "print(type(current_platform).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=300)  # noqa: S603 (our own program)
    assert done.stdout.split() == ["sglang.srt.platforms.interface"]
