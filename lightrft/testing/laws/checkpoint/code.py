"""Laws: no file of a checkpoint or an export carries code."""

from __future__ import annotations

import json
import pickletools
from collections.abc import Iterator
from pathlib import Path

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from lightrft.errors import LawError
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.laws.checkpoint.damage import files_of
from lightrft.testing.laws.checkpoint.files import on_first_rank
from lightrft.testing.laws.checkpoint.refusal import Refusal, refusal_of, require_refused
from lightrft.testing.laws.checkpoint.runs import RunCase, begin, load, run_cases, save, trace
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]


@attrs.frozen(kw_only=True)
class CodeCase:
    """A checkpoint, and a pickle among its files.

    Attributes:
        run: what is saved.
        before: micro-batches before.
        added: name of a file that the pickle is added as.
        file: number of the file that it replaces then, modulo how many there are.
    """

    run: RunCase
    before: int
    added: str
    file: int


@attrs.frozen(kw_only=True)
class CodeFound:
    """What is seen of code.

    Attributes:
        complaints: what is wrong with the files of a checkpoint and of an export.
        refusal: the error of loading where the pickle replaces a file.
        effect: whether the pickle was run.
    """

    complaints: tuple[str, ...]
    refusal: Refusal | None
    effect: bool


_PICKLES = ("pytorch_model.bin", "optimizer.pt", "rng_state.pth", "model.pt", "scheduler.pt", "training_state.pkl")


@st.composite
def _code_case(draw: DrawFn) -> CodeCase:
    return CodeCase(
        run=draw(run_cases()),
        before=draw(st.integers(0, 2)),
        added=draw(st.sampled_from(_PICKLES)),
        file=draw(st.integers(0, 2**10)),
    )


def _code_cases(world_size: int, /) -> SearchStrategy[CodeCase]:
    del world_size
    return _code_case()


def _code(rank: Rank, case: CodeCase) -> CodeFound:
    directory, effect = rank.directory / "run", rank.directory / "effect"
    live = begin(rank, case.run)
    trace(live, case.before)
    path = save(live, directory, step=1)
    export = live.strategy.save_model(next(iter(live.trained.values())).model, rank.directory / "export")
    live.strategy.barrier()
    complaints = tuple(words for folder in (path, export) for words in _complaints(folder))

    own = files_of(path)
    pickle = f"cos\nmkdir\n(V{effect}\ntR.".encode("raw_unicode_escape")  # protocol 0: os.mkdir(effect)
    on_first_rank(rank, live.strategy, (path / case.added).write_bytes, pickle)
    refusal_of(lambda: load(live, directory, step=1))  # a file too many may be refused, or left alone
    on_first_rank(rank, live.strategy, own[case.file % len(own)].write_bytes, pickle)
    refusal = refusal_of(lambda: load(live, directory, step=1))
    live.strategy.barrier()
    return CodeFound(complaints=complaints, refusal=refusal, effect=effect.exists())


def _complaints(directory: Path) -> Iterator[str]:
    for path in files_of(directory):
        content = path.read_bytes()
        if content.startswith(b"PK"):
            yield f"{path.name} is a zip archive, as torch.save writes"
        elif _is_pickle(content):
            yield f"{path.name} is a pickle"
        elif path.suffix == ".json" and not _is_json(content):
            yield f"{path.name} is not JSON"


def _is_pickle(content: bytes) -> bool:
    try:
        return bool(list(pickletools.genops(content)))
    except (ValueError, UnicodeDecodeError, EOFError):
        return False


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _code_holds(harness: Harness, case: CodeCase) -> None:
    for rank, seen in enumerate(harness.run(_code, case)):
        if seen.complaints:
            raise LawError(f"rank {rank}: {'; '.join(seen.complaints)}; only data may be written.")
        if seen.effect:
            raise LawError(f"rank {rank}: a pickle among the files of the checkpoint was run; it must never be.")
        require_refused(seen.refusal, f"rank {rank}: loading where file {case.file} is a pickle", named=("",))


LAWS: tuple[Law, ...] = (
    Law(
        id="checkpoint.no_code",
        statement="No file of a checkpoint or an export is a pickle, and one that stands among them is never run.",
        check=for_all(_code_cases, _code_holds),
    ),
)
"""The laws of this module."""
