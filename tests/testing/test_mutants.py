"""Every planted bug is found by a law, so a law that finds nothing any more is noticed."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings

from lightrft.testing.conformance.hold import draw_settings, hold_law, run_on, says_something
from lightrft.testing.conformance.target import claims_of
from lightrft.testing.law import Harness, Law
from lightrft.testing.laws.registry import ENGINE_LAWS, STRATEGY_LAWS, laws_of
from lightrft.testing.mutants import registry
from lightrft.testing.mutants.mutant import Mutant
from lightrft.testing.mutants.registry import MUTANTS

SETTINGS = settings(draw_settings(30), phases=(Phase.generate,))
"""The default number of examples; none is made smaller, since nobody reads them."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(name: str) -> None:
    """A law is broken by it within the default number of examples, those of its own section first."""
    assert first_killer(MUTANTS[name]) is not None


def first_killer(mutant: Mutant) -> str | None:
    """Return the first law that the mutant breaks."""
    claims = claims_of(mutant.subject)
    with run_on(mutant.subject, "here" if mutant.world_size == 1 else "simulated", mutant.world_size) as run:
        harness = Harness(
            subject=mutant.subject, run=run, world_size=mutant.world_size, settings=SETTINGS, seed=0, example=None
        )
        for law in own_section_first(mutant):
            if says_something(law, mutant.world_size) and hold_law(law, harness, claims=claims).outcome == "broken":
                return law.id
    return None


def own_section_first(mutant: Mutant) -> list[Law]:
    """Return the laws of strategies or of engines."""
    section = mutant.id.partition(".")[0]

    def is_foreign(law: Law) -> bool:
        return law.id.partition(".")[0] != section

    return sorted(laws_of(mutant.subject.kind).values(), key=is_foreign)


def test_there_are_many_and_every_section_has_some() -> None:
    """At least forty bugs are planted, each described in a sentence; every section of laws has at least one."""
    assert len(MUTANTS) == len(registry._ALL) >= 40
    assert all(mutant.defect.endswith(".") for mutant in MUTANTS.values())
    sections = {law.partition(".")[0] for law in [*STRATEGY_LAWS, *ENGINE_LAWS]}
    assert sections - {name.partition(".")[0] for name in MUTANTS} == set()
