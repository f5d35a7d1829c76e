"""What is kept on disk: contracts and laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, Union

import attrs

from lightrft.strategy.protocols.collectives import Collectives
from lightrft.strategy.protocols.training import Trainable

if TYPE_CHECKING:
    import os

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

__all__ = [
    "AdaptersKind",
    "BackgroundSaves",
    "Checkpointable",
    "Checkpointing",
    "Json",
    "LatestCkpt",
    "LoadCkpt",
    "LoadModel",
    "LoadedCheckpoint",
    "SaveCkpt",
    "SaveModel",
    "SavesTokenizer",
    "StartSave",
    "WaitForSaves",
]

Json: TypeAlias = Union[bool, int, float, str, "list[Json]", "dict[str, Json]", None]
"""What JSON can hold."""

AdaptersKind: TypeAlias = Literal["alone", "merged"]
"""How a model with adapters is exported."""

Checkpointable: TypeAlias = "nn.Module | Trainable | Mapping[str, nn.Module | Trainable]"
"""A model, a model with its optimizer and schedule, or several of them by name."""


@attrs.frozen(kw_only=True)
class LoadedCheckpoint:
    """What a checkpoint held besides the state that was restored in place.

    Attributes:
        path: the directory that was loaded.
        step: its step.
        client_state: what the saver passed as `client_state`.
    """

    path: Path
    step: int
    client_state: dict[str, Json]


class SavesTokenizer(Protocol):
    """A tokenizer that can write itself; transformers' do."""

    def save_pretrained(self, save_directory: str, /) -> object:
        """Write the tokenizer's files.

        Args:
            save_directory: an existing directory.
        """
        ...


class StartSave(Protocol):
    """Begins a save in the background."""

    def __call__(self, save: Callable[[], None], /) -> None:
        """Run `save` in the background, once the one before it has ended.

        Args:
            save: writes a checkpoint; it talks to other ranks by `BackgroundSaves.collectives` alone.

        Raises:
            CheckpointError: the save before it failed, or the handle's context was left.
        """
        ...


class WaitForSaves(Protocol):
    """Waits for the background."""

    def __call__(self) -> None:
        """Return when every save that was begun is committed, and durable.

        Raises:
            CheckpointError: the last one failed; said once, on all ranks alike. Earlier checkpoints are as they were.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class BackgroundSaves:
    """A handle by which `SaveCkpt` writes while training goes on; `lightrft.strategy.background_saves` makes one.

    Laws: saves never interleave; what is saved is the state at the call, whatever is done afterwards; an error of a
    save is raised by the next save, by `wait`, or on leaving the handle's context; nothing is left behind.

    Attributes:
        collectives: what the ranks do together in the background.
        start: begins a save.
        wait: waits for it.
    """

    collectives: Collectives
    start: StartSave
    wait: WaitForSaves


class SaveCkpt(Protocol):
    """Writes a checkpoint that training can resume from."""

    def __call__(
        self,
        model: Checkpointable,
        save_dir: str | os.PathLike[str],
        *,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        step: int | None = None,
        client_state: Mapping[str, Json] | None = None,
        max_num: int | None = None,
        max_mem: float | None = None,
        keep_every: int = 0,
        keep_best: int = 0,
        metric: float | None = None,
        background: BackgroundSaves | None = None,
    ) -> Path:
        """Return the committed directory `save_dir/step-<step>`, or with `background` what will be committed.

        Holds parameters, optimizer, schedule, position in the accumulation window with its gradients, random state of
        every rank and `client_state`. All ranks call it, with the same models: rank 0 writes whole tensors under the
        names of the plain model, however they are sharded, gathered in pieces.

        Laws: a process killed at any instant leaves every committed checkpoint loadable; nothing is overwritten;
        nothing is removed before its successor is durable, and only directories that carry our manifest are ever
        removed; saving changes no state.

        Old checkpoints are removed when the new one is committed, oldest first, until both limits hold or only those
        are left that stay in any case: the newest one, the one just saved, and those that `keep_every` and `keep_best`
        spare. All of these count towards the limits. Rank 0's word counts for all ranks.

        With `background` the call first waits until the save before it is committed, checks everything, begins to copy
        the state, and returns. Until the copy is there, all that changes this state waits, and no longer:
        `optimizer_step`, the own `step` of every optimizer that has one of the saved parameters, `moving_average` into
        a saved model, `load_ckpt`, `load_model`, `offload` and `reload`. Then the checkpoint is written while training
        goes on. Each rank needs main memory for its part of the state until that is written.

        Args:
            model: what to save.
            save_dir: directory of all checkpoints of the run.
            optimizer: optimizer of a plain model; a `Trainable` brings its own.
            scheduler: schedule of a plain model.
            step: number of the checkpoint; None takes one more than the newest, with those that are being written.
            client_state: anything that JSON can hold.
            max_num: how many newest checkpoints stay; None sets no limit.
            max_mem: how many GB (1e9 bytes) of checkpoints stay, in total; None sets no limit.
            keep_every: checkpoints whose step is a multiple of it stay whatever the limits; 0 spares none.
            keep_best: so many of the checkpoints with the largest metric stay whatever the limits, of equal ones the
                newer; 0 spares none.
            metric: how good this checkpoint is, larger is better; it is kept with the checkpoint. None is unknown, and
                never among the best.
            background: writes while training goes on; None writes before the call returns.

        Raises:
            CheckpointError: the step exists, the save before this one failed in the background, the files cannot be
                written, the ranks have different models, or gradients of an open window that were not yet reduced over
                ranks (`backward` was told `is_boundary=False`). Or an older checkpoint cannot be removed; the message
                says then that this one is committed.
            ConfigError: `client_state` holds what JSON cannot, and its path is named; or a limit, a rule or the metric
                is no number of its kind.
        """
        ...


class LoadCkpt(Protocol):
    """Restores a checkpoint in place."""

    def __call__(
        self,
        model: Checkpointable,
        load_dir: str | os.PathLike[str],
        *,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        step: int | None = None,
    ) -> LoadedCheckpoint:
        """Restore what `SaveCkpt` saved and return the rest.

        Laws: save then load is the identity, and the resumed run equals the uninterrupted one bit for bit; what is
        damaged or does not fit is named and refused, and the live state stays as it was; no code of a checkpoint is
        run.

        All ranks call it. Nothing is written on any before all of them have verified and checked everything; then each
        tensor is read to where it belongs, and no rank holds more than its part and one tensor.

        Args:
            model: what to restore, of the structure that was saved.
            load_dir: directory of all checkpoints of the run.
            optimizer: optimizer of a plain model.
            scheduler: schedule of a plain model.
            step: number of the checkpoint; None takes the newest committed one.

        Raises:
            CheckpointError: there is none, it is damaged, its names, shapes or dtypes are not the model's, or it was
                saved inside an accumulation window by another number of ranks or another way of sharding. Or a disk
                failed after everything had been verified; the message says then that the state is incomplete.
        """
        ...


class LatestCkpt(Protocol):
    """Looks for checkpoints."""

    def __call__(self, load_dir: str | os.PathLike[str]) -> int | None:
        """Return the step of the newest committed checkpoint, or None without one.

        It is found by looking, not by a pointer file.

        Args:
            load_dir: directory of all checkpoints of the run; it need not exist.
        """
        ...


class SaveModel(Protocol):
    """Exports a model for others."""

    def __call__(
        self,
        model: nn.Module,
        output_dir: str | os.PathLike[str],
        *,
        tokenizer: SavesTokenizer | None = None,
        adapters: AdaptersKind | None = None,
    ) -> Path:
        """Return the directory, in the Hugging Face layout: config, tokenizer and safetensors.

        All ranks call it, and rank 0 writes. More than 5 GB of tensors become several files with an index. Tensors are
        gathered in pieces, and the live model is only read.

        Args:
            model: the prepared or plain model.
            output_dir: a directory that does not exist yet or is empty.
            tokenizer: written beside the weights.
            adapters: what becomes of a PeftModel's LoRA adapter, which must be said: "alone" writes it in peft's
                layout, without the base; "merged" writes the base with the adapter in it, under plain names.

        Raises:
            CheckpointError: the directory holds files, or cannot be written, or the ranks have different models.
            ConfigError: the model has adapters and `adapters` is None, or has none and it is not.
            UnsupportedError: the adapters cannot be exported this way.
        """
        ...


class LoadModel(Protocol):
    """Imports the weights of a model."""

    def __call__(self, model: nn.Module, load_dir: str | os.PathLike[str]) -> None:
        """Copy the safetensors weights of a Hugging Face directory into the model; all of them or none.

        The directory has one file, or several with an index. Every tensor is read and checked before the first is
        written, and read again then: no rank holds more than its part and one tensor.

        Args:
            model: the prepared or plain model.
            load_dir: the directory.

        Raises:
            CheckpointError: files are missing or damaged, or names, shapes or dtypes are not the model's. Or a disk
                failed after everything had been read once; the message says then that the model is incomplete.
        """
        ...


class Checkpointing(Protocol):
    """What is kept on disk.

    Laws: save then load is the identity; a killed writer loses nothing that was committed; what is damaged is refused;
    a checkpoint written by any backend at any world size loads into any other; loading runs no code.
    """

    @property
    def save_ckpt(self) -> SaveCkpt: ...  # noqa: D102 (the callback protocol is the documentation)
    @property
    def load_ckpt(self) -> LoadCkpt: ...  # noqa: D102
    @property
    def latest_ckpt(self) -> LatestCkpt: ...  # noqa: D102
    @property
    def save_model(self) -> SaveModel: ...  # noqa: D102
    @property
    def load_model(self) -> LoadModel: ...  # noqa: D102
