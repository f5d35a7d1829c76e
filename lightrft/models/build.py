"""Models with random weights built on the spot, and models from a local directory."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from lightrft.config.sections import ModelConfig
from lightrft.errors import ConfigError
from lightrft.models.installed import require_transformers
from lightrft.models.tokenizer import ModelTokenizer, build_character_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "build_model",
    "build_model_and_tokenizer",
    "build_untrained_model",
    "build_untrained_model_and_tokenizer",
    "load_model_and_tokenizer",
]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""One of these holds a tokenizer's vocabulary; where all are missing, transformers makes up an empty tokenizer."""


def build_model_and_tokenizer(config: ModelConfig, *, seed: int) -> tuple[PreTrainedModel, ModelTokenizer]:
    """Return the model and tokenizer that the config names: loaded from `path`, or built.

    Args:
        config: the section "model".
        seed: seed of the random weights of a model built here; a loaded one has none.

    Raises:
        ConfigError: see `build_model` and `load_model_and_tokenizer`.
        MissingPackageError: transformers is not installed.
    """
    if config.path is not None:
        return load_model_and_tokenizer(config.path)
    tokenizer = build_character_tokenizer(config.alphabet, words=config.words, lowercase=config.lowercase)
    return build_model(config, tokenizer, seed=seed), tokenizer


def build_model(config: ModelConfig, tokenizer: ModelTokenizer, *, seed: int) -> PreTrainedModel:
    """Return a causal language model with random weights, in float32 on the CPU and in evaluation mode.

    The weights are a function of the config, the size of the vocabulary and the seed; torch's global random state stays
    as it was.

    Args:
        config: the section "model".
        tokenizer: gives the size of the vocabulary and the ids of special tokens.
        seed: seed of the weights.

    Raises:
        ConfigError: the architecture is unknown, or cannot be built with these settings.
        MissingPackageError: transformers is not installed.

    Example:
        >>> config = ModelConfig(hidden_size=16, num_heads=2)
        >>> model = build_model(config, build_character_tokenizer("01"), seed=0)
        >>> model.get_output_embeddings().weight.shape
        torch.Size([4, 16])
    """
    require_transformers()
    from transformers import AutoModelForCausalLM

    _check_architecture(config.architecture)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        # transformers leaves its classmethods untyped
        from_config = cast("Callable[..., nn.Module]", AutoModelForCausalLM.from_config)
        try:
            model = from_config(_architecture_config(config, tokenizer), dtype=torch.float32)
        except ConfigError:
            raise
        except Exception as error:  # each architecture refuses sizes in its own way
            raise ConfigError(
                f"architecture={config.architecture!r} cannot be built with these settings of model ({_said(error)}); "
                "change them, or use 'qwen3'."
            ) from error
    return cast("PreTrainedModel", model.eval())


def load_model_and_tokenizer(path: str) -> tuple[PreTrainedModel, ModelTokenizer]:
    """Return the model, in float32 on the CPU and in evaluation mode, and the tokenizer of a local directory.

    Nothing is looked up on a hub, no code of the directory is run, and weights are read from safetensors alone.

    Args:
        path: directory in the Hugging Face layout: config, safetensors, tokenizer.

    Raises:
        ConfigError: there is no such directory, or it lacks something or is damaged.
        MissingPackageError: transformers is not installed.
    """
    require_transformers()
    _check_directory(path)
    return _load_model(path), _load_tokenizer(path)


def build_untrained_model_and_tokenizer(path: str) -> tuple[PreTrainedModel, ModelTokenizer]:
    """Return the model that the config of a local directory describes, with random weights, and the tokenizer there.

    No weight is read, so the directory need hold none.

    Args:
        path: directory in the Hugging Face layout: config, tokenizer.

    Raises:
        ConfigError: there is no such directory, or it lacks something or is damaged.
        MissingPackageError: transformers is not installed.
    """
    require_transformers()
    _check_directory(path)
    return build_untrained_model(path), _load_tokenizer(path)


def build_untrained_model(path: str) -> PreTrainedModel:
    """Return the model that the config of a local directory describes, with random weights; no weight is read.

    Args:
        path: directory that holds a config.

    Raises:
        ConfigError: there is no such directory or no config, or it describes no model.
        MissingPackageError: transformers is not installed.
    """
    require_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_config(path)
    from_config = cast("Callable[..., nn.Module]", AutoModelForCausalLM.from_config)
    try:
        described = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = from_config(described, dtype=torch.float32)
    except Exception as error:  # as when weights are read
        raise ConfigError(
            f"path={path!r} describes no model that can be built ({_said(error)}); save it anew."
        ) from error
    return cast("PreTrainedModel", model.eval())


def _said(error: Exception) -> str:
    """Return what an error says on one line of bounded length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_architecture(name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = cast("Mapping[str, object]", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if name not in known:
        # Nearly two hundred exist: a few near ones help more than all of them.
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or ["qwen3", "llama"]
        raise ConfigError(f"architecture={name!r} is not known; near ones: {', '.join(close)}.")


def _architecture_config(config: ModelConfig, tokenizer: ModelTokenizer) -> PreTrainedConfig:
    from transformers import AutoConfig

    default = AutoConfig.for_model(config.architecture)
    settings = {
        **_sizes(config, default),
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
    }
    return AutoConfig.for_model(config.architecture, **settings)


def _sizes(config: ModelConfig, default: PreTrainedConfig) -> Mapping[str, int]:
    """Return the sizes by transformers' names; those that the architecture has not are refused where they were set."""
    wanted = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "num_key_value_heads": config.num_key_value_heads or config.num_heads,
        "head_dim": config.hidden_size // config.num_heads,
        "max_position_embeddings": config.max_length,
    }
    # What the user left to us (0, or a size that others imply) may be missing: transformers would store and not use it.
    free = {"head_dim", "max_position_embeddings"}
    free |= set() if config.intermediate_size else {"intermediate_size"}
    free |= set() if config.num_key_value_heads else {"num_key_value_heads"}
    for name in wanted.keys() - free:
        if not hasattr(default, name):
            raise ConfigError(
                f"architecture={config.architecture!r} has no setting {name}; choose another one, such as 'qwen3', or "
                "leave intermediate_size and num_key_value_heads at 0."
            )
    return {name: size for name, size in wanted.items() if hasattr(default, name)}


def _check_config(path: str) -> None:
    directory = Path(path)
    if not directory.is_dir():
        raise ConfigError(f"path={path!r} is not a directory; give a local one in the Hugging Face layout.")
    if not (directory / "config.json").is_file():
        raise ConfigError(f"path={path!r} holds no config.json; give a directory in the Hugging Face layout.")


def _check_directory(path: str) -> None:
    _check_config(path)
    if not any((Path(path) / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"path={path!r} holds no tokenizer; save it there with tokenizer.save_pretrained.")


def _load_model(path: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    load = cast("Callable[..., tuple[nn.Module, Mapping[str, Iterable[str]]]]", AutoModelForCausalLM.from_pretrained)
    try:
        model, info = load(
            path,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # damaged files surface as errors of json, safetensors, torch and transformers
        raise ConfigError(f"path={path!r} holds no model that can be loaded ({_said(error)}); save it anew.") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(f"path={path!r} lacks the weights {', '.join(missing)}; save the whole model.")
    return cast("PreTrainedModel", model.eval())


def _load_tokenizer(path: str) -> ModelTokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise ConfigError(
            f"path={path!r} holds no tokenizer that can be loaded ({_said(error)}); save it anew."
        ) from error
    # its methods take and return more types than the protocol's, and its ids of special tokens are set while running
    return cast("ModelTokenizer", tokenizer)
