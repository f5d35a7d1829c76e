"""The engine "sglang" with the real SGLang, in an environment of its own: `make test-sglang`."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

import pytest
from guests import (
    GREEDY,
    HOT,
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

from lightrft.config import EngineConfig
from lightrft.errors import WeightSyncError
from lightrft.strategy import SamplingParams, StrategyConfig, get_strategy

# other people's packages warn while they are imported
pytestmark = pytest.mark.filterwarnings("ignore")

ENGINE = settings(installed("sglang"))


@pytest.mark.parametrize("tied", [True, False])
def test_its_completions_are_those_of_the_engine_hf(engines: ExitStack, tied: bool) -> None:
    """Draws are by the seed alone, so two engines make the same completions of the same weights, whatever is asked."""
    model, hf = policy(tied=tied), EngineConfig(type="hf")
    here, there = start(engines, model, ENGINE), start(engines, model, hf)
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
    large = start(engines, model, ENGINE)
    wanted = [c.token_ids for c in generate(large, sampling)]
    large.engine.close(large)
    # the cache holds 48 tokens, and each of the 24 sequences comes to 20 and more
    small = start(engines, model, settings("sglang", cache_gb=48.5 * 512 / 1e9))
    assert inside_of(small).scheduler.max_total_num_tokens == 48
    made = generate(small, sampling)
    assert [c.token_ids for c in made] == wanted
    assert logprob_difference(made, model, temperature=1.0) < 1e-5


def test_a_long_prompt_is_read_in_parts(engines: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that SGLang cuts into chunks is completed as one that it does not cut."""
    model = policy(length=512)
    prompts = [tuple(place % 13 for place in range(length)) for length in (300, 1, 490)]
    handle = start(engines, model, ENGINE)
    wanted = [c.token_ids for c in generate(handle, HOT, prompts)]
    handle.engine.flush_cache(handle)
    scheduler = inside_of(handle).scheduler
    monkeypatch.setattr(scheduler, "chunked_prefill_size", 64)
    assert [c.token_ids for c in generate(handle, HOT, prompts)] == wanted


def test_a_part_of_a_parameter_that_no_name_reaches_is_noticed(engines: ExitStack) -> None:
    """An update that brings two of the three matrices that SGLang holds as one ends with that one's name."""
    handle = start(engines, policy(), ENGINE)
    said = r"2 parameters of SGLang's model were not written \(model\.layers\.0\.self_attn\.qkv"
    with loading(handle, without("k_proj")), pytest.raises(WeightSyncError, match=said):
        get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, policy(seed=1))
    assert handle.status == "torn"


def test_an_answer_of_no_is_an_error(engines: ExitStack) -> None:
    """Where SGLang says that it does not begin an update, the call raises: it would go on with the old weights."""
    handle = start(engines, policy(), ENGINE)
    inside = inside_of(handle)
    messages = inside.package.io_struct
    assert inside.scheduler.weight_updater.begin_weight_update(messages.BeginWeightUpdateReqInput()).success
    with pytest.raises(WeightSyncError, match=r"SGLang refuses an update of its weights .*already open"):
        handle.engine.begin_update(handle)
    assert handle.status == "torn"


def test_a_prompt_that_came_before_is_cached_and_forgotten_with_the_weights(engines: ExitStack) -> None:
    """What is seen to be forgotten after a sync was there before it."""
    prompt = tuple(place % 13 for place in range(300))
    handle = start(engines, policy(length=512), ENGINE)
    generate(handle, GREEDY, [prompt])
    assert inside_of(handle).scheduler.tree_cache.evictable_size() >= 300
    get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, policy(length=512, seed=1))
    assert inside_of(handle).scheduler.tree_cache.evictable_size() < 300


def test_an_interrupt_costs_no_memory_of_the_cache(engines: ExitStack) -> None:
    """After Ctrl-C in the middle of a call the whole cache is there for the next one."""
    handle = start(engines, policy(), ENGINE)

    def interrupt(module: nn.Module, args: object) -> None:
        del module, args
        raise KeyboardInterrupt

    hook = inside_of(handle).model.get_submodule("model.layers.1").register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(handle, HOT)
    hook.remove()
    scheduler = inside_of(handle).scheduler
    assert scheduler.token_to_kv_pool_allocator.available_size() == scheduler.max_total_num_tokens


def test_the_platform_is_for_who_asks_by_name() -> None:
    """SGLang started by somebody else does not find the platform: the entry point answers no unless it is named."""
    program = (
        "import os; os.environ.pop('SGLANG_PLATFORM', None)\n"
        "from sglang.srt.platforms import current_platform\n"
        "print(type(current_platform).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=300)  # noqa: S603 (our own program)
    assert done.stdout.split() == ["sglang.srt.platforms.interface"]
