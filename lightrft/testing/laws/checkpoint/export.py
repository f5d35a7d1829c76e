"""Laws: an exported model is the plain model, in files that others read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightrft.errors import LawError
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.models import ModelCase, build_model, model_cases
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.laws.checkpoint.files import on_first_rank, tree
from lightrft.testing.laws.checkpoint.refusal import Refusal, refusal_of, require_refused
from lightrft.testing.laws.checkpoint.runs import named_bits
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]


_INDEX = "model.safetensors.index.json"
_Problem: TypeAlias = Literal[
    "cut",
    "emptied",
    "removed",
    "shape",
    "dtype",
    "missing parameter",
    "extra parameter",
    "one of two files removed",
    "two files exchanged",
    "a tensor in both files",
]


class _Tokenizer:
    def save_pretrained(self, save_directory: str, /) -> object:
        return (Path(save_directory) / "tokenizer.json").write_text("{}")


@attrs.frozen(kw_only=True)
class ExportCase:
    """A model that is exported.

    Attributes:
        model: the model.
        bf16: whether it is prepared to compute in bfloat16, where the strategy can.
        trained: whether it is prepared with an optimizer.
        there: whether the directory is there already.
        split: whether the weights are put into two files with an index before they are loaded.
    """

    model: ModelCase
    bf16: bool
    trained: bool
    there: bool
    split: bool


@attrs.frozen(kw_only=True)
class Exported:
    """What is seen of an export.

    Attributes:
        path: what `save_model` returned.
        live: tensors of the plain model, by name.
        written: tensors of the files, by name.
        tokenizer: whether its file is there.
        loaded: tensors of a model that loaded it, by name.
        again: error of exporting there once more.
        before: the directory before that.
        after: and after it.
    """

    path: str
    live: dict[str, Tensor]
    written: dict[str, Tensor]
    tokenizer: bool
    loaded: dict[str, Tensor]
    again: Refusal | None
    before: dict[str, str]
    after: dict[str, str]


def _export_cases(world_size: int, /) -> SearchStrategy[ExportCase]:
    del world_size
    return st.builds(
        ExportCase,
        model=model_cases(exact=False),
        bf16=st.booleans(),
        trained=st.booleans(),
        there=st.booleans(),
        split=st.booleans(),
    )


def _prepared(strategy: Strategy, case: ModelCase, *, trained: bool) -> nn.Module:
    model = build_model(case)
    return (
        strategy.prepare((model, strategy.create_optimizer(model), None)).model if trained else strategy.prepare(model)
    )


def _export(rank: Rank, case: ExportCase) -> Exported:
    claims = rank.build(rank.config).capabilities
    strategy = rank.build(attrs.evolve(rank.config, bf16=case.bf16 and "bf16" in claims))
    strategy.setup_distributed()
    directory = rank.directory / "export"
    if case.there:
        on_first_rank(rank, strategy, directory.mkdir)
    model = _prepared(strategy, case.model, trained=case.trained)
    path = strategy.save_model(model, directory, tokenizer=_Tokenizer())
    strategy.barrier()
    fresh = _prepared(strategy, attrs.evolve(case.model, seed=case.model.seed + 1), trained=case.trained)
    if case.split:
        on_first_rank(rank, strategy, _split, directory)
    strategy.load_model(fresh, directory)
    before = tree(directory)
    again = refusal_of(lambda: strategy.save_model(fresh, directory))
    strategy.barrier()
    return Exported(
        path=path.name,
        live=dict(build_model(case.model).state_dict()),
        written=_written(directory),
        tokenizer=(directory / "tokenizer.json").is_file(),
        loaded=dict(named_bits(strategy, fresh)),
        again=again,
        before=before,
        after=tree(directory),
    )


def _written(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _split(directory: Path) -> tuple[Path, Path]:
    """Put the weights of an export into two files with an index; a tensor alone leaves the second one empty."""
    tensors = _written(directory)
    for file in (*directory.glob("*.safetensors"), *directory.glob(_INDEX)):
        file.unlink()
    names, paths = (
        sorted(tensors),
        (directory / "model-00001-of-00002.safetensors", directory / "model-00002-of-00002.safetensors"),
    )
    half = (len(names) + 1) // 2
    for path, part in zip(paths, (names[:half], names[half:]), strict=True):
        save_file({name: tensors[name] for name in part}, path, metadata={"format": "pt"})
    weight_map = {name: paths[place >= half].name for place, name in enumerate(names)}
    (directory / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


def _export_holds(harness: Harness, case: ExportCase) -> None:
    for rank, seen in enumerate(harness.run(_export, case)):
        tied = {"embedding.weight", "head.weight"} if case.model.tied else set[str]()
        missing = set(seen.live) - set(seen.written) - tied
        if missing or set(seen.written) - set(seen.live) or (tied and not tied & set(seen.written)):
            raise LawError(f"rank {rank}: {sorted(seen.written)} are exported; the model has {sorted(seen.live)}.")
        _require_equal(seen.written, {name: seen.live[name] for name in seen.written}, f"rank {rank}, exported")
        _require_equal(seen.loaded, seen.live, f"rank {rank}, exported and imported")
        if seen.path != "export" or not seen.tokenizer:
            raise LawError(f"rank {rank}: save_model returned {seen.path!r}, tokenizer: {seen.tokenizer}.")
        require_refused(seen.again, f"rank {rank}: exporting into a directory with files", named=("export",))
        if seen.before != seen.after:
            raise LawError(f"rank {rank}: a refused export changed the directory; it must not.")


def _require_equal(seen: Mapping[str, Tensor], must: Mapping[str, Tensor], what: str) -> None:
    if set(seen) != set(must):
        raise LawError(f"{what}: names are {sorted(seen)} and must be {sorted(must)}.")
    for name, tensor in must.items():
        if seen[name].dtype != tensor.dtype or not torch.equal(seen[name], tensor):
            raise LawError(f"{what}: {name} is {seen[name].tolist()} and must be {tensor.tolist()}.")


@attrs.frozen(kw_only=True)
class ImportCase:
    """An export that is damaged, or of another model.

    Attributes:
        model: what it is loaded into.
        problem: what is wrong.
        place: of the first byte that is missing.
    """

    model: ModelCase
    problem: _Problem
    place: int


@attrs.frozen(kw_only=True)
class Imported:
    """What came of loading it.

    Attributes:
        refusal: the error, or None.
        before: tensors of the model before, by name.
        after: and after.
    """

    refusal: Refusal | None
    before: dict[str, Tensor]
    after: dict[str, Tensor]


@st.composite
def _import_case(draw: DrawFn) -> ImportCase:
    return ImportCase(
        model=draw(model_cases(exact=False)),
        problem=draw(st.sampled_from(get_args(_Problem))),
        place=draw(st.integers(0, 2**12)),
    )


def _import_cases(world_size: int, /) -> SearchStrategy[ImportCase]:
    del world_size
    return _import_case()


def _import(rank: Rank, case: ImportCase) -> Imported:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    other, directory = build_model(attrs.evolve(case.model, seed=case.model.seed + 1)), rank.directory / "export"
    if case.problem == "shape":
        other.odd = nn.Parameter(torch.zeros((*case.model.odd, 2)))
    elif case.problem == "dtype":
        other.double()
    elif case.problem == "missing parameter":
        del other.odd
    elif case.problem == "extra parameter":
        other.register_parameter("extra", nn.Parameter(torch.zeros(2)))
    strategy.save_model(strategy.prepare(other), directory)
    on_first_rank(rank, strategy, _spoil(directory, case))
    live = strategy.prepare(build_model(case.model))
    before = dict(named_bits(strategy, live))
    refusal = refusal_of(lambda: strategy.load_model(live, directory))
    return Imported(refusal=refusal, before=before, after=dict(named_bits(strategy, live)))


def _spoil(directory: Path, case: ImportCase) -> Callable[[], None]:
    def spoil() -> None:
        file = max(directory.glob("*.safetensors"))
        if case.problem == "cut":
            content = file.read_bytes()
            file.write_bytes(content[: case.place % len(content)])
        elif case.problem == "emptied":
            file.write_bytes(b"")
        elif case.problem == "removed":
            file.unlink()
        elif case.problem in ("one of two files removed", "two files exchanged", "a tensor in both files"):
            _spoil_set(directory, case.problem)

    return spoil


def _spoil_set(directory: Path, problem: _Problem) -> None:
    first, second = _split(directory)
    if problem == "one of two files removed":
        second.unlink()
    elif problem == "two files exchanged":
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)
    else:
        save_file({**load_file(second), **dict([next(iter(load_file(first).items()))])}, second)


def _import_holds(harness: Harness, case: ImportCase) -> None:
    for rank, seen in enumerate(harness.run(_import, case)):
        what = f"rank {rank}: loading an export with the problem {case.problem!r}"
        require_refused(seen.refusal, what, named=("export",))
        _require_equal(seen.after, seen.before, f"{what} was refused, and the model")


LAWS: tuple[Law, ...] = (
    Law(
        id="export.round_trip",
        statement="An export holds the plain model's tensors under its own names, bit for bit, in safetensors files; "
        "loading it gives them back, from several files with an index too, and a directory with files is never written "
        "into.",
        check=for_all(_export_cases, _export_holds),
    ),
    Law(
        id="export.refused",
        statement="An export that is damaged, of another structure or of files that its index does not describe is a "
        "CheckpointError, and no tensor is loaded.",
        check=for_all(_import_cases, _import_holds),
    ),
)
"""The laws of this module."""
