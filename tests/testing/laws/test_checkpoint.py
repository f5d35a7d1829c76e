from __future__ import annotations

import errno
import os
import pickle
import signal
from pathlib import Path
from typing import get_type_hints

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck
from safetensors.torch import save_file

from lightrft.errors import LawError
from lightrft.testing.law import Harness, Law
from lightrft.testing.laws.checkpoint import LAWS, code, kill, runs
from lightrft.testing.laws.checkpoint.refusal import Refusal, refusal_of, require_refused
from lightrft.testing.plain import from_json, to_json
from lightrft.testing.ranks.here import run_here
from lightrft.testing.subject import RunOnRanks, subject_of

SUBJECT = subject_of("single", "strategy")
SETTINGS = hypothesis.settings(
    max_examples=2, database=None, deadline=None, print_blob=False, suppress_health_check=list(HealthCheck)
)


def as_json(run: RunOnRanks) -> RunOnRanks:
    """Ranks whose cases and evidence travel as JSON."""

    def run_as_json(program: object, case: object) -> list[object]:
        hints = get_type_hints(program)
        case_kind, evidence_kind = list(hints.values())[1], hints["return"]
        evidence = run(program, from_json(to_json(case, case_kind), case_kind))
        return [from_json(to_json(one, evidence_kind), evidence_kind) for one in evidence]

    return run_as_json


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.id)
def test_cases_and_evidence_travel_as_json(law: Law) -> None:
    """Every law holds where what its program is given and returns goes through JSON, as between processes."""
    run = as_json(run_here(SUBJECT))
    law.check(Harness(subject=SUBJECT, run=run, world_size=1, settings=SETTINGS, seed=0, example=None))


def test_ids_and_statements() -> None:
    """Ids are unique and of these two sections; statements are sentences."""
    assert len({law.id for law in LAWS}) == len(LAWS)
    assert {law.id.split(".")[0] for law in LAWS} == {"checkpoint", "export"}
    assert all(law.statement.endswith(".") and law.statement[0].isupper() for law in LAWS)


def test_a_refusal_must_be_of_its_kind_and_name_what_is_wrong() -> None:
    """What was done, refused as another error, or refused without a name fails, and says what must be."""
    right = Refusal(kinds=("CheckpointError", "RuntimeError"), message="step=3 is not there")
    require_refused(right, "loading", named=("step=3",))
    with pytest.raises(LawError, match="loading was done without an error; it must be a CheckpointError"):
        require_refused(None, "loading", named=("",))
    with pytest.raises(LawError, match=r"loading ended in CheckpointError .*; it must be a ConfigError"):
        require_refused(right, "loading", kind="ConfigError", named=("",))
    with pytest.raises(LawError, match=r"the message must name one of \('step=4',\)"):
        require_refused(right, "loading", named=("step=4",))


def test_traces_are_compared_by_bits() -> None:
    """A zero of the other sign, another dtype and another draw are differences, and a NaN equals itself."""

    def trace(value: torch.Tensor, draw: float = 0.5) -> runs.Trace:
        return runs.Trace(losses=(float("nan"),), results=(), parameters={"weight": value}, draws=(draw,), data=())

    zero = trace(torch.tensor([0.0]))
    runs.require_equal_traces(zero, trace(torch.tensor([0.0])), "equal")
    for other in (trace(torch.tensor([-0.0])), trace(torch.tensor([0.0]).double()), trace(torch.tensor([0.0]), 0.25)):
        with pytest.raises(LawError, match="must be"):
            runs.require_equal_traces(other, zero, "other")


def write_two(directory: Path) -> None:
    (directory / "a").mkdir()
    (directory / "a" / "b").write_bytes(b"b")
    (directory / "a" / "b").rename(directory / "c")


def test_operations_are_seen_and_stopped(tmp_path: Path) -> None:
    """A save can be stopped before each of its operations, and what came before has happened."""
    names = kill._NEEDS_SPACE
    (tmp_path / "whole").mkdir()
    with kill._operations(names) as seen:
        write_two(tmp_path / "whole")
    assert {"mkdir", "open", "write", "rename"} <= set(seen)
    left = []
    for moment in range(len(seen) + 1):
        directory = tmp_path / str(moment)
        directory.mkdir()

        def fail() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def save(directory: Path = directory, moment: int = moment) -> None:
            with kill._stopped(names, moment, fail):
                write_two(directory)

        refusal = refusal_of(save)
        assert (refusal is None) == (moment == len(seen))
        left.append(sorted(path.name for path in directory.rglob("*")))
    assert left[0] == []
    assert left[1] == ["a"]
    assert ["a", "b"] in left
    assert left[-1] == ["a", "c"]


def test_a_writer_is_killed_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The status tells whether the child ended, failed or was killed; what it said is read; this process goes on."""

    def kill_myself() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = tmp_path / "writer.log"
    assert kill._in_child(kill_myself, log) == (-signal.SIGKILL, "")
    assert kill._in_child(os.getpid, log) == (0, "")
    status, said = kill._in_child(fail, log)
    assert status == 1
    assert said.endswith("No space left on device\n")


def test_pickles_are_told_from_data(tmp_path: Path) -> None:
    """Pickles of every protocol and archives of torch.save are complained of; JSON and safetensors are not."""
    save_file({"weight": torch.randn(3, 5)}, tmp_path / "weights.safetensors")
    (tmp_path / "state.json").write_text('{"a": [1, null]}')
    assert list(code._complaints(tmp_path)) == []
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / f"{protocol}.bin").write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
    torch.save({"a": 1}, tmp_path / "zip.pt")
    (tmp_path / "broken.json").write_text("{")
    assert len(list(code._complaints(tmp_path))) == pickle.HIGHEST_PROTOCOL + 3
