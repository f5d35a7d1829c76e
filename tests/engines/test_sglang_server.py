"""The engine "sglang" of a server that somebody started: a real one of SGLang, on this machine's CPU."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs
import pytest
import sync_rounds
import torch
from guests import GREEDY, HOT, generate, installed, logprob_difference, start
from servers import Served, serving, settings_of
from torch import nn

from lightrft.backends.rollout.sglang import server as sglang_server
from lightrft.backends.rollout.sglang import server_sleep
from lightrft.backends.rollout.sglang.server_calls import Answer, Server, ask, weights_of
from lightrft.config import EngineConfig
from lightrft.errors import DataError, EngineCrashError, EngineStateError, UnsupportedError, WeightSyncError
from lightrft.strategy import ENGINES, EngineHandle, Prompt, SamplingParams, StrategyConfig, get_strategy
from lightrft.strategy.protocols.images import Image, Video
from lightrft.strategy.protocols.rollout import Engine, EngineSource
from lightrft.testing.cases.policies import PolicyCase, build_policy
from lightrft.testing.conformance.hold import hold, run_on
from lightrft.testing.laws.registry import choose_laws
from lightrft.testing.subject import subject_of

installed("sglang")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # other people's packages warn while they are imported
    pytest.mark.timeout(3000),  # a server imports SGLang three times, on cores that others may have
]


Serve = Callable[[nn.Module], Served]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Yield what returns the server of a model's architecture; it is started once, for all tests."""
    known: dict[str, Served] = {}
    with ExitStack() as servers:

        def serve(model: nn.Module) -> Served:
            shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
            kind = f"{shapes} {model.config.tie_word_embeddings}"
            if kind not in known:
                known[kind] = servers.enter_context(serving(model, tmp_path_factory.mktemp("model")))
            return known[kind]

        yield serve


@pytest.fixture
def served(serve: Serve) -> Served:
    """Return a server with the architecture of `policy()`."""
    return serve(policy())


def policy(*, seed: int = 0, tied: bool = False, num_layers: int = 2) -> nn.Module:
    """Return a small model in an architecture that the laws and the rounds of training have, too."""
    return build_policy(PolicyCase(num_layers=num_layers, tied=tied, seed=seed))


@pytest.mark.parametrize("kind", sync_rounds.KINDS)
def test_after_rounds_of_training_the_server_is_the_trainer(kind: sync_rounds.Kind, serve: Serve) -> None:
    """After each of 20 rounds logprobs are the trainer's within 1e-5, and the trainer is as it was to the bit."""
    served = serve(sync_rounds.build("untied" if kind == "adapter" else kind))
    subject = subject_of("single", "strategy", engine=settings_of(served))
    with run_on(subject, "here", 1) as run:
        (seen,) = run(sync_rounds.run, sync_rounds.Case(kind=kind, num_rounds=20))
    assert max(seen.probed) < 1e-5
    assert max(seen.differences) < 1e-5
    assert seen.moved > 1e-2
    assert seen.kept


def test_logprobs_are_those_at_the_temperature(engines: ExitStack, served: Served) -> None:
    """They are the model's own at the temperature of the request, for any number of prompts and samples."""
    model = policy(seed=3)
    handle = start(engines, model, settings_of(served))
    for temperature in (0.7, 1.0, 1.7):
        sampling = attrs.evolve(HOT, temperature=temperature)
        made = generate(handle, sampling)
        assert [c.sample_index for c in made] == [0, 1, 2] * 3
        assert logprob_difference(made, model, temperature=temperature) < 1e-5
    assert handle.engine.generate(handle, [], HOT) == []


def test_samples_of_a_prompt_differ(engines: ExitStack, served: Served) -> None:
    """Each sample is drawn by itself."""
    handle = start(engines, policy(), settings_of(served))
    made = generate(handle, SamplingParams(temperature=1.5, max_new_tokens=16, n=8), [(1, 2)])
    assert len({completion.token_ids for completion in made}) == 8


def test_stop_tokens_are_those_of_the_request(engines: ExitStack, served: Served) -> None:
    """A completion ends at the first of them, and says so."""
    handle = start(engines, policy(), settings_of(served))
    made = generate(handle, SamplingParams(temperature=1.5, max_new_tokens=16, n=8, stop_token_ids=(3, 4)), [(1, 2)])
    for completion in made:
        is_stopped = completion.token_ids[-1] in {3, 4}
        assert completion.finish_reason == ("stop" if is_stopped else "length")
        assert not {3, 4}.intersection(completion.token_ids[:-1])


def test_sleep_changes_nothing(engines: ExitStack, served: Served) -> None:
    """What is generated after waking is what was before, and an engine closed in its sleep is awake for others."""
    handle = start(engines, policy(), settings_of(served))
    before = generate(handle, GREEDY)
    handle.engine.sleep(handle)
    handle.engine.wake(handle)
    assert [c.token_ids for c in generate(handle, GREEDY)] == [c.token_ids for c in before]
    handle.engine.sleep(handle)
    handle.engine.close(handle)
    other = start(engines, policy(), settings_of(served))
    assert [c.token_ids for c in generate(other, GREEDY)] == [c.token_ids for c in before]


def calls_of(patch: pytest.MonkeyPatch) -> list[str]:
    """Return what will hold the paths of the calls that change how a server sleeps, or its weights."""
    paths: list[str] = []

    def noted(server: Server, path: str, content: Mapping[str, object] | None = None) -> Answer:
        paths.append(path)
        return ask(server, path, content)

    patch.setattr(server_sleep, "ask", noted)
    patch.setattr(sglang_server, "ask", noted)
    return paths


def post(served: Served, path: str, content: Mapping[str, object]) -> None:
    assert ask(Server(url=served.url, timeout_seconds=120.0), path, content).status == 200


def resume_by_hand(served: Served) -> None:
    post(served, "/resume_memory_occupation", {"tags": ["kv_cache"]})


def be_as_started_again(served: Served) -> None:
    resume_by_hand(served)
    post(served, "/update_weight_version", {"new_version": "default", "abort_all_requests": False})


@pytest.mark.parametrize("end", ["wake", "close"])
def test_a_server_that_was_started_again_while_the_engine_slept_is_left_alone(
    engines: ExitStack, served: Served, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """SGLang's scheduler dies of a resume that no release came before; whoever generates is told to sync."""
    model = policy()
    handle = start(engines, model, settings_of(served))
    handle.engine.sleep(handle)
    be_as_started_again(served)
    paths = calls_of(monkeypatch)
    if end == "close":
        handle.engine.close(handle)
        handle = start(engines, model, settings_of(served))
    else:
        handle.engine.wake(handle)
        with pytest.raises(EngineCrashError, match=r"has the weights 'default' and was given .* started again.*sync"):
            generate(handle, GREEDY)
        assert handle.status == "torn"
        get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, model)
    assert "/resume_memory_occupation" not in paths
    assert logprob_difference(generate(handle, GREEDY), model, temperature=1.0) < 1e-5


@pytest.mark.parametrize("end", ["wake", "close"])
def test_a_server_that_another_engine_took_in_its_sleep_is_that_engines(
    engines: ExitStack, served: Served, end: str
) -> None:
    """An engine that starts wakes the server for itself, and the one that slept has nothing to wake."""
    model = policy(seed=1)
    handle = start(engines, policy(seed=2), settings_of(served))
    handle.engine.sleep(handle)
    other = start(engines, model, settings_of(served))
    other.engine.sleep(other)
    other.engine.wake(other)
    (handle.engine.wake if end == "wake" else handle.engine.close)(handle)
    assert logprob_difference(generate(other, GREEDY), model, temperature=1.0) < 1e-5
    if end == "wake":
        handle.engine.sleep(handle)  # it would be the other's sleep
        assert generate(other, GREEDY)


def test_a_server_that_was_woken_by_hand_is_awake(engines: ExitStack, served: Served) -> None:
    """Its weights are those that were there before, and waking it again does not end it."""
    model = policy()
    handle = start(engines, model, settings_of(served))
    for _ in range(2):
        handle.engine.sleep(handle)
        resume_by_hand(served)
        handle.engine.wake(handle)
        assert logprob_difference(generate(handle, GREEDY), model, temperature=1.0) < 1e-5


def test_a_server_whose_trainer_died_while_it_slept_is_woken(
    engines: ExitStack, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next trainer wakes it once, before it gives it weights; a server that is awake is not woken."""
    dead = start(engines, policy(seed=1), settings_of(served))
    dead.engine.sleep(dead)
    assert weights_of(Server(url=served.url, timeout_seconds=120.0)).endswith("-asleep")
    paths = calls_of(monkeypatch)
    model = policy(seed=2)
    handle = start(engines, model, settings_of(served))
    waking = paths.index("/resume_memory_occupation")
    assert waking < paths.index("/update_weights_from_disk")
    assert "/resume_memory_occupation" not in paths[waking + 1 :]
    assert logprob_difference(generate(handle, GREEDY), model, temperature=1.0) < 1e-5
    paths.clear()
    start(engines, model, settings_of(served))
    assert "/resume_memory_occupation" not in paths


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_prompts_that_hold_more_than_text_are_refused(engines: ExitStack, served: Served, kind: str) -> None:
    """They are named in the line that other engines for text give."""
    handle = start(engines, policy(), settings_of(served))
    image = Image(width=1, height=1, pixels=bytes(3))
    seen = {
        "images": Prompt(token_ids=(1,), images=(image,)),
        "videos": Prompt(token_ids=(1,), videos=(Video(frames=(image,) * 2, fps=1.0),)),
    }
    with pytest.raises(
        UnsupportedError, match=rf"prompts\[1\] has {kind} and the engine 'sglang with engine.url' takes none"
    ):
        handle.engine.generate(handle, [Prompt(token_ids=(1,)), seen[kind]], GREEDY)


@pytest.mark.parametrize(
    "asked",
    [SamplingParams(top_k=2), SamplingParams(top_p=0.5), SamplingParams(min_new_tokens=1, stop_token_ids=(1,))],
)
def test_what_a_server_does_otherwise_is_refused(engines: ExitStack, served: Served, asked: SamplingParams) -> None:
    """It would choose among other tokens, or report other logprobs."""
    handle = start(engines, policy(), settings_of(served))
    with pytest.raises(UnsupportedError, match=r"leave it at .*, or engine.url out"):
        generate(handle, asked)


def test_a_token_that_would_end_the_server_does_not_reach_it(engines: ExitStack, served: Served) -> None:
    """SGLang's scheduler dies of a token beyond the vocabulary; it is refused here, and the server goes on."""
    handle = start(engines, policy(), settings_of(served))
    with pytest.raises(DataError, match=r"prompts\[0\] has token 99"):
        generate(handle, GREEDY, [(1, 99)])
    assert generate(handle, GREEDY)


@pytest.mark.parametrize("model", [policy(num_layers=1), policy(tied=True)], ids=["shallower", "tied"])
def test_another_model_is_refused_before_a_tensor_goes_there(
    engines: ExitStack, served: Served, model: nn.Module
) -> None:
    """SGLang's scheduler dies of a tensor that does not fit; the shapes are compared first, and the server goes on."""
    with pytest.raises(UnsupportedError, match=r"runs a model whose \w+ is .* and the trainer's is"):
        start(engines, model, settings_of(served))
    assert generate(start(engines, policy(), settings_of(served)), GREEDY)


def test_a_server_that_rounds_otherwise_is_refused_and_one_that_is_away_is_one_clear_error(
    engines: ExitStack, tmp_path: Path
) -> None:
    """Without --dtype a server computes a float32 model in float16; away is one that was killed, asleep or awake."""
    half = policy().half()
    with serving(policy(), tmp_path, dtype="float16") as server:
        with pytest.raises(UnsupportedError, match=r"computes otherwise: .*--dtype float32"):
            start(engines, policy(), settings_of(server))
        sleeper, handle = start(engines, half, settings_of(server)), start(engines, half, settings_of(server))
        handle.engine.sleep(handle)
        handle.engine.wake(handle)
        assert generate(handle, GREEDY)
        sleeper.engine.sleep(sleeper)
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait(60)
        sleeper.engine.wake(sleeper)
        for one in (handle, sleeper):
            with pytest.raises(EngineCrashError, match=r"gives no answer to /\w+ \(.*refused.*start it again and sync"):
                generate(one, GREEDY)
            assert one.status == "torn"
        with pytest.raises(EngineCrashError, match=r"gives no answer to /\w+ \("):
            get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, half)
        handle.engine.close(handle)
        with pytest.raises(EngineCrashError, match="gives no answer to /model_info"):
            start(engines, half, settings_of(server))


def test_weights_of_somebody_else_are_noticed(engines: ExitStack, served: Served) -> None:
    """A completion of weights that this engine did not bring is no completion; the next sync mends it."""
    model = policy(seed=1)
    handle, other = start(engines, model, settings_of(served)), start(engines, policy(seed=2), settings_of(served))
    with pytest.raises(EngineCrashError, match="somebody else gave it weights"):
        generate(handle, GREEDY)
    assert (handle.status, other.status) == ("torn", "awake")
    get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, model)
    assert logprob_difference(generate(handle, GREEDY), model, temperature=1.0) < 1e-5


def test_an_update_that_the_server_cannot_read_leaves_the_engine_torn(engines: ExitStack, served: Served) -> None:
    """The server's own words are told, and the next sync mends the engine."""
    model = policy()
    handle = start(engines, model, settings_of(served))
    handle.engine.begin_update(handle)
    handle.engine.put(handle, model.state_dict().items())
    for file in Path(handle.state.files.name).iterdir():  # type: ignore[attr-defined]
        file.unlink()
    with pytest.raises(WeightSyncError, match="SGLang's server takes no weights"):
        handle.engine.commit(handle)
    assert handle.status == "torn"
    get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, model)
    assert logprob_difference(generate(handle, GREEDY), model, temperature=1.0) < 1e-5


def test_weights_that_are_not_finite_are_told(engines: ExitStack, served: Served) -> None:
    """A logprob of such weights is none, and the engine can be mended."""
    model, broken = policy(), policy()
    with torch.no_grad():
        broken.get_parameter("model.norm.weight").fill_(float("nan"))
    handle = start(engines, model, settings_of(served))
    strategy = get_strategy(StrategyConfig(strategy="single"))
    with pytest.raises(EngineStateError, match="the weights are not finite"):
        strategy.update_engine_weights(handle, broken)
    strategy.update_engine_weights(handle, model)
    assert logprob_difference(generate(handle, GREEDY), model, temperature=1.0) < 1e-5


def test_no_file_is_left(engines: ExitStack, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of weights are there while they are written and read."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = policy()
    handle = start(engines, model, settings_of(served))
    assert [*tmp_path.iterdir()] == []
    handle.engine.begin_update(handle)
    handle.engine.put(handle, model.state_dict().items())
    assert len([*tmp_path.iterdir()]) == 1
    handle.engine.abort(handle)
    assert [*tmp_path.iterdir()] == []
    handle.engine.begin_update(handle)
    handle.engine.close(handle)
    assert [*tmp_path.iterdir()] == []


@contextmanager
def stopped(process: int) -> Generator[None]:
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def scheduler_of(served: Served) -> int:
    """Return the process of a server that generates and reads weights; another one answers for it."""
    children = [path.read_text().split() for path in Path(f"/proc/{served.process.pid}/task").glob("*/children")]
    found = {child for each in children for child in each if "scheduler" in Path(f"/proc/{child}/cmdline").read_text()}
    (scheduler,) = found
    return int(scheduler)


def be_hasty(handle: EngineHandle, patch: pytest.MonkeyPatch) -> None:
    """Let the engine wait a second for completions, and for weights to be read."""
    patch.setattr(handle.state, "server", attrs.evolve(handle.state.server, timeout_seconds=1.0))  # type: ignore[attr-defined]


def test_a_call_that_takes_too_long_names_the_setting(engines: ExitStack, served: Served) -> None:
    """A call takes no longer than engine.timeout_seconds, and a server that goes on is synced again."""
    model = policy()
    handle = start(engines, model, settings_of(served))
    said = r"engine\.timeout_seconds=1 passed before .* gave an answer to /\w+; raise it if calls take so long"
    with pytest.MonkeyPatch.context() as patch, stopped(scheduler_of(served)):
        be_hasty(handle, patch)
        with pytest.raises(EngineCrashError, match=said):
            generate(handle, GREEDY)
    assert handle.status == "torn"
    get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, model)
    assert logprob_difference(generate(handle, GREEDY), model, temperature=1.0) < 1e-5


def test_weights_that_take_too_long_to_read_are_not_sent_again_at_once(
    engines: ExitStack, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may be reading them still, so their files stay until it has answered the next sync."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    strategy = get_strategy(StrategyConfig(strategy="single"))
    handle, model = start(engines, policy(seed=1), settings_of(served)), policy(seed=2)
    paths = calls_of(monkeypatch)
    said = r"engine\.timeout_seconds=1 passed before .* gave an answer to /update_weights_from_disk; raise it"
    with pytest.MonkeyPatch.context() as patch, stopped(scheduler_of(served)):
        be_hasty(handle, patch)
        with pytest.raises(WeightSyncError, match=said):
            strategy.update_engine_weights(handle, model)
        assert paths.count("/update_weights_from_disk") == 1
        assert handle.status == "torn"
        assert len([*tmp_path.glob("*/model-*.safetensors")]) == 1
    strategy.update_engine_weights(handle, model)
    assert [*tmp_path.iterdir()] == []
    assert logprob_difference(generate(handle, GREEDY), model, temperature=1.0) < 1e-5


def test_it_obeys_the_laws_of_what_it_claims(serve: Serve) -> None:
    """Every law of engines that is not of seeds, sampling or images, with a server for each architecture."""

    def build(config: EngineConfig) -> Engine:
        def begin(source: EngineSource) -> EngineHandle:
            of_model = attrs.evolve(config, type="sglang", url=serve(source.model).url)
            return ENGINES["sglang"](of_model).start(source)

        nobody = ENGINES["sglang"](attrs.evolve(config, type="sglang", url="http://127.0.0.1:1"))
        return attrs.evolve(nobody, start=begin)

    for number, tied in itertools.product((1, 2), (False, True)):  # a law waits for no server to come up
        serve(policy(num_layers=number, tied=tied))
    report = hold(subject_of(build, "engine"), choose_laws("engine", []), max_examples=3)
    found = {finding.law: finding for finding in report.findings}
    assert {law: (one.outcome, one.message) for law, one in found.items() if one.outcome == "broken"} == {}
    assert {law for law, one in found.items() if one.outcome == "holds"} >= {
        "engine.order",
        "engine.logprobs",
        "engine.refusals",
        "engine.update",
        "engine.close",
    }


def test_the_server_lives_on(served: Served) -> None:
    """Whatever the engines of these tests did, the server still answers."""
    assert ask(Server(url=served.url, timeout_seconds=60.0), "/health").status == 200
