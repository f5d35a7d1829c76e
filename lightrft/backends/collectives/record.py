"""The record behind the protocol `Collectives`, which every backend of this folder returns."""

from __future__ import annotations

import attrs

from lightrft.strategy.protocols.collectives import (
    AllGather,
    AllReduce,
    Barrier,
    Broadcast,
    GetRank,
    IsRank0,
    Print,
    SetupDistributed,
    Teardown,
)

__all__ = ["CollectiveFunctions"]


@attrs.frozen(kw_only=True, eq=False)
class CollectiveFunctions:
    """What ranks do together; each field's contract stands on its callback protocol."""

    setup_distributed: SetupDistributed
    teardown: Teardown
    all_reduce: AllReduce
    all_gather: AllGather
    broadcast: Broadcast
    barrier: Barrier
    get_rank: GetRank
    is_rank_0: IsRank0
    print: Print
