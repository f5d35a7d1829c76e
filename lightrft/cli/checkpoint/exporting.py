"""`lightrft checkpoint export`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from lightrft.cli.checkpoint.answer import Answer
from lightrft.cli.checkpoint.place import checkpoints_in, chosen_step, known_steps, run_dir_of
from lightrft.cli.run_dir import CONFIG_NAME
from lightrft.config import ModelConfig, load_config
from lightrft.errors import ConfigError, MissingPackageError, nearest

if TYPE_CHECKING:
    from torch import nn

    from lightrft.backends.checkpointing.export import StoredModel
    from lightrft.models.tokenizer import ModelTokenizer

__all__ = ["export"]

_USUAL = "actor"  # what `lightrft train` calls the model that it trains


@attrs.frozen(kw_only=True, eq=False)
class _Described:
    """What the run says about the model, besides its weights.

    Attributes:
        model: without memory for its parameters; None where nothing is known.
        tokenizer: its tokenizer, or None.
        missing: why there is no model, in words; None where there is one.
    """

    model: nn.Module | None = None
    tokenizer: ModelTokenizer | None = None
    missing: str | None = None


def export(args: argparse.Namespace, paths: Sequence[str]) -> Answer:
    """Write a model of a checkpoint as a Hugging Face directory, and return what was written and what is missing.

    Args:
        args: `step`, the newest if None, and `model`.
        paths: a run's directory or that of its checkpoints, and where to write.

    Raises:
        ConfigError: there is no such checkpoint or model.
        CheckpointError: its weights are damaged, or the output cannot be written.
    """
    from lightrft.backends.checkpointing.export import export_model, open_model
    from lightrft.backends.checkpointing.layout import checkpoint_path, model_names
    from lightrft.backends.checkpointing.manifest import read_manifest
    from lightrft.backends.collectives.single import build_collectives
    from lightrft.config import StrategyConfig

    directory = checkpoints_in(paths[0])
    step = chosen_step(known_steps(directory), args.step, directory)
    path = checkpoint_path(directory, step)
    manifest = read_manifest(path, step=step)
    name = _chosen_model(model_names(manifest.files), args.model, path)
    stored = open_model(path, manifest, name)
    described = _described(run_dir_of(directory), stored)
    written = export_model(
        stored,
        paths[1],
        collectives=build_collectives(StrategyConfig(strategy="single")),
        model=described.model,
        tokenizer=described.tokenizer,
    )
    files = sorted(file.name for file in written.iterdir())
    num_elements = sum(prod(tensor.shape) for tensor in stored.tensors.values())
    head = f"wrote {written}: {name} of step {step}, {len(stored.tensors):,} tensors, {num_elements:,} elements"
    return Answer(
        facts={
            "path": str(written),
            "checkpoint": str(path),
            "step": step,
            "model": name,
            "num_tensors": len(stored.tensors),
            "num_elements": num_elements,
            "files": [*files],
            "missing": described.missing,
        },
        lines=[head, f"files: {', '.join(files)}", *([] if described.missing is None else [described.missing])],
    )


def _chosen_model(names: Sequence[str], asked: str | None, path: Path) -> str:
    if asked is None and len(names) == 1:
        return names[0]
    if asked is None and _USUAL not in names:
        raise ConfigError(f"--model is missing, and {path} holds {', '.join(names)}; name one of them.")
    chosen = _USUAL if asked is None else asked
    if chosen not in names:
        raise ConfigError(f"--model={chosen!r} is not in {path}; {nearest(chosen, names)}.")
    return chosen


def _described(run_dir: Path, stored: StoredModel) -> _Described:
    from lightrft.backends.checkpointing.export import difference_to
    from lightrft.planning.sizes import build_without_memory

    try:
        source, config = _model_of_run(run_dir)
        model, tokenizer = build_without_memory(config)
    except (ConfigError, MissingPackageError) as error:
        return _Described(missing=_missing(str(error)))
    words = difference_to(model, stored)
    if words is not None:
        return _Described(missing=_missing(f"{source} describes another model: the checkpoint {words}."))
    return _Described(model=model, tokenizer=tokenizer)


def _model_of_run(run_dir: Path) -> tuple[Path, ModelConfig]:
    finished, config = run_dir / "model", run_dir / CONFIG_NAME
    if (finished / "config.json").is_file():
        return finished, ModelConfig(path=str(finished))
    if config.is_file():
        return config, load_config(config).model
    raise ConfigError(f"{run_dir} holds neither {CONFIG_NAME} nor model/config.json.")


def _missing(reason: str) -> str:
    return (
        "missing: the configuration and the tokenizer, which transformers needs beside the weights; add them from the "
        f"model that the run began with. {reason}"
    )
