"""The engine "vllm" with the real vLLM, in an environment of its own: `make test-vllm`."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import psutil
import pytest
import sync_rounds
import torch
import torch.distributed as dist
from torch import nn

from lightrft.backends.rollout import vllm_load
from lightrft.backends.rollout.projection import PACKED_AFTER
from lightrft.backends.rollout.vllm_inside import Inside
from lightrft.backends.rollout.vllm_package import require_vllm
from lightrft.config import EngineConfig, ModelConfig
from lightrft.errors import ConfigError, EngineStateError, MissingPackageError, UnsupportedError, WeightSyncError
from lightrft.models.build import build_model
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy import Completion, EngineHandle, Prompt, SamplingParams, StrategyConfig, get_strategy

try:
    require_vllm()
except MissingPackageError as missing:
    pytest.skip(str(missing), allow_module_level=True)

# other people's packages warn while they are imported
pytestmark = pytest.mark.filterwarnings("ignore")

ENGINE = EngineConfig(type="vllm", cache_gb=0.01, batch_size=64)
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


def test_a_tied_head_follows_its_embedding(engines: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the embedding comes alone, vLLM's tied head has its new weights, too; by vLLM's own means it has not."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    handle = start(engines, policy(tied=True))
    load = vllm_load.load

    def load_without_head(inside: Inside, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        load(inside, [(name, tensor) for name, tensor in tensors if name != "lm_head.weight"])

    monkeypatch.setattr("lightrft.backends.rollout.vllm.load", load_without_head)
    new = policy(tied=True, seed=1)
    assert strategy.update_engine_weights(handle, new).max_logprob_difference < 1e-5
    assert logprob_difference(generate(handle, HOT), new, temperature=1.7) < 1e-5


def test_weights_that_are_not_the_trainers_are_noticed(engines: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that came with other values is seen by the probe; the engine is torn, and the next sync mends it."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    handle = start(engines, policy())
    load = vllm_load.load

    def load_otherwise(inside: Inside, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        load(inside, [(name, tensor * (1 + ("1.mlp.down_proj" in name))) for name, tensor in tensors])

    with monkeypatch.context() as patch:
        patch.setattr("lightrft.backends.rollout.vllm.load", load_otherwise)
        with pytest.raises(WeightSyncError, match=r"a logprob is .* nats from the trainer's"):
            strategy.update_engine_weights(handle, policy(seed=1))
    with pytest.raises(EngineStateError, match="torn"):
        generate(handle, GREEDY)
    new = policy(seed=2)
    assert strategy.update_engine_weights(handle, new).max_logprob_difference < 1e-5
    assert logprob_difference(generate(handle, HOT), new, temperature=1.7) < 1e-5


def test_a_matrix_that_was_packed_is_forgotten(engines: ExitStack) -> None:
    """After long generation with one set of weights, short and long generation with the next have its logprobs."""
    wide, new = policy(length=128, hidden_size=512), policy(length=128, hidden_size=512, seed=1)
    handle = start(engines, wide)
    long = SamplingParams(temperature=1.7, max_new_tokens=2 * PACKED_AFTER, seed=5)
    assert logprob_difference(generate(handle, long), wide, temperature=1.7) < 1e-4
    get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, new)
    assert logprob_difference(generate(handle, HOT), new, temperature=1.7) < 1e-4
    assert logprob_difference(generate(handle, long), new, temperature=1.7) < 1e-4


def test_a_parameter_of_vllm_that_no_name_reaches_is_noticed(
    engines: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update whose names vLLM's loader takes and drops ends with the parameter's name, and a torn engine."""
    handle = start(engines, policy())
    load = vllm_load.load

    def drop(inside: Inside, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        load(inside, [(name, tensor) for name, tensor in tensors if "down_proj" not in name])

    monkeypatch.setattr("lightrft.backends.rollout.vllm.load", drop)
    with pytest.raises(
        WeightSyncError, match=r"2 parameters of vLLM's model were not written \(model\.layers\.0\.mlp\.down"
    ):
        get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, policy(seed=1))
    assert handle.status == "torn"


def test_keys_and_values_of_earlier_weights_are_forgotten(engines: ExitStack) -> None:
    """A prompt that lies in the prefix cache is computed anew after its weights changed."""
    prompt = tuple(place % 13 for place in range(300))  # more than the 128 tokens of a block of the cache
    old, new = policy(length=512), policy(length=512, seed=1)
    handle = start(engines, old)
    first, second = (generate(handle, GREEDY, [prompt]) for _ in range(2))
    assert [c.token_ids for c in first] == [c.token_ids for c in second]
    get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, new)
    assert logprob_difference(generate(handle, GREEDY, [prompt]), new, temperature=1.0) < 1e-5


def test_tensors_may_be_overwritten_once_they_were_put(engines: ExitStack) -> None:
    """What was put is the caller's again, also where vLLM waits for the other parts of a layer."""
    new = policy(seed=1)
    weights = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    handle = start(engines, policy())
    handle.engine.begin_update(handle)
    for name, tensor in weights.items():
        handle.engine.put(handle, [(name, tensor)])
        tensor.fill_(9.0)
    handle.engine.commit(handle)
    assert logprob_difference(generate(handle, GREEDY), new, temperature=1.0) < 1e-5


def test_asleep_it_has_no_cache_and_awake_it_goes_on(engines: ExitStack) -> None:
    """Sleep frees the key-value cache to the last byte; after waking the same completions come."""
    handle = start(engines, policy())
    caches = cast("list[torch.Tensor]", handle.state.inside.runner.kv_caches)  # type: ignore[attr-defined]
    before, size = generate(handle, HOT), sum(cache.untyped_storage().nbytes() for cache in caches)
    handle.engine.sleep(handle)
    assert size > 5e6
    assert sum(cache.untyped_storage().nbytes() for cache in caches) == 0
    handle.engine.wake(handle)
    assert [c.token_ids for c in generate(handle, HOT)] == [c.token_ids for c in before]


def test_an_interrupt_leaves_no_request_behind(engines: ExitStack) -> None:
    """After Ctrl-C in the middle of a call the next one is given its own completions, and no other."""
    handle = start(engines, policy())
    wanted = [c.token_ids for c in generate(handle, HOT)]

    def interrupt(module: nn.Module, args: object) -> None:
        del module, args
        raise KeyboardInterrupt

    hook = handle.state.inside.model.register_forward_pre_hook(interrupt)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        generate(handle, GREEDY)
    hook.remove()
    assert [c.token_ids for c in generate(handle, HOT)] == wanted


def surroundings() -> dict[str, object]:
    """Return what of this process vLLM could have changed."""
    return {
        "environment": dict(os.environ),
        "threads": (torch.get_num_threads(), torch.set_num_threads),
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "frozen": gc.get_freeze_count(),
        "dtype": torch.get_default_dtype(),
        "affinity": os.sched_getaffinity(0),
    }


def ports_of(process: psutil.Process) -> set[tuple[str, int]]:
    return {(connection.laddr.ip, connection.laddr.port) for connection in process.net_connections()}


def test_the_process_is_left_as_it_was(engines: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting, generating, syncing and closing leave environment, random streams, threads and ports as they were."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    strategy = get_strategy(StrategyConfig(strategy="single"))
    process = psutil.Process()
    gc.collect()  # what a test before this one left to be collected has ports
    before, ports, children = surroundings(), ports_of(process), set(process.children(recursive=True))
    handle = start(engines, policy())
    assert {ip for ip, _ in ports_of(process) - ports} == {"127.0.0.1"}  # gloo's, of no fixed port
    assert set(process.children(recursive=True)) <= children
    generate(handle, HOT)
    strategy.update_engine_weights(handle, policy(seed=1))
    assert surroundings() == before
    handle.engine.close(handle)
    assert surroundings() == before
    assert ports_of(process) <= ports
    assert list(tmp_path.iterdir()) == []
    assert not dist.is_initialized()


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
    """Two at a time cannot be, as vLLM's groups are of the whole process; the first goes on, and then the second."""
    first = start(engines, policy())
    wanted = [completion.token_ids for completion in generate(first, GREEDY)]
    with pytest.raises(EngineStateError, match="runs in this process already"):
        start(engines, policy())
    assert [completion.token_ids for completion in generate(first, GREEDY)] == wanted
    first.engine.close(first)
    assert [completion.token_ids for completion in generate(start(engines, policy()), GREEDY)] == wanted


def twice(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    """Be what vLLM does not know of: a hook that changes the logits."""
    del module, args
    return 2 * output


@pytest.mark.parametrize("expert_size", [32, 40])
def test_experts_arrive_in_every_sync(engines: ExitStack, expert_size: int) -> None:
    """Experts, which vLLM rearranges at its first load alone and pads to a multiple of 32, arrive in every sync."""
    handle = start(engines, sync_rounds.build("experts", expert_size=expert_size))
    strategy = get_strategy(StrategyConfig(strategy="single"))
    for seed in (1, 2):
        new = sync_rounds.build("experts", seed=seed, expert_size=expert_size)
        assert strategy.update_engine_weights(handle, new).max_logprob_difference < 1e-5
        assert logprob_difference(generate(handle, HOT), new, temperature=1.7) < 1e-5


def test_what_vllm_cannot_run_is_refused_when_it_starts(engines: ExitStack) -> None:
    """Heads of another size, a cache that is too small and what vLLM computes otherwise are refused."""
    with pytest.raises(UnsupportedError, match="head_dim=8 is not among the sizes"):
        start(engines, policy(hidden_size=16))
    with pytest.raises(ConfigError, match=r"cache_gb=1e-06 does not suffice"):
        start(engines, policy(), EngineConfig(type="vllm", cache_gb=1e-6))
    with pytest.raises(UnsupportedError, match="is no causal language model"):
        start(engines, nn.Linear(2, 2))
    other = policy()
    other.get_submodule("lm_head").register_forward_hook(twice)
    with pytest.raises(UnsupportedError, match=r"model=Qwen3ForCausalLM is another one in vLLM: a logprob is"):
        start(engines, other)
    assert not dist.is_initialized()
    assert len(generate(start(engines, policy()), GREEDY)) == len(PROMPTS)
