"""What forked ranks are asked; as a program: a parent that is killed while it has some."""

from __future__ import annotations

import os
import signal
import sys

import attrs
from forked_ranks import forks

from lightrft.testing.ranks.processes import processes
from lightrft.testing.replicated import build_gloo
from lightrft.testing.subject import Rank, subject_of


@attrs.frozen(kw_only=True)
class Seen:
    """What a rank says of its process."""

    pid: int
    parent: int
    group: int
    directory: str
    variable: str
    ranks: float


def look(rank: Rank, case: str) -> Seen:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    return Seen(
        pid=os.getpid(),
        parent=os.getppid(),
        group=os.getpgid(0),
        directory=os.getcwd(),  # noqa: PTH109 (a string)
        variable=os.environ.get(case, ""),
        ranks=float(strategy.all_reduce(1.0, op="sum")),
    )


def die(rank: Rank, case: int) -> int:
    if rank.rank == case:
        sys.stderr.write("the last words\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return rank.rank


def main() -> None:
    with (
        forks(("lightrft.testing.ranks.worker",)) as spawn,
        processes(subject_of(build_gloo, "strategy"), 2, timeout=60, spawn=spawn) as run,
    ):
        seen = run(look, "")
        sys.stdout.write(" ".join(map(str, [*(each.pid for each in seen), seen[0].parent])))
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.modules["fork_programs"] = sys.modules["__main__"]
    for function in (look, Seen):
        function.__module__ = "fork_programs"
    main()
