"""Strategies that let through what is damaged, does not fit or carries code."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import attrs
import torch
from safetensors.torch import load_file

from lightrft.backends.checkpointing.durable import FileRecord
from lightrft.backends.checkpointing.layout import MANIFEST, checkpoint_path, committed_steps
from lightrft.backends.checkpointing.manifest import read_manifest, render_manifest
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols import LoadedCheckpoint
from lightrft.strategy.record import Strategy
from lightrft.testing.mutants.checkpoint.calls import (
    LoadCall,
    SaveCall,
    WrongLoad,
    broken_load,
    broken_save,
    do_load,
    do_save,
    parts_of,
)
from lightrft.testing.mutants.mutant import Mutant, strategy_mutant

__all__ = ["MUTANTS"]

_OTHER_TENSORS = " (parameters and buffers) "
_OTHER_OPTIMIZER = " optimizer and the call has "


def _trust(strategy: Strategy, call: LoadCall, /) -> LoadedCheckpoint:
    step = strategy.latest_ckpt(call.load_dir) if call.step is None else call.step
    with suppress(CheckpointError):
        if step is not None:
            _note_what_is_there(checkpoint_path(call.load_dir, step), step)
    return do_load(strategy, call)


def _note_what_is_there(path: Path, step: int) -> None:
    manifest = read_manifest(path, step=step)
    contents = {name: (path / name).read_bytes() for name in manifest.files if (path / name).is_file()}
    files = {
        name: FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    }
    (path / MANIFEST).write_bytes(render_manifest(attrs.evolve(manifest, files=files)))


def _take_older(strategy: Strategy, call: LoadCall, /) -> LoadedCheckpoint:
    try:
        return do_load(strategy, call)
    except CheckpointError:
        older = committed_steps(call.load_dir)[:-1]
        if call.step is not None or not older:
            raise
        return do_load(strategy, attrs.evolve(call, step=older[-1]))


def _load_half(strategy: Strategy, call: LoadCall, /) -> LoadedCheckpoint:
    try:
        return do_load(strategy, call)
    except CheckpointError as error:
        if _OTHER_TENSORS in str(error):
            _copy_what_fits(call)
        raise


def _load_what_fits(strategy: Strategy, call: LoadCall, /) -> LoadedCheckpoint:
    try:
        return do_load(strategy, call)
    except CheckpointError as error:
        if _OTHER_TENSORS not in str(error):
            raise
        _copy_what_fits(call)
        return LoadedCheckpoint(path=call.load_dir, step=1, client_state={})


def _copy_what_fits(call: LoadCall) -> None:
    for name, (model, _, _) in parts_of(call).items():
        for file in call.load_dir.glob(f"step-*/{name}.model.safetensors"):
            saved, live = load_file(file), model.state_dict()
            for key in {*saved} & {*live}:
                if saved[key].shape == live[key].shape:
                    live[key].copy_(saved[key])


def _ignoring(words: str) -> WrongLoad:
    """Return a load that takes one kind of difference for none."""

    def wrong(strategy: Strategy, call: LoadCall, /) -> LoadedCheckpoint:
        try:
            return do_load(strategy, call)
        except CheckpointError as error:
            if words not in str(error):
                raise
            return LoadedCheckpoint(path=call.load_dir, step=1, client_state={})

    return wrong


def _save_pickle(strategy: Strategy, call: SaveCall, /) -> Path:
    path = do_save(strategy, call)
    torch.save({"step": call.step}, path / "extra.pt")
    return path


def _load_pickle(strategy: Strategy, call: LoadCall, /) -> LoadedCheckpoint:
    files = [file for file in sorted(call.load_dir.glob("step-*/*")) if file.suffix not in {".json", ".safetensors"}]
    for file in files:
        with suppress(Exception):
            torch.load(file, weights_only=False)  # it is the bug
    return do_load(strategy, call)


MUTANTS: tuple[Mutant, ...] = (
    strategy_mutant(
        "checkpoint.damage.damage_accepted",
        "The content of files is taken as it is, whatever their digests were.",
        broken_load(_trust),
    ),
    strategy_mutant(
        "checkpoint.damage.older_taken",
        "Where the newest checkpoint is damaged an older one is loaded without a word.",
        broken_load(_take_older),
    ),
    strategy_mutant(
        "checkpoint.mismatch.half_loaded",
        "Tensors are copied before all of them are checked, and the live model is left half loaded.",
        broken_load(_load_half),
    ),
    strategy_mutant(
        "checkpoint.mismatch.differences_ignored",
        "Only the tensors that fit are loaded, as strict=False does.",
        broken_load(_load_what_fits),
    ),
    strategy_mutant(
        "checkpoint.mismatch.optimizer_ignored",
        "A checkpoint without an optimizer is loaded into a run that has one, or the other way round.",
        broken_load(_ignoring(_OTHER_OPTIMIZER)),
    ),
    strategy_mutant(
        "checkpoint.mismatch.ties_ignored",
        "Tied weights are loaded into untied ones, or the other way round.",
        broken_load(_ignoring(" (tied names) ")),
    ),
    strategy_mutant(
        "checkpoint.mismatch.other_schedule_taken",
        "The state of one schedule is loaded into one of another class.",
        broken_load(_ignoring(" (the schedule) ")),
    ),
    strategy_mutant(
        "checkpoint.mismatch.other_optimizer_taken",
        "The state of one optimizer is loaded into one of another class.",
        broken_load(_ignoring(" is of an optimizer with ")),
    ),
    strategy_mutant(
        "checkpoint.no_code.pickle_written",
        "A file of the checkpoint is a pickle.",
        broken_save(_save_pickle),
    ),
    strategy_mutant(
        "checkpoint.no_code.pickle_run",
        "A pickle among the files of a checkpoint is loaded, and runs what it holds.",
        broken_load(_load_pickle),
    ),
)
"""What is not refused."""
