"""Planted bugs of what ranks do together."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar, cast

import attrs
import torch

from lightrft.errors import CollectiveError, ConfigError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import ReduceOp, TensorTree, World
from lightrft.strategy.record import Strategy
from lightrft.testing.mutants.mutant import BreakStrategy, Mutant, strategy_mutant
from lightrft.testing.replicated import build_simulated

__all__ = ["MUTANTS"]

_Tree = TypeVar("_Tree", bound=TensorTree)
_MapTensor = Callable[[torch.Tensor], torch.Tensor]


def _mapped(function: _MapTensor, data: _Tree) -> _Tree:
    """Return the tree with a function applied to every tensor."""
    return cast("_Tree", _map(function, data))


def _map(function: _MapTensor, data: object) -> object:
    if isinstance(data, Mapping):
        return {key: _map(function, branch) for key, branch in cast("Mapping[str, object]", data).items()}
    return function(data) if isinstance(data, torch.Tensor) else data


def _reduces_in_float32(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def narrow(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float().to(tensor.dtype)

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        return _mapped(narrow, strategy.all_reduce(data, op))

    return attrs.evolve(strategy, all_reduce=all_reduce)


def _sums_for_mean(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        return strategy.all_reduce(data, "sum" if op == "mean" else op)

    return attrs.evolve(strategy, all_reduce=all_reduce)


def _ignores_op(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        return strategy.all_reduce(data, "min" if op == "max" else op)

    return attrs.evolve(strategy, all_reduce=all_reduce)


def _forgets_shape_of_0d(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(1) if tensor.dim() == 0 else tensor

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        return _mapped(widen, strategy.all_reduce(data, op))

    return attrs.evolve(strategy, all_reduce=all_reduce)


def _reduces_in_place(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def mark(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.zero_() if tensor.is_contiguous() else tensor

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        result = strategy.all_reduce(data, op)
        _mapped(mark, data)
        return result

    return attrs.evolve(strategy, all_reduce=all_reduce)


def _returns_the_input(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        strategy.all_reduce(data, op)
        return data  # right in value on one rank

    return attrs.evolve(strategy, all_reduce=all_reduce)


def _takes_all_for_any(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        result = strategy.all_reduce(data, op)
        return cast("_Tree", _bools_of(strategy.all_reduce(data, "min"), result)) if op == "max" else result

    return attrs.evolve(strategy, all_reduce=all_reduce)


def _bools_of(wrong: object, right: object) -> object:
    if isinstance(right, Mapping):
        others = cast("Mapping[str, object]", wrong)
        return {key: _bools_of(others[key], value) for key, value in cast("Mapping[str, object]", right).items()}
    is_bool = isinstance(right, bool) or (isinstance(right, torch.Tensor) and right.dtype == torch.bool)
    return wrong if is_bool else right


def _flattens_keys(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        result = strategy.all_reduce(data, op)
        return cast("_Tree", dict(_flat(result, ()))) if isinstance(result, Mapping) else result

    return attrs.evolve(strategy, all_reduce=all_reduce)


def _flat(tree: object, path: tuple[str, ...]) -> list[tuple[str, object]]:
    if isinstance(tree, Mapping):
        branches = cast("Mapping[str, object]", tree)
        return [item for key, branch in branches.items() for item in _flat(branch, (*path, key))]
    return [(".".join(path), tree)]


def _widens_halves(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype in {torch.bfloat16, torch.float16} else tensor

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        return _mapped(widen, strategy.all_reduce(data, op))

    return attrs.evolve(strategy, all_reduce=all_reduce)


def _fails_on_nothing(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def first_element(tensor: torch.Tensor) -> torch.Tensor:
        tensor.flatten()[0]  # as a bucket does that asks its first element for a device
        return tensor

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        return strategy.all_reduce(_mapped(first_element, data), op)

    return attrs.evolve(strategy, all_reduce=all_reduce)


def _accepts_any_mean(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        try:
            return strategy.all_reduce(data, op)
        except ConfigError:
            return data

    return attrs.evolve(strategy, all_reduce=all_reduce)


def _allows(op_allowed: ReduceOp) -> BreakStrategy:
    """Return what plants a reduction that gives a value where its op has no meaning."""

    def breaks(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
        del config

        def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
            try:
                return strategy.all_reduce(data, op)
            except ConfigError:
                if op == op_allowed:
                    return data
                raise

        return attrs.evolve(strategy, all_reduce=all_reduce)

    return breaks


def _keeps_the_graph(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def attach(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.requires_grad_() if tensor.is_floating_point() else tensor

    def needs_gradients(data: object) -> bool:
        if isinstance(data, Mapping):
            return any(needs_gradients(branch) for branch in cast("Mapping[str, object]", data).values())
        return isinstance(data, torch.Tensor) and data.requires_grad

    def all_gather(data: _Tree) -> _Tree:
        result = strategy.all_gather(data)
        return _mapped(attach, result) if needs_gradients(data) else result

    return attrs.evolve(strategy, all_gather=all_gather)


def _loses_nan(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def replace(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        return strategy.all_reduce(_mapped(replace, data) if op == "max" else data, op)

    return attrs.evolve(strategy, all_reduce=all_reduce)


def _gathers_0d_as_0d(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def shrink(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(()) if tensor.shape == (1,) else tensor

    def all_gather(data: _Tree) -> _Tree:
        return _mapped(shrink, strategy.all_gather(data))

    return attrs.evolve(strategy, all_gather=all_gather)


def _gathers_backwards(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def backwards(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flip(0)

    def all_gather(data: _Tree) -> _Tree:
        return _mapped(backwards, strategy.all_gather(_mapped(_with_rows_reversed, data)))

    return attrs.evolve(strategy, all_gather=all_gather)


def _with_rows_reversed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flip(0) if tensor.dim() else tensor


def _sends_from_rank_0(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def broadcast(data: _Tree, src: int = 0) -> _Tree:
        right = strategy.broadcast(data, src)
        return strategy.broadcast(data, 0) if src else right

    return attrs.evolve(strategy, broadcast=broadcast)


def _seeds_again(strategy: Strategy, config: StrategyConfig) -> Strategy:
    def setup_distributed(timeout: timedelta | float | None = None) -> World:
        world = strategy.setup_distributed(timeout)
        torch.manual_seed(config.seed + 1000 * world.rank)
        return world

    return attrs.evolve(strategy, setup_distributed=setup_distributed)


def _seeds_all_ranks_alike(strategy: Strategy, config: StrategyConfig) -> Strategy:
    def setup_distributed(timeout: timedelta | float | None = None) -> World:
        is_first = torch.initial_seed() != config.seed
        world = strategy.setup_distributed(timeout)
        if is_first:
            torch.manual_seed(config.seed)
        return world

    def teardown() -> None:
        strategy.teardown()
        torch.manual_seed(config.seed + 1)

    return attrs.evolve(strategy, setup_distributed=setup_distributed, teardown=teardown)


def _prints_on_every_rank(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def print_everywhere(*values: object) -> None:
        builtins.print(*values, flush=True)  # noqa: T201 (it is a planted bug about printing)

    return attrs.evolve(strategy, print=print_everywhere)


def _leads_on_every_rank(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def is_rank_0() -> bool:
        return True

    return attrs.evolve(strategy, is_rank_0=is_rank_0)


def _accepts_any_timeout(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def setup_distributed(timeout: timedelta | float | None = None) -> World:
        del timeout
        return strategy.setup_distributed()

    return attrs.evolve(strategy, setup_distributed=setup_distributed)


def _passes_the_barrier(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def barrier() -> None:
        return

    return attrs.evolve(strategy, barrier=barrier)


def _hides_disagreement(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        try:
            return strategy.all_reduce(data, op)
        except CollectiveError:
            return data

    return attrs.evolve(strategy, all_reduce=all_reduce)


MUTANTS: tuple[Mutant, ...] = (
    strategy_mutant(
        "collectives.all_reduce_sum.float32",
        "all_reduce goes through float32 and loses bits of wider numbers.",
        _reduces_in_float32,
    ),
    strategy_mutant(
        "collectives.all_reduce_mean.sum_for_mean",
        "all_reduce sums where the mean is asked for.",
        _sums_for_mean,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant(
        "collectives.all_reduce_max.ignored_op",
        "all_reduce takes the smallest value for the largest.",
        _ignores_op,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant(
        "collectives.all_reduce_sum.widened_scalar",
        "all_reduce makes a 0-d tensor one of shape (1,).",
        _forgets_shape_of_0d,
    ),
    strategy_mutant("collectives.all_reduce_sum.in_place", "all_reduce overwrites its input.", _reduces_in_place),
    strategy_mutant("collectives.all_reduce_sum.aliased", "all_reduce returns the input itself.", _returns_the_input),
    strategy_mutant(
        "collectives.all_reduce_max.bools",
        "max of bools is True only if all are.",
        _takes_all_for_any,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant(
        "collectives.all_reduce_sum.flattened", "all_reduce joins the keys of nested dicts.", _flattens_keys
    ),
    strategy_mutant(
        "collectives.all_reduce_sum.widened_dtype", "all_reduce returns halves as float32.", _widens_halves
    ),
    strategy_mutant(
        "collectives.all_reduce_sum.empty", "all_reduce fails on a tensor without elements.", _fails_on_nothing
    ),
    strategy_mutant("collectives.refusals.any_mean", "all_reduce gives a mean of whole numbers.", _accepts_any_mean),
    strategy_mutant("collectives.refusals.sum_of_bools", "all_reduce gives a sum of bools.", _allows("sum")),
    strategy_mutant(
        "collectives.refusals.complex_order", "all_reduce gives the largest of complex numbers.", _allows("max")
    ),
    strategy_mutant("collectives.gradients.graph", "The result of all_gather requires gradients.", _keeps_the_graph),
    strategy_mutant("collectives.not_numbers.nan", "max passes over NaN.", _loses_nan),
    strategy_mutant(
        "collectives.all_gather.gathered_scalar", "all_gather of one scalar is a scalar.", _gathers_0d_as_0d
    ),
    strategy_mutant(
        "collectives.all_gather.backwards",
        "all_gather concatenates in reverse rank order.",
        _gathers_backwards,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant(
        "collectives.broadcast.src",
        "broadcast sends from rank 0, whatever src.",
        _sends_from_rank_0,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant("collectives.seeds.seeded_again", "A second set-up seeds the random stream again.", _seeds_again),
    strategy_mutant(
        "collectives.seeds.equal_ranks",
        "All ranks draw the same random numbers.",
        _seeds_all_ranks_alike,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant(
        "collectives.print.loud", "print prints on every rank.", _prints_on_every_rank, of=build_simulated, world_size=2
    ),
    strategy_mutant(
        "collectives.world.leaders",
        "is_rank_0 is True on every rank.",
        _leads_on_every_rank,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant("collectives.world.timeout", "A timeout that nothing can keep is accepted.", _accepts_any_timeout),
    strategy_mutant(
        "collectives.barrier.open_barrier",
        "barrier does not wait.",
        _passes_the_barrier,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant(
        "collectives.disagreement.unchecked",
        "all_reduce gives values to ranks that disagree.",
        _hides_disagreement,
        of=build_simulated,
        world_size=3,
    ),
)
"""Bugs that the laws of the section "collectives" find."""
