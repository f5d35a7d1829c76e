"""Prompts with images around an engine that takes them: generating on all ranks, and a sync of all weights."""

from __future__ import annotations

from itertools import accumulate

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from lightrft.errors import LawError
from lightrft.strategy.protocols import Completion, SamplingParams, SyncReport
from lightrft.testing.cases.prompts import sampling_cases
from lightrft.testing.cases.vision import (
    VISION_VOCABULARY,
    VisionCase,
    VisionPrompt,
    build_processor,
    build_vision_policy,
    prompt_of,
    read_by_transformers,
    vision_cases,
    vision_prompt_cases,
)
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.reference.completions import (
    require_logprobs,
    require_requests,
    require_same,
)
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]


@attrs.frozen(kw_only=True)
class _Split:
    policy: VisionCase
    seed: int  # of the weights that the engine is started with, before the sync
    sampling: SamplingParams
    shares: tuple[tuple[VisionPrompt, ...], ...]  # prompts of each rank


@attrs.frozen(kw_only=True)
class _Generated:
    report: SyncReport
    together: list[Completion]
    alone: list[Completion]  # of all prompts of all ranks, on this rank


@st.composite
def _splits(draw: DrawFn, world_size: int) -> _Split:
    return _Split(
        policy=draw(vision_cases()),
        seed=draw(st.integers(0, 2**31 - 1)),
        sampling=draw(sampling_cases(VISION_VOCABULARY)),
        shares=tuple(draw(vision_prompt_cases(max_prompts=3)) for _ in range(world_size)),
    )


def _generate(rank: Rank, case: _Split) -> _Generated:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    processor = build_processor()
    mine = [prompt_of(prompt, processor) for prompt in case.shares[rank.rank]]
    every = [prompt_of(prompt, processor) for share in case.shares for prompt in share]
    old = build_vision_policy(attrs.evolve(case.policy, seed=case.seed))
    actor = strategy.prepare(build_vision_policy(case.policy))
    with strategy.setup_inference_engine(rank.engine, actor=old, processor=processor) as engine:
        return _Generated(
            report=strategy.update_engine_weights(engine, actor),
            together=strategy.gather_and_generate(engine, mine, case.sampling),
            alone=strategy.engine_generate_local(engine, every, case.sampling),
        )


def _generating(harness: Harness, case: _Split) -> None:
    seen = harness.run(_generate, case)
    model, sampling = build_vision_policy(case.policy), case.sampling

    def again(seed: int) -> tuple[list[Completion], list[Completion]]:
        redrawn = harness.run(_generate, attrs.evolve(case, sampling=attrs.evolve(sampling, seed=seed)))
        return [each for made in redrawn for each in made.together], redrawn[0].alone

    starts = accumulate((len(share) for share in case.shares), initial=0)
    for share, start, made in zip(case.shares, starts, seen, strict=False):
        if not 0 <= made.report.max_logprob_difference < 1e-3:  # right engines are 100 times nearer in float32
            raise LawError(f"{made.report}: the difference of logprobs must be that of rounding.")
        read = read_by_transformers(share, n=sampling.n)
        require_requests(made.together, read.token_ids, sampling, version=1)
        require_logprobs(made.together, model, temperature=sampling.temperature, beside=read.beside)
        # one call with all prompts in rank order is what any split must give
        wanted = made.alone[start * sampling.n : (start + len(share)) * sampling.n]
        why = "completions do not depend on the split over the ranks"
        require_same(made.together, wanted, model, sampling=sampling, why=why, again=again, beside=read.beside)


LAWS: tuple[Law, ...] = (
    Law(
        id="rollout.images",
        statement="With images in any mixture over the ranks, gather_and_generate gives each rank the completions of "
        "its prompts, the same for any split, by the weights of the last sync.",
        requires=frozenset({"images"}),
        check=for_all(_splits, _generating),
    ),
)
"""What strategies do around engines that take images."""
