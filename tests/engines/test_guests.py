"""The engine "vllm" or "sglang", whichever this environment has: `make test-vllm`, `make test-sglang`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import threading
import weakref
from contextlib import ExitStack
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import attrs
import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from guests import (
    GREEDY,
    HOT,
    PROMPTS,
    caches_of,
    generate,
    inside_of,
    installed,
    loading,
    logprob_difference,
    policy,
    settings,
    start,
    without,
)
from torch import nn

from lightrft.errors import ConfigError, EngineStateError, UnsupportedError, WeightSyncError
from lightrft.strategy import StrategyConfig, get_strategy
from lightrft.weight_sync import transfer_weights

NAME = installed("vllm", "sglang")
TITLE = {"vllm": "vLLM", "sglang": "SGLang"}[NAME]
ENGINE = settings(NAME)

# other people's packages warn while they are imported
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("tied", [True, False])
def test_after_rounds_of_training_logprobs_are_the_trainers(engines: ExitStack, tied: bool) -> None:
    """Logprobs are the trainer's within 1e-5 before training and after each of 20 rounds of a step and a sync."""
    strategy = get_strategy(StrategyConfig(strategy="single", micro_train_batch_size=1, train_batch_size=1))
    model = policy(tied=tied)
    optimizer = strategy.create_optimizer(model, lr=1e-2)
    handle = start(engines, model, ENGINE)
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


def scale_one(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor * (1 + ("1.mlp.down_proj" in name))


def test_weights_that_are_not_the_trainers_are_noticed(engines: ExitStack) -> None:
    """A tensor that came with other values is seen by the probe; the engine is torn, and the next sync mends it."""
    strategy, handle = get_strategy(StrategyConfig(strategy="single")), start(engines, policy(), ENGINE)
    with loading(handle, scale_one), pytest.raises(WeightSyncError, match=r"a logprob is .* nats from the trainer's"):
        strategy.update_engine_weights(handle, policy(seed=1))
    with pytest.raises(EngineStateError, match="torn"):
        generate(handle, GREEDY)
    new = policy(seed=2)
    assert strategy.update_engine_weights(handle, new).max_logprob_difference < 1e-5
    assert logprob_difference(generate(handle, HOT), new, temperature=1.7) < 1e-5


def test_a_parameter_that_no_name_reaches_is_noticed(engines: ExitStack) -> None:
    """An update whose names the loader takes and drops ends torn with the parameter's name; the next one mends it."""
    strategy, handle = get_strategy(StrategyConfig(strategy="single")), start(engines, policy(), ENGINE)
    said = rf"2 parameters of {TITLE}'s model were not written \(model\.layers\.0\.mlp\.down"
    with loading(handle, without("down_proj")), pytest.raises(WeightSyncError, match=said):
        strategy.update_engine_weights(handle, policy(seed=1))
    with pytest.raises(EngineStateError, match="torn"):
        generate(handle, GREEDY)
    new = policy(seed=2)
    assert strategy.update_engine_weights(handle, new).weight_version == 1
    assert logprob_difference(generate(handle, HOT), new, temperature=1.7) < 1e-5


def test_tensors_may_be_overwritten_once_they_were_put(engines: ExitStack) -> None:
    """What was put is the caller's again, also where the engine waits for the other parts of a layer."""
    new = policy(seed=1)
    weights = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    handle = start(engines, policy(), ENGINE)
    handle.engine.begin_update(handle)
    for name, tensor in weights.items():
        handle.engine.put(handle, [(name, tensor)])
        tensor.fill_(9.0)
    handle.engine.commit(handle)
    assert logprob_difference(generate(handle, GREEDY), new, temperature=1.0) < 1e-5


def test_keys_and_values_of_earlier_weights_are_forgotten(engines: ExitStack) -> None:
    """A prompt that lies in the prefix cache is computed anew after its weights changed."""
    prompt = tuple(place % 13 for place in range(300))  # more than the 128 tokens of a block of vLLM's cache
    old, new = policy(length=512), policy(length=512, seed=1)
    handle = start(engines, old, ENGINE)
    first, second = (generate(handle, GREEDY, [prompt]) for _ in range(2))
    assert [c.token_ids for c in first] == [c.token_ids for c in second]
    get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, new)
    assert logprob_difference(generate(handle, GREEDY, [prompt]), new, temperature=1.0) < 1e-5


def test_weights_that_are_no_numbers_leave_nothing_behind(engines: ExitStack) -> None:
    """After them no completion is given out, and after the next sync all are what they were."""
    model = policy()
    handle = start(engines, model, ENGINE)
    before = generate(handle, HOT)
    wrong = {name: torch.full_like(tensor, torch.nan) for name, tensor in model.state_dict().items()}
    transfer_weights(wrong.items(), handle)
    with pytest.raises(EngineStateError, match="the weights are not finite, sync them again"):
        generate(handle, HOT)
    transfer_weights(model.state_dict().items(), handle)
    after = [attrs.evolve(completion, weight_version=0) for completion in generate(handle, HOT)]
    assert after == before


def test_asleep_it_has_no_cache_and_awake_it_goes_on(engines: ExitStack) -> None:
    """Sleep frees the key-value cache to the last byte; after waking the same completions come."""
    handle = start(engines, policy(), ENGINE)
    caches, before = caches_of(handle), generate(handle, HOT)
    assert sum(cache.untyped_storage().nbytes() for cache in caches) > 5e6
    handle.engine.sleep(handle)
    assert sum(cache.untyped_storage().nbytes() for cache in caches) == 0
    handle.engine.wake(handle)
    assert [c.token_ids for c in generate(handle, HOT)] == [c.token_ids for c in before]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_interrupt_leaves_no_request_behind(engines: ExitStack, number: int) -> None:
    """After Ctrl-C in the middle of a call the next one is given its own completions, and no other."""
    handle = start(engines, policy(), ENGINE)
    wanted, calls = [c.token_ids for c in generate(handle, HOT)], iter(range(number + 1))

    def interrupt(module: nn.Module, args: object) -> None:
        del module, args
        if next(calls) == number:
            raise KeyboardInterrupt

    hook = inside_of(handle).model.get_submodule("model.layers.1").register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(handle, HOT)
    hook.remove()
    handle.engine.flush_cache(handle)
    assert [c.token_ids for c in generate(handle, HOT)] == wanted


def surroundings() -> dict[str, object]:
    """Return what of this process an engine could have changed."""
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
    start(engines, old, ENGINE).__exit__()  # the first one imports, and torch makes the directory of its compiler
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    strategy, process = get_strategy(StrategyConfig(strategy="single")), psutil.Process()
    gc.collect()  # what a test before this one left to be collected has ports
    before, ports, children = surroundings(), ports_of(process), set(process.children(recursive=True))
    handle = start(engines, old, ENGINE)
    assert {ip for ip, _ in ports_of(process) - ports} == {"127.0.0.1"}  # gloo's, of no fixed port
    assert set(process.children(recursive=True)) <= children
    generate(handle, HOT)
    strategy.update_engine_weights(handle, new)
    assert surroundings() == before
    weights = weakref.ref(inside_of(handle).model)
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
        handle = start(engines, policy(), ENGINE)
        assert len(generate(handle, GREEDY)) == len(PROMPTS)
        handle.engine.close(handle)
        assert dist.group.WORLD is group
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 1
    finally:
        dist.destroy_process_group()


def test_a_second_engine_of_a_process_is_refused(engines: ExitStack) -> None:
    """Two at a time cannot be, as its state is of the whole process; the first goes on, and then the second."""
    first = start(engines, policy(), ENGINE)
    wanted = [c.token_ids for c in generate(first, GREEDY)]
    with pytest.raises(EngineStateError, match="runs in this process already"):
        start(engines, policy(), ENGINE)
    assert [c.token_ids for c in generate(first, GREEDY)] == wanted
    first.engine.close(first)
    assert [c.token_ids for c in generate(start(engines, policy(), ENGINE), GREEDY)] == wanted


def twice(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    """Be what no engine knows of: a hook that changes the logits."""
    del module, args
    return 2 * output


def test_what_it_cannot_run_is_refused_when_it_starts(engines: ExitStack) -> None:
    """A cache too small, no language model, an unknown one and one that is computed otherwise leave nothing behind."""
    with pytest.raises(ConfigError, match=r"cache_gb=1e-06 does not suffice"):
        start(engines, policy(), settings(NAME, cache_gb=1e-6))
    with pytest.raises(UnsupportedError, match="is no causal language model"):
        start(engines, nn.Linear(2, 2), ENGINE)
    strange = policy()
    strange.__class__ = type("StrangeForCausalLM", (type(strange),), {})
    with pytest.raises(UnsupportedError, match="model=StrangeForCausalLM"):
        start(engines, strange, ENGINE)
    other = policy()
    other.get_submodule("lm_head").register_forward_hook(twice)
    with pytest.raises(UnsupportedError, match=rf"model=Qwen3ForCausalLM is another one in {TITLE}: a logprob is"):
        start(engines, other, ENGINE)
    assert not dist.is_initialized()
    assert len(generate(start(engines, policy(), ENGINE), GREEDY)) == len(PROMPTS)
