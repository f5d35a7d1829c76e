"""Which weights an engine generates with: after an update, a sleep, and a close."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn

from lightrft.errors import EngineStateError, LawError, WeightSyncError
from lightrft.strategy.protocols import Completion, EngineHandle, SamplingParams
from lightrft.testing.cases.policies import VOCABULARY, PolicyCase, build_policy, generate, policy_cases, running
from lightrft.testing.cases.prompts import prompt_cases, sampling_cases
from lightrft.testing.law import Harness, Law, for_all, on_each_rank
from lightrft.testing.reference.completions import (
    Refusal,
    refusal,
    require_logprobs,
    require_refusal,
    require_requests,
    require_same,
)
from lightrft.testing.subject import Rank

__all__ = ["LAWS", "named_weights"]

_Fault = Literal["missing", "unknown", "twice", "shape", "interrupted", "abort"]

_FAULTS: tuple[_Fault, ...] = ("missing", "unknown", "twice", "shape", "interrupted", "abort")

_PROMPTS = ((1, 2, 3), (4,), (0, 5, 6, 7, 8, 9, 10, 11, 12))  # together they have a row of every token

_SAMPLING = SamplingParams(temperature=0.0, max_new_tokens=3)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a plain model by name, a tied one under each of its names.

    Args:
        model: the model; the tensors are its own.
    """
    return dict(model.state_dict())


@attrs.frozen(kw_only=True)
class _Update:
    policy: PolicyCase
    seed: int  # of the new weights
    order: tuple[int, ...]
    sizes: tuple[int, ...]  # of the buckets, in turn
    faults: tuple[_Fault, ...]  # of the updates before the right one
    victim: int


@attrs.frozen(kw_only=True)
class _Failed:
    refused: Refusal | None
    status: str
    version: int
    generate: Refusal | None


@attrs.frozen(kw_only=True)
class _Right:
    version: int
    handle_version: int
    status: str
    is_put_untouched: bool
    made: list[Completion]
    made_later: list[Completion]


@attrs.frozen(kw_only=True)
class _Updated:
    victim: str
    failed: list[_Failed]
    right: _Right | None  # not tried on an engine that is not torn


@st.composite
def _updates(draw: DrawFn, world_size: int) -> _Update:
    del world_size
    return _Update(
        policy=draw(policy_cases(max_layers=1)),
        seed=draw(st.integers(0, 2**31 - 1)),
        order=tuple(draw(st.permutations(range(14)))),  # a policy of one layer has 14 tensors
        sizes=(draw(st.integers(1, 6)), *draw(st.lists(st.integers(0, 6), max_size=2))),
        faults=tuple(draw(st.permutations(_FAULTS))),
        victim=draw(st.integers(0, 13)),
    )


def _update(rank: Rank, case: _Update) -> _Updated:
    trainer = build_policy(attrs.evolve(case.policy, seed=case.seed))
    weights = named_weights(trainer)
    names = [list(weights)[place] for place in case.order if place < len(weights)]
    tensors = [(name, weights[name]) for name in names]
    victim = _victim(case, weights)
    with running(rank, build_policy(case.policy)) as handle:
        failed = [_fail(handle, fault, tensors, victim, case.sizes) for fault in case.faults]
        right = _succeed(handle, trainer, tensors, case.sizes) if handle.status == "torn" else None
        return _Updated(victim=victim, failed=failed, right=right)


def _fail(
    handle: EngineHandle, fault: _Fault, tensors: list[tuple[str, Tensor]], victim: str, sizes: tuple[int, ...]
) -> _Failed:
    refused = refusal(_attempt, handle, fault, tensors, victim, sizes)
    return _Failed(
        refused=refused,
        status=handle.status,
        version=handle.weight_version,
        generate=refusal(generate, handle, _PROMPTS, _SAMPLING),
    )


def _succeed(
    handle: EngineHandle, trainer: nn.Module, tensors: list[tuple[str, Tensor]], sizes: tuple[int, ...]
) -> _Right:
    before = {name: tensor.clone() for name, tensor in tensors}
    version = _send(handle, tensors, sizes)
    is_put_untouched = all(torch.equal(before[name], tensor) for name, tensor in tensors)
    made = generate(handle, _PROMPTS, _SAMPLING)
    _train_on(trainer)
    return _Right(
        version=version,
        handle_version=handle.weight_version,
        status=handle.status,
        is_put_untouched=is_put_untouched,
        made=made,
        made_later=generate(handle, _PROMPTS, _SAMPLING),
    )


def _train_on(trainer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.neg_().add_(0.5)


def _victim(case: _Update, weights: dict[str, Tensor]) -> str:
    """Return the tensor that the fault is about; none that a tied partner could bring in its place."""
    places = [tensor.data_ptr() for tensor in weights.values()]
    alone = [name for name, tensor in weights.items() if places.count(tensor.data_ptr()) == 1]
    return alone[case.victim % len(alone)]


def _attempt(
    handle: EngineHandle, fault: _Fault, tensors: list[tuple[str, Tensor]], victim: str, sizes: tuple[int, ...]
) -> None:
    """Make an update with something wrong in it."""
    place = [name for name, _ in tensors].index(victim)
    right = tensors[place][1]
    before, after = tensors[:place], tensors[place + 1 :]
    if fault == "abort":
        handle.engine.begin_update(handle)
        handle.engine.put(handle, before)
        handle.engine.abort(handle)
        return
    wrong: dict[_Fault, Iterable[tuple[str, Tensor]]] = {
        "missing": (),
        "unknown": ((victim, right), (f"{victim}.unknown", right)),
        "twice": ((victim, right), (victim, right)),
        "shape": ((victim, right[:1]),),  # broadcasting would take it
        "interrupted": _interrupted((victim, right)),
    }
    if fault == "interrupted":
        handle.engine.begin_update(handle)
        handle.engine.put(handle, chain(before, wrong[fault]))
    else:
        _send(handle, [*before, *wrong[fault], *after], sizes)


def _interrupted(tensor: tuple[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield tensor
    raise InterruptedError("the trainer's stream of tensors broke off")


def _send(handle: EngineHandle, tensors: list[tuple[str, Tensor]], sizes: tuple[int, ...]) -> int:
    """Write tensors in buckets of sizes taken in turn, and return the version of the commit."""
    handle.engine.begin_update(handle)
    start = number = 0
    while start < len(tensors):
        size = sizes[number % len(sizes)]
        handle.engine.put(handle, iter(tensors[start : start + size]))
        start, number = start + size, number + 1
    return handle.engine.commit(handle)


def _updating(harness: Harness, case: _Update) -> None:
    (seen,) = harness.run(_update, case)
    for fault, failed in zip(case.faults, seen.failed, strict=True):
        _require_torn(fault, failed, seen.victim)
    right = seen.right
    if right is None:
        raise LawError("the engine is not 'torn' after its last failed update.")
    if (right.version, right.handle_version, right.status) != (1, 1, "awake"):
        raise LawError(
            f"after a whole update commit returned {right.version}, the handle has version {right.handle_version} and "
            f"is {right.status!r}; these must be 1, 1 and 'awake'."
        )
    if not right.is_put_untouched:
        raise LawError("put changed the tensors that it was given and must leave them as they are.")
    trainer = build_policy(attrs.evolve(case.policy, seed=case.seed))
    for made in (right.made, right.made_later):
        require_requests(made, _PROMPTS, _SAMPLING, version=1)
        require_logprobs(made, trainer, temperature=0.0)


def _require_torn(fault: _Fault, failed: _Failed, victim: str) -> None:
    of = f"an update with the fault {fault!r} at {victim!r}"
    if fault in {"missing", "unknown", "twice", "shape"}:
        require_refusal(failed.refused, WeightSyncError, of=of, naming=[victim] if fault == "missing" else ())
    elif fault == "interrupted":
        require_refusal(failed.refused, InterruptedError, of=of)
    elif failed.refused:
        raise LawError(f"{of} raised {failed.refused} and must leave the engine torn.")
    if (failed.status, failed.version) != ("torn", 0):
        raise LawError(
            f"after {of} the engine is {failed.status!r} with version {failed.version}: must be 'torn' with 0."
        )
    require_refusal(failed.generate, EngineStateError, of=f"generate after {of}", naming=("generate", "torn"))


@attrs.frozen(kw_only=True)
class _Naps:
    policy: PolicyCase
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    naps: tuple[tuple[int, int], ...]  # how often sleep and wake are called in turn


@attrs.frozen(kw_only=True)
class _Rested:
    before: list[Completion]
    after: list[Completion]
    statuses: list[str]
    calls: list[Refusal | None]  # of sleep and wake
    asleep: list[Refusal | None]  # of generate


def _naps(world_size: int) -> SearchStrategy[_Naps]:
    del world_size
    times = st.integers(1, 2)
    return st.builds(
        _Naps,
        policy=policy_cases(),
        prompts=prompt_cases(VOCABULARY, min_prompts=1),
        sampling=sampling_cases(VOCABULARY),
        naps=st.lists(st.tuples(times, times), min_size=1, max_size=2).map(tuple),
    )


def _rest(rank: Rank, case: _Naps) -> _Rested:
    statuses: list[str] = []
    calls: list[Refusal | None] = []
    asleep: list[Refusal | None] = []
    with running(rank, build_policy(case.policy)) as handle:
        before = generate(handle, case.prompts, case.sampling)
        for num_sleeps, num_wakes in case.naps:
            calls += [refusal(handle.engine.sleep, handle) for _ in range(num_sleeps)]
            statuses.append(handle.status)
            asleep.append(refusal(generate, handle, case.prompts, case.sampling))
            calls += [refusal(handle.engine.wake, handle) for _ in range(num_wakes)]
            statuses.append(handle.status)
        after = generate(handle, case.prompts, case.sampling) if handle.status == "awake" else []
        return _Rested(before=before, after=after, statuses=statuses, calls=calls, asleep=asleep)


def _sleep_wake(harness: Harness, case: _Naps) -> None:
    (seen,) = harness.run(_rest, case)
    for refused in seen.calls:
        if refused:
            raise LawError(
                f"sleep and wake, called {case.naps} times, raised {refused} and must do nothing a second time."
            )
    if seen.statuses != ["asleep", "awake"] * len(case.naps):
        raise LawError(f"sleep and wake, called {case.naps} times, led to {seen.statuses}.")
    for answer in seen.asleep:
        require_refusal(answer, EngineStateError, of="generate on an engine asleep", naming=("generate", "asleep"))
    require_requests(seen.before, case.prompts, case.sampling, version=0)
    require_requests(seen.after, case.prompts, case.sampling, version=0)
    model = build_policy(case.policy)

    def again(seed: int) -> tuple[list[Completion], list[Completion]]:
        (rested,) = harness.run(_rest, attrs.evolve(case, sampling=attrs.evolve(case.sampling, seed=seed)))
        return rested.after, rested.before

    why = "sleep, wake, generate equals generate"
    require_same(seen.after, seen.before, model, sampling=case.sampling, why=why, again=again)
    require_logprobs(seen.after, model, temperature=case.sampling.temperature)


_Ending = Literal["awake", "asleep", "updating", "torn"]


@attrs.frozen(kw_only=True)
class _End:
    status: _Ending
    raises: bool  # inside of the `with` block
    num_closes: int


@attrs.frozen(kw_only=True)
class _Ended:
    status: str
    closes: list[Refusal | None]
    refused: Refusal | None
    flushed: Refusal | None
    left_over: list[str]


def _ends(world_size: int) -> SearchStrategy[_End]:
    del world_size
    return st.builds(
        _End,
        status=st.sampled_from(("awake", "asleep", "updating", "torn")),
        raises=st.booleans(),
        num_closes=st.integers(0, 2),
    )


def _end(rank: Rank, case: _End) -> _Ended:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    held = _resources()
    handle = strategy.setup_inference_engine(rank.engine, actor=build_policy(PolicyCase()))
    refusal(_use, handle, case)
    closes = [refusal(handle.engine.close, handle) for _ in range(case.num_closes)]
    return _Ended(
        status=handle.status,
        closes=closes,
        refused=refusal(generate, handle, _PROMPTS, _SAMPLING),
        flushed=refusal(handle.engine.flush_cache, handle),
        left_over=sorted(_resources() - held),
    )


def _use(handle: EngineHandle, case: _End) -> None:
    with handle:
        generate(handle, _PROMPTS, _SAMPLING)
        if case.status == "asleep":
            handle.engine.sleep(handle)
        elif case.status != "awake":
            handle.engine.begin_update(handle)
        if case.status == "torn":
            handle.engine.abort(handle)
        if case.raises:
            raise InterruptedError("the loop around the engine broke off")


def _resources() -> set[str]:
    """Return threads, child processes and mapped shared memory of this process, where the system tells."""
    threads = {f"thread {thread.name} {thread.native_id}" for thread in threading.enumerate()}
    listed = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    children = {f"child process {number}" for number in listed.split()}
    maps = Path("/proc/self/maps")
    mapped = maps.read_text().splitlines() if maps.exists() else []
    # with a name, and without one
    kinds = (" /dev/shm/", " /memfd:lightrft")
    shared = {f"shared memory {line.split(maxsplit=5)[-1]}" for line in mapped if any(kind in line for kind in kinds)}
    return threads | children | shared


def _closing(harness: Harness, case: _End) -> None:
    (seen,) = harness.run(_end, case)
    if seen.status != "closed":
        raise LawError(f"after the `with` block the engine is {seen.status!r} and must be 'closed'.")
    for refused in seen.closes:
        if refused:
            raise LawError(f"close on a closed engine raised {refused} and must do nothing.")
    require_refusal(seen.refused, EngineStateError, of="generate on a closed engine", naming=("generate", "closed"))
    require_refusal(
        seen.flushed, EngineStateError, of="flush_cache on a closed engine", naming=("flush_cache", "closed")
    )
    if seen.left_over:
        raise LawError(f"closing left {', '.join(seen.left_over)} and must free everything.")


LAWS: tuple[Law, ...] = (
    Law(
        id="engine.update",
        statement="A whole update, in any order and buckets, takes the trainer's weights over exactly and by copy; one "
        "with anything wrong leaves the engine torn until a whole one succeeds.",
        check=for_all(_updates, on_each_rank(_updating)),
    ),
    Law(
        id="engine.sleep_wake",
        statement="Sleep, wake, generate equals generate, however often each is called.",
        requires=frozenset({"seeds"}),
        check=for_all(_naps, on_each_rank(_sleep_wake)),
    ),
    Law(
        id="engine.close",
        statement="Closing, in any status and after an exception too, frees processes, threads and shared memory, and "
        "the engine refuses to generate and to flush its cache.",
        check=for_all(_ends, on_each_rank(_closing)),
    ),
)
"""Which weights an engine generates with."""
