"""What a strategy does around an engine: generating on all ranks, syncing weights, putting the engine to sleep."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Literal

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn

from lightrft.backends.streams import capture_streams
from lightrft.errors import ConfigError, EngineStateError, LawError, LightRFTError, WeightSyncError
from lightrft.strategy.protocols import Completion, EngineHandle, Prompt, SamplingParams, SyncReport
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.policies import VOCABULARY, PolicyCase, build_policy, generate, policy_cases, policy_for
from lightrft.testing.cases.prompts import prompt_cases, sampling_cases
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.laws import rollout_images, rollout_ranks
from lightrft.testing.reference.completions import (
    Refusal,
    refusal,
    require_logprobs,
    require_refusal,
    require_requests,
    require_same,
    require_same_greedy,
)
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

_PROMPTS = ((1, 2, 3), (4,), (0, 5, 6, 7, 8, 9, 10, 11, 12))  # together they have a row of every token

_SAMPLING = SamplingParams(temperature=0.0, max_new_tokens=3)


@attrs.frozen(kw_only=True)
class _Split:
    policy: PolicyCase
    sampling: SamplingParams
    shares: tuple[tuple[tuple[int, ...], ...], ...]  # prompts of each rank


@attrs.frozen(kw_only=True)
class _Generated:
    together: list[Completion]
    local: list[Completion]
    alone: list[Completion]  # of all prompts of all ranks, on this rank


@st.composite
def _splits(draw: DrawFn, world_size: int) -> _Split:
    return _Split(
        policy=draw(policy_cases(max_layers=1)),
        sampling=draw(sampling_cases(VOCABULARY)),
        shares=tuple(draw(prompt_cases(VOCABULARY, max_prompts=3)) for _ in range(world_size)),
    )


def _generate(rank: Rank, case: _Split) -> _Generated:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    mine = [Prompt(token_ids=prompt) for prompt in case.shares[rank.rank]]
    every = [Prompt(token_ids=prompt) for share in case.shares for prompt in share]
    actor = strategy.prepare(build_policy(policy_for(rank.engine, case.policy)))
    with strategy.setup_inference_engine(rank.engine, actor=actor) as engine:
        return _Generated(
            together=strategy.gather_and_generate(engine, mine, case.sampling),
            local=strategy.engine_generate_local(engine, mine, case.sampling),
            alone=strategy.engine_generate_local(engine, every, case.sampling),
        )


def _generating(harness: Harness, case: _Split) -> None:
    seen = harness.run(_generate, case)
    model = build_policy(policy_for(harness.subject.engine, case.policy))

    def again(seed: int) -> tuple[list[Completion], list[Completion]]:
        redrawn = harness.run(_generate, attrs.evolve(case, sampling=attrs.evolve(case.sampling, seed=seed)))
        return [each for made in redrawn for each in made.together], redrawn[0].alone

    starts = accumulate((len(share) for share in case.shares), initial=0)
    for share, start, made in zip(case.shares, starts, seen, strict=False):
        require_requests(made.together, share, case.sampling, version=0)
        require_requests(made.local, share, case.sampling, version=0)
        require_logprobs(made.together, model, temperature=case.sampling.temperature)
        # one call with all prompts in rank order is what any split must give
        wanted = made.alone[start * case.sampling.n : (start + len(share)) * case.sampling.n]
        why = "completions do not depend on the split over the ranks"
        require_same(made.together, wanted, model, sampling=case.sampling, why=why, again=again)


@attrs.frozen(kw_only=True)
class _Training:
    policy: PolicyCase
    num_steps: int  # before each sync
    num_syncs: int


@attrs.frozen(kw_only=True)
class _Sync:
    report: SyncReport
    version: int
    status: str
    weights: dict[str, Tensor]
    made: list[Completion]
    changed: tuple[str, ...]  # of the modes of modules and the random streams


def _trainings(world_size: int) -> SearchStrategy[_Training]:
    del world_size
    counts = st.integers(1, 2)
    return st.builds(_Training, policy=policy_cases(max_layers=1), num_steps=counts, num_syncs=counts)


def _train_and_sync(rank: Rank, case: _Training) -> list[_Sync]:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    model = build_policy(policy_for(rank.engine, case.policy))
    optimizer = strategy.create_optimizer(model, lr=0.1)  # large, so that stale weights show
    actor = strategy.prepare((model, optimizer, None))
    syncs: list[_Sync] = []
    with strategy.setup_inference_engine(rank.engine, actor=actor.model) as engine:
        for _ in range(case.num_syncs):
            for _ in range(case.num_steps):
                strategy.backward(_loss(actor.model), actor.model, actor.optimizer, weight=1 / rank.world_size)
                strategy.optimizer_step(actor.optimizer, actor.model, actor.scheduler, is_boundary=True)
            syncs.append(_sync(strategy, engine, actor.model))
    return syncs


def _loss(model: nn.Module) -> Tensor:
    input_ids_BT = torch.arange(VOCABULARY)[None]
    output = model(input_ids_BT)
    logits_BTV: Tensor = getattr(output, "logits", output)
    return nn.functional.cross_entropy(logits_BTV[0], input_ids_BT[0].roll(3))


def _sync(strategy: Strategy, engine: EngineHandle, actor: nn.Module) -> _Sync:
    for number, module in enumerate(actor.modules()):
        module.training = number % 2 == 0  # parts of a model that trains may be in evaluation mode for good
    modes, streams = _modes(actor), capture_streams()
    report = strategy.update_engine_weights(engine, actor)
    now = capture_streams()
    kept = {
        "the modes of modules": _modes(actor) == modes,
        "torch's random stream": torch.equal(now.torch, streams.torch),
        "Python's random stream": now.python == streams.python,
    }
    return _Sync(
        changed=tuple(name for name, is_kept in kept.items() if not is_kept),
        report=report,
        version=engine.weight_version,
        status=engine.status,
        weights={name: tensor.detach().clone() for name, tensor in strategy.named_tensors(actor)},
        made=generate(engine, _PROMPTS, _SAMPLING),
    )


def _modes(actor: nn.Module) -> list[bool]:
    return [module.training for module in actor.modules()]


def _syncing(harness: Harness, case: _Training) -> None:
    model = build_policy(policy_for(harness.subject.engine, case.policy))
    for syncs in harness.run(_train_and_sync, case):
        for number, sync in enumerate(syncs, start=1):
            model.load_state_dict(sync.weights)
            _require_honest(sync, number)
            require_requests(sync.made, _PROMPTS, _SAMPLING, version=number)
            require_logprobs(sync.made, model, temperature=0.0)


def _require_honest(sync: _Sync, number: int) -> None:
    num_bytes = sum(tensor.nbytes for tensor in sync.weights.values())
    report = sync.report
    seen = (report.weight_version, report.num_tensors, report.num_bytes, sync.version, sync.status)
    wanted = (number, len(sync.weights), num_bytes, number, "awake")
    if seen != wanted:
        raise LawError(
            f"sync {number} gave {report} and an engine {sync.status!r} with version {sync.version}; version, number "
            f"of tensors, bytes, and the engine's version and status must be {wanted}."
        )
    if sync.changed:
        raise LawError(f"update_engine_weights changed {' and '.join(sync.changed)} and must leave them as they are.")
    if not 0 <= report.max_logprob_difference < 1e-3:  # right engines are 100 times nearer in float32
        raise LawError(f"{report}: the difference of logprobs must be that of rounding.")


_Plant = Literal["keeps_old", "keeps_one", "spoils_one", "loses_one", "breaks_off"]

_PLANTS: tuple[_Plant, ...] = ("keeps_old", "keeps_one", "spoils_one", "loses_one", "breaks_off")


@attrs.frozen(kw_only=True)
class _Failing:
    policy: PolicyCase
    plants: tuple[_Plant, ...]
    victim: int


@attrs.frozen(kw_only=True)
class _Failed:
    refused: Refusal | None
    status: str
    generate: Refusal | None


@attrs.frozen(kw_only=True)
class _Failures:
    failed: list[_Failed]
    mended: _Sync | None  # not tried on an engine that is not torn


def _failing(world_size: int) -> SearchStrategy[_Failing]:
    del world_size
    return st.builds(
        _Failing,
        policy=policy_cases(max_layers=1),
        plants=st.permutations(_PLANTS).map(tuple),
        victim=st.integers(0, 100),
    )


def _sharpened(case: PolicyCase) -> nn.Module:
    """Return a policy whose weights are far from 0, so that no context leaves all tokens alike."""
    model = build_policy(case)
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            sizes, signs = torch.rand((2, *parameter.shape), generator=generator)
            parameter.copy_((1 + sizes) * (signs - 0.5).sign())
    return model


def _evened(case: PolicyCase) -> nn.Module:
    """Return a policy to which all tokens are alike: its weights are 0."""
    model = build_policy(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def _decisive(policy: PolicyCase) -> list[set[str]]:
    """Return tensors without which all tokens are alike, each with the names that it has; no probe is fooled by one."""
    found: list[set[str]] = []
    for name in build_policy(policy).state_dict():
        model = _sharpened(policy)
        weights = model.state_dict()
        names = {each for each, tensor in weights.items() if tensor.data_ptr() == weights[name].data_ptr()}
        weights[name].zero_()
        output = model(torch.arange(VOCABULARY)[None])
        logits_BTV: Tensor = getattr(output, "logits", output)
        if names not in found and logits_BTV.amax(-1).equal(logits_BTV.amin(-1)):
            found.append(names)
    return found


def _fail_to_sync(rank: Rank, case: _Failing) -> _Failures:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    policy = policy_for(rank.engine, case.policy)
    actor = strategy.prepare(_sharpened(policy))
    old = _evened(policy)
    failed: list[_Failed] = []
    decisive = _decisive(policy)
    victims = decisive[case.victim % len(decisive)]
    with strategy.setup_inference_engine(rank.engine, actor=old) as engine:
        right = engine.engine
        for plant in case.plants:
            _plant(engine, plant, old, victims)
            refused = refusal(strategy.update_engine_weights, engine, actor)
            engine.engine = right
            failed.append(
                _Failed(refused=refused, status=engine.status, generate=refusal(generate, engine, _PROMPTS, _SAMPLING))
            )
        return _Failures(failed=failed, mended=_sync(strategy, engine, actor) if engine.status == "torn" else None)


def _plant(engine: EngineHandle, plant: _Plant, old: nn.Module, victims: set[str]) -> None:
    """Make the engine one that does not take all that it is given."""
    right, kept = engine.engine, dict(old.state_dict())

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, Tensor]]) -> None:
        if plant == "keeps_old":
            right.put(handle, [(each, kept[each]) for each, _ in tensors])
        elif plant == "loses_one":
            right.put(handle, [(each, tensor) for each, tensor in tensors if each not in victims])
        elif plant == "keeps_one":
            right.put(handle, [(each, kept[each] if each in victims else tensor) for each, tensor in tensors])
        elif plant == "spoils_one":
            right.put(
                handle,
                [(each, torch.full_like(tensor, torch.nan) if each in victims else tensor) for each, tensor in tensors],
            )
        else:
            raise InterruptedError("the engine broke off")

    engine.engine = attrs.evolve(right, put=put)


# an engine may notice itself that its weights are not finite, and say so in its own way
_ERRORS: dict[_Plant, type[Exception]] = {"breaks_off": InterruptedError, "spoils_one": LightRFTError}


def _failing_sync(harness: Harness, case: _Failing) -> None:
    policy = policy_for(harness.subject.engine, case.policy)
    trainer = _sharpened(policy)
    for seen in harness.run(_fail_to_sync, case):
        for plant, failed in zip(case.plants, seen.failed, strict=True):
            of = f"update_engine_weights with an engine whose put {plant.replace('_', ' ')}"
            require_refusal(failed.refused, _ERRORS.get(plant, WeightSyncError), of=of)
            if failed.status != "torn":
                raise LawError(f"after {of} the engine is {failed.status!r} and must be 'torn'.")
            require_refusal(failed.generate, EngineStateError, of=f"generate after {of}", naming=("torn",))
        if seen.mended is None:
            raise LawError("the engine is not 'torn' after its last failed sync.")
        require_requests(seen.mended.made, _PROMPTS, _SAMPLING, version=seen.mended.version)
        require_logprobs(seen.mended.made, trainer, temperature=0.0)


@attrs.frozen(kw_only=True)
class _Naps:
    policy: PolicyCase
    is_wanted: bool
    num_sleeps: int
    num_wakes: int


@attrs.frozen(kw_only=True)
class _Rested:
    before: list[Completion]
    slept: str
    woken: str
    after: list[Completion]


def _naps(world_size: int) -> SearchStrategy[_Naps]:
    del world_size
    times = st.integers(1, 2)
    return st.builds(
        _Naps, policy=policy_cases(max_layers=1), is_wanted=st.booleans(), num_sleeps=times, num_wakes=times
    )


def _rest(rank: Rank, case: _Naps) -> _Rested:
    strategy = rank.build(attrs.evolve(rank.config, enable_engine_sleep=case.is_wanted))
    strategy.setup_distributed()
    actor = strategy.prepare(build_policy(policy_for(rank.engine, case.policy)))
    with strategy.setup_inference_engine(rank.engine, actor=actor) as engine:
        before = generate(engine, _PROMPTS, _SAMPLING)
        for _ in range(case.num_sleeps):
            strategy.maybe_sleep_inference_engine(engine)
        slept = engine.status
        for _ in range(case.num_wakes):
            strategy.wakeup_inference_engine(engine)
        after = generate(engine, _PROMPTS, _SAMPLING) if engine.status == "awake" else []
        return _Rested(before=before, slept=slept, woken=engine.status, after=after)


def _sleeping(harness: Harness, case: _Naps) -> None:
    wanted = ("asleep" if case.is_wanted else "awake", "awake")
    model = build_policy(policy_for(harness.subject.engine, case.policy))
    for seen in harness.run(_rest, case):
        if (seen.slept, seen.woken) != wanted:
            raise LawError(
                f"with enable_engine_sleep={case.is_wanted} the engine was {seen.slept!r} after "
                f"maybe_sleep_inference_engine and {seen.woken!r} after wakeup_inference_engine; it must be {wanted}."
            )
        require_same_greedy(seen.after, seen.before, model)


@attrs.frozen(kw_only=True)
class _Unknown:
    name: str


def _unknown_names(world_size: int) -> SearchStrategy[_Unknown]:
    del world_size
    return st.builds(_Unknown, name=st.text("abcdefgh", min_size=1, max_size=8).map(_as_unknown))


def _as_unknown(name: str) -> str:
    return f"no-{name}"


def _start_unknown(rank: Rank, case: _Unknown) -> Refusal | None:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    actor = build_policy(PolicyCase(architecture="small"))
    config = attrs.evolve(rank.engine, type=case.name)
    return refusal(strategy.setup_inference_engine, config, actor=actor)


def _unknown_engine(harness: Harness, case: _Unknown) -> None:
    for refused in harness.run(_start_unknown, case):
        require_refusal(refused, ConfigError, of=f"setup_inference_engine with type={case.name!r}", naming=(case.name,))


LAWS: tuple[Law, ...] = (
    Law(
        id="rollout.generate",
        statement="gather_and_generate gives n completions of each of this rank's prompts, in order, the same for any "
        "split of the prompts over the ranks.",
        check=for_all(_splits, _generating),
    ),
    Law(
        id="rollout.update",
        statement="After update_engine_weights the engine's logprobs are the trainer's, the report says what was "
        "written, and the modes of modules and the random streams are what they were.",
        check=for_all(_trainings, _syncing),
    ),
    Law(
        id="rollout.failed_update",
        statement="An engine that did not take all of the weights is noticed: update_engine_weights raises, and "
        "nothing is generated until a sync succeeds.",
        check=for_all(_failing, _failing_sync),
    ),
    Law(
        id="rollout.sleep",
        statement="maybe_sleep_inference_engine sleeps if the config wants it, wakeup_inference_engine wakes, and "
        "completions are the same afterwards.",
        check=for_all(_naps, _sleeping),
    ),
    Law(
        id="rollout.unknown_engine",
        statement="An engine that nobody registered is refused by its name.",
        check=for_all(_unknown_names, _unknown_engine),
    ),
    *rollout_images.LAWS,
    *rollout_ranks.LAWS,
)
"""What strategies do around engines."""
