"""Ranks that read the same tensors in the same order, whatever befalls one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress

from lightrft.backends.checkpointing.access import WholeTensor
from lightrft.backends.checkpointing.agreement import together
from lightrft.backends.checkpointing.lossless import dumps
from lightrft.backends.checkpointing.named import describe
from lightrft.backends.checkpointing.tensor_files import reading_order
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.strategy.protocols.collectives import Collectives

__all__ = ["agreed_tables", "taking_turns"]


def agreed_tables(
    collectives: Collectives, describe_live: Callable[[], Mapping[str, Mapping[str, WholeTensor]]]
) -> Mapping[str, Mapping[str, WholeTensor]]:
    """Return tables of tensors by file, which are the same on all ranks.

    Args:
        collectives: what the ranks do together.
        describe_live: makes the tables of this rank.

    Raises:
        LightRFTError: this rank could not make them.
        CheckpointError: another could not, or made others.
    """
    tables: dict[str, Mapping[str, WholeTensor]] = {}

    def tell() -> dict[str, Json]:
        tables.update(describe_live())
        described: list[Json] = [
            [file, [[name, words] for name, words in describe(table).items()]] for file, table in tables.items()
        ]
        return {"tables": hashlib.sha256(dumps(described)).hexdigest()}

    told = together(collectives, tell)
    other = next((rank for rank, one in enumerate(told) if one != told[0]), None)
    if other is not None:  # gathering them would mix their values, or wait for ever
        raise CheckpointError(
            f"rank {other} has tensors of other names, shapes or dtypes than rank 0; pass the same model on all ranks."
        )
    return tables


@contextmanager
def taking_turns(tables: Mapping[str, Mapping[str, WholeTensor]]) -> Generator[Iterator[WholeTensor], None, None]:
    """Yield all tensors in the order in which their files read them; what is left at the end is read for others.

    So a rank that writes nothing takes part, and so does one that fails halfway, before its error goes on.

    Args:
        tables: tensors by file.
    """
    in_turn = iter([tensor for table in tables.values() for tensor in reading_order(table)])
    try:
        yield in_turn
    finally:
        for tensor in in_turn:
            with suppress(CheckpointError):  # whoever writes it says what is wrong with it
                tensor.read()
