"""Strategies that keep and find checkpoints wrongly."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import attrs

from lightrft.backends.checkpointing.layout import MANIFEST, checkpoint_path, committed_steps
from lightrft.config import StrategyConfig
from lightrft.strategy.protocols import LoadedCheckpoint
from lightrft.strategy.protocols.checkpointing import LatestCkpt
from lightrft.strategy.record import Strategy
from lightrft.testing.mutants.checkpoint.calls import LoadCall, SaveCall, broken_load, broken_save, do_load, do_save
from lightrft.testing.mutants.mutant import BreakStrategy, Mutant, strategy_mutant

__all__ = ["MUTANTS"]


def _rotate_first(strategy: Strategy, call: SaveCall, /) -> Path:
    if call.max_num is not None:
        steps = committed_steps(call.save_dir)
        for step in steps[: max(0, len(steps) + 1 - call.max_num)]:
            shutil.rmtree(checkpoint_path(call.save_dir, step))
    return do_save(strategy, call)


def _rotate_all(strategy: Strategy, call: SaveCall, /) -> Path:
    path = do_save(strategy, call)
    kept = {checkpoint_path(call.save_dir, step) for step in committed_steps(call.save_dir)}
    for other in call.save_dir.iterdir():
        if call.max_num is not None and other.is_dir() and other not in kept:
            shutil.rmtree(other)
    return path


def _rotate_links(strategy: Strategy, call: SaveCall, /) -> Path:
    path = do_save(strategy, call)
    for link in call.save_dir.glob("step-*"):
        if call.max_num is not None and link.is_symlink():
            shutil.rmtree(link.resolve(), ignore_errors=True)
    return path


def _rotate_what_was_saved(strategy: Strategy, call: SaveCall, /) -> Path:
    path = do_save(strategy, call)
    if call.max_num is not None and path not in {
        checkpoint_path(call.save_dir, step) for step in committed_steps(call.save_dir)[-call.max_num :]
    }:
        shutil.rmtree(path, ignore_errors=True)
    return path


def _rotate_by_age(strategy: Strategy, call: SaveCall, /) -> Path:
    path = do_save(strategy, attrs.evolve(call, max_num=None))
    if call.max_num is not None:
        paths = [checkpoint_path(call.save_dir, step) for step in committed_steps(call.save_dir)]
        for old in sorted(paths, key=_age)[: -call.max_num]:
            shutil.rmtree(old)
    return path


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _keep_one_more(strategy: Strategy, call: SaveCall, /) -> Path:
    return do_save(strategy, attrs.evolve(call, max_num=None if call.max_num is None else call.max_num + 1))


def _count_in_gibibytes(strategy: Strategy, call: SaveCall, /) -> Path:
    max_mem = None if call.max_mem is None else call.max_mem * 2**30 / 1e9
    return do_save(strategy, attrs.evolve(call, max_mem=max_mem))


def _keep_the_worst(strategy: Strategy, call: SaveCall, /) -> Path:
    return do_save(strategy, attrs.evolve(call, metric=None if call.metric is None else -call.metric))


def _keep_no_multiple(strategy: Strategy, call: SaveCall, /) -> Path:
    return do_save(strategy, attrs.evolve(call, keep_every=0))


def _take_zero_for_unknown(strategy: Strategy, call: SaveCall, /) -> Path:
    return do_save(strategy, attrs.evolve(call, metric=call.metric or None))


def _save_in_place(strategy: Strategy, call: SaveCall, /) -> Path:
    path = do_save(strategy, call)
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    path.mkdir()
    for file in sorted(aside.iterdir(), key=_is_no_manifest):
        shutil.copyfile(file, path / file.name)
    shutil.rmtree(aside)
    return path


def _is_no_manifest(path: Path) -> bool:
    return path.name != MANIFEST


def _overwrite(strategy: Strategy, call: SaveCall, /) -> Path:
    if call.step is not None:
        shutil.rmtree(checkpoint_path(call.save_dir, call.step), ignore_errors=True)
    return do_save(strategy, call)


def _count(strategy: Strategy, call: SaveCall, /) -> Path:
    step = len(committed_steps(call.save_dir)) + 1 if call.step is None else call.step
    return do_save(strategy, attrs.evolve(call, step=step))


def _finding(find: Callable[[Path], int | None]) -> BreakStrategy:
    """Return what plants another way of finding the newest checkpoint."""

    def wrong(strategy: Strategy, call: LoadCall, /) -> LoadedCheckpoint:
        return do_load(strategy, attrs.evolve(call, step=find(call.load_dir) if call.step is None else call.step))

    def breaks(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
        return attrs.evolve(broken_load(wrong)(strategy, config), latest_ckpt=_latest(find))

    return breaks


def _latest(find: Callable[[Path], int | None]) -> LatestCkpt:
    def latest_ckpt(load_dir: str | os.PathLike[str]) -> int | None:
        return find(Path(load_dir))

    return latest_ckpt


def _last_by_name(directory: Path) -> int | None:
    return max(committed_steps(directory), key=str, default=None)


def _youngest(directory: Path) -> int | None:
    def age(step: int) -> float:
        return _age(checkpoint_path(directory, step))

    return max(committed_steps(directory), key=age, default=None)


def _last_directory(directory: Path) -> int | None:
    matches = [re.fullmatch(r"step-(\d+)", path.name) for path in directory.glob("step-*")]
    return max((int(match[1]) for match in matches if match), default=None)


def _pointed_to(directory: Path) -> int | None:
    pointer = directory / "latest"
    return int(pointer.read_text()) if pointer.is_file() else None


def _save_with_pointer(strategy: Strategy, call: SaveCall, /) -> Path:
    path = do_save(strategy, call)
    (call.save_dir / "latest").write_text(path.name.removeprefix("step-"))
    return path


def _trust_pointer(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    return _finding(_pointed_to)(broken_save(_save_with_pointer)(strategy, config), config)


MUTANTS: tuple[Mutant, ...] = (
    strategy_mutant(
        "checkpoint.killed.rotation_first",
        "Old checkpoints are removed before the new one is written.",
        broken_save(_rotate_first),
    ),
    strategy_mutant(
        "checkpoint.retention.rotation_of_foreign",
        "Rotation removes every other directory beside the checkpoints.",
        broken_save(_rotate_all),
    ),
    strategy_mutant(
        "checkpoint.retention.rotation_of_links",
        "Rotation follows a link and removes the checkpoint that it leads to.",
        broken_save(_rotate_links),
    ),
    strategy_mutant(
        "checkpoint.retention.rotation_of_the_saved",
        "Where newer steps stand beside it, the checkpoint that was just saved is removed.",
        broken_save(_rotate_what_was_saved),
    ),
    strategy_mutant(
        "checkpoint.retention.rotation_by_age",
        "Rotation goes by the times of the directories, which copying changes.",
        broken_save(_rotate_by_age),
    ),
    strategy_mutant(
        "checkpoint.retention.rotation_off_by_one",
        "One checkpoint more than max_num stays.",
        broken_save(_keep_one_more),
    ),
    strategy_mutant(
        "checkpoint.retention.gibibytes",
        "A GB of max_mem is 2**30 bytes.",
        broken_save(_count_in_gibibytes),
    ),
    strategy_mutant(
        "checkpoint.retention.worst",
        "The checkpoints with the smallest metric are taken for the best.",
        broken_save(_keep_the_worst),
    ),
    strategy_mutant(
        "checkpoint.retention.no_multiple",
        "Multiples of keep_every are removed like all others.",
        broken_save(_keep_no_multiple),
    ),
    strategy_mutant(
        "checkpoint.retention.zero_metric",
        "A metric of zero is taken for none.",
        broken_save(_take_zero_for_unknown),
    ),
    strategy_mutant(
        "checkpoint.killed.in_place",
        "Files are written into the directory where they are looked for, so that a kill leaves half of them.",
        broken_save(_save_in_place),
    ),
    strategy_mutant(
        "checkpoint.latest.overwritten",
        "Saving a step that exists replaces it.",
        broken_save(_overwrite),
    ),
    strategy_mutant(
        "checkpoint.latest.counted",
        "A save without a step takes the number of checkpoints, not one more than the newest.",
        broken_save(_count),
    ),
    strategy_mutant(
        "checkpoint.latest.last_by_name",
        "The newest checkpoint is the last one in the order of words, in which 9 comes after 10.",
        _finding(_last_by_name),
    ),
    strategy_mutant(
        "checkpoint.latest.youngest",
        "The newest checkpoint is the one that was written last.",
        _finding(_youngest),
    ),
    strategy_mutant(
        "checkpoint.latest.half_written_found",
        "A directory with the name of a checkpoint is taken for one.",
        _finding(_last_directory),
    ),
    strategy_mutant(
        "checkpoint.killed.pointer_trusted",
        "The newest checkpoint is what a pointer file says.",
        _trust_pointer,
    ),
)
"""What is kept, and what is found."""
