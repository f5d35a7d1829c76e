"""Every planted bug is found by its law, so a law that finds nothing any more is noticed."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings

from lightrft.testing.conformance.hold import draw_settings, hold_law, run_on, says_something
from lightrft.testing.conformance.target import claims_of
from lightrft.testing.law import Harness
from lightrft.testing.laws.registry import ENGINE_LAWS, STRATEGY_LAWS, laws_of
from lightrft.testing.mutants import registry
from lightrft.testing.mutants.registry import MUTANTS

SETTINGS = settings(draw_settings(500), phases=(Phase.generate,))
"""Nearly every bug is found by the default of 30 examples; which ones a seed draws depends on what was imported before.

None is made smaller, since nobody reads them.
"""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(name: str) -> None:
    """The law that it names is broken by it."""
    mutant = MUTANTS[name]
    law = laws_of(mutant.subject.kind)[mutant.law]
    claims = claims_of(mutant.subject)
    assert says_something(law, mutant.world_size)
    with run_on(mutant.subject, "here" if mutant.world_size == 1 else "simulated", mutant.world_size) as run:
        harness = Harness(
            subject=mutant.subject, run=run, world_size=mutant.world_size, settings=SETTINGS, seed=0, example=None
        )
        assert hold_law(law, harness, claims=claims).outcome == "broken"


def test_there_are_many_and_every_section_has_some() -> None:
    """At least forty bugs are planted, each described in a sentence; every section of laws has at least one."""
    assert len(MUTANTS) == len(registry._ALL) >= 40
    assert all(mutant.defect.endswith(".") for mutant in MUTANTS.values())
    sections = {law.partition(".")[0] for law in [*STRATEGY_LAWS, *ENGINE_LAWS]}
    assert sections - {name.partition(".")[0] for name in MUTANTS} == set()
