"""Whether all ranks were started alike: the same settings, the same lightrft, the same torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import cast

import torch

from lightrft import __version__
from lightrft.config import Config
from lightrft.config.dump import as_mapping, config_digest
from lightrft.config.redaction import shown
from lightrft.errors import ConfigError
from lightrft.strategy.protocols.collectives import Collectives

__all__ = ["check_ranks_agree"]


def check_ranks_agree(collectives: Collectives, config: Config) -> None:
    """Refuse ranks that were started with other settings or other code than rank 0.

    What travels is blind to secrets, and so is the comparison: each rank may have its own.

    Args:
        collectives: what the ranks do together.
        config: what this rank was started with.

    Raises:
        ConfigError: on all ranks; it names the first rank and the first setting that differ, and both values.
    """
    digest = hashlib.sha256(f"{config_digest(config)} {_versions()}".encode()).digest()
    digests = collectives.all_gather(_bytes(digest)[None])
    if bool((digests == digests[0]).all()):
        return
    mine = _bytes(json.dumps({**_versions(), **dict(_flat(as_mapping(config)))}).encode())
    written = collectives.all_gather({"size": torch.tensor(mine.numel()), "settings": mine})
    parts = torch.split(written["settings"], written["size"].tolist())
    first, *others = (cast("dict[str, object]", json.loads(bytes(part.tolist()))) for part in parts)
    for rank, other in enumerate(others, start=1):
        for name in (*first, *other):
            if first.get(name) != other.get(name):
                raise ConfigError(
                    f"{name}={_value(other, name)} on rank {rank} is {_value(first, name)} on rank 0; start all ranks "
                    "with the same command, configuration and packages."
                )


def _versions() -> dict[str, str]:
    return {"lightrft.__version__": __version__, "torch.__version__": torch.__version__}


def _bytes(written: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(written), dtype=torch.uint8)


def _flat(mapping: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(cast("Mapping[str, object]", value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _value(settings: Mapping[str, object], name: str) -> str:
    return shown(settings[name], name=name.rpartition(".")[2]) if name in settings else "not set"
