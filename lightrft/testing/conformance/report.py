"""What came of holding a subject to its laws, and how it is told."""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs

from lightrft.testing.subject import SubjectKind

__all__ = ["Finding", "Outcome", "Report", "failure_lines"]

Outcome: TypeAlias = Literal["holds", "broken", "not claimed"]
"""What came of a law; it is "not claimed" if it is about something that the subject does not say it can do."""


@attrs.frozen(kw_only=True)
class Finding:
    """What came of one law on one number of ranks.

    Attributes:
        law: id of the law.
        statement: the law in words.
        world_size: number of ranks.
        outcome: what came of it.
        seconds: how long it took.
        message: what was seen and what must be, or which capability is not claimed; empty if the law holds.
        example: the smallest case that was found, as JSON; None if there is none.
        command: the command that shows the same again; empty unless the law is broken.
    """

    law: str
    statement: str
    world_size: int
    outcome: Outcome
    seconds: float
    message: str = ""
    example: str | None = None
    command: str = ""


@attrs.frozen(kw_only=True)
class Report:
    """What came of holding a subject to laws.

    Attributes:
        subject: its name.
        kind: whether it is a strategy or an engine.
        seed: seed of the examples.
        max_examples: bound on the examples of a law.
        findings: one for each law and number of ranks, in the order in which they were held.
    """

    subject: str
    kind: SubjectKind
    seed: int
    max_examples: int
    findings: tuple[Finding, ...]


def failure_lines(finding: Finding) -> list[str]:
    """Return the lines that tell of a broken law: its sentence, what was seen, the example, and how to see it again.

    Args:
        finding: of a law that is broken.
    """
    ranks = f"{finding.world_size} rank{'s' * (finding.world_size > 1)}"
    return [
        f"{finding.law} is broken on {ranks}: {finding.statement}",
        *(f"    {line}" for line in finding.message.splitlines()),
        *([] if finding.example is None else [f"  example: {finding.example}"]),
        f"  again: {finding.command}",
    ]
