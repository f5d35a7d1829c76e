"""`lightrft plan`: what would be decided about a run, and what memory a rank would need, for machines not at hand."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightrft.cli.command import Command
from lightrft.cli.failures import EXIT_OK
from lightrft.cli.terminal import say, table
from lightrft.config import Config, load_config
from lightrft.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from lightrft.planning.line import Line, Place

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world-size", metavar="N", type=int, help="plan for N ranks; 1 if it is left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="what each rank computes on; cuda if it is left out")
    parser.add_argument(
        "--prompt-tokens", metavar="N", type=int, help="tokens of the longest prompt; without it the problems are read"
    )
    parser.add_argument(
        "--measure", action="store_true", help="take one step here, alone, and print what it held beside the estimate"
    )


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    config = load_config(_path(words), [word for word in words if "=" in word])
    world_size, prompt_tokens = _world_size(args), args.prompt_tokens
    if prompt_tokens is not None and prompt_tokens < 1:
        raise ConfigError(f"--prompt-tokens={prompt_tokens} is no number of tokens; use 1 or more.")
    from lightrft.planning.run import check_ranks, memory_of_run

    check_ranks(config, world_size)
    device = _device(args)
    model, prompt_tokens = _model(config, prompt_tokens)
    lines = memory_of_run(config, model, world_size=world_size, on_cpu=device == "cpu", prompt_tokens=prompt_tokens)
    say(*_decided(config, model, lines, world_size=world_size, device=device, prompt_tokens=prompt_tokens), "")
    measured = _measured(config, prompt_tokens) if args.measure else None
    say(*_memory(lines, device, measured))
    return EXIT_OK


def _path(words: Sequence[str]) -> str:
    paths = [word for word in words if "=" not in word]
    if not paths:
        raise ConfigError("no configuration is given; name a TOML file: lightrft plan run.toml --world-size 64.")
    if len(paths) > 1:
        raise ConfigError(f"config={paths[1]!r} is a second configuration file; name one, and settings as key=value.")
    return paths[0]


def _world_size(args: argparse.Namespace) -> int:
    from lightrft.backends.launch import world_size_of_launch

    world_size: int = 1 if args.world_size is None else args.world_size
    if args.measure and (world_size != 1 or world_size_of_launch() != 1):
        raise ConfigError(
            f"--measure takes a step in one process, and there are {max(world_size, world_size_of_launch())}; leave "
            "--world-size out, and start without a launcher."
        )
    return world_size


def _device(args: argparse.Namespace) -> str:
    from lightrft.backends.launch import device_of_process

    if not args.measure:
        return args.device or "cuda"
    here = device_of_process().partition(":")[0]
    if args.device not in {None, here}:
        raise ConfigError(f"--device={args.device} is not what --measure finds here, {here}; leave it out.")
    return here


def _model(config: Config, prompt_tokens: int | None) -> tuple[nn.Module, int]:
    from lightrft.data.splits import split_problems
    from lightrft.planning.run import longest_prompt
    from lightrft.planning.sizes import build_without_memory

    problems = () if prompt_tokens is not None else split_problems(config.data)[0].problems
    model, tokenizer = build_without_memory(config.model)
    return model, prompt_tokens or longest_prompt(problems, tokenizer)


def _decided(
    config: Config, model: nn.Module, lines: Sequence[Line], *, world_size: int, device: str, prompt_tokens: int
) -> list[str]:
    from lightrft.cli.decisions import decisions
    from lightrft.planning.line import summary_of
    from lightrft.strategy.build import chosen_key
    from lightrft.strategy.protocols.collectives import World

    number = sum(parameter.numel() for parameter in model.parameters())
    world = World(rank=0, local_rank=0, world_size=world_size, device=device)
    tokens = f"{prompt_tokens:,} tokens of the longest prompt and {config.engine.max_new_tokens:,} of a completion"
    rows = [
        ("strategy", chosen_key(config.strategy)),
        *decisions(config.strategy, world),
        ("engine", config.engine.type),
        ("model", f"{config.model.path or config.model.architecture}, {number:,} parameters"),
        ("lengths", tokens),
        ("memory", f"{summary_of(lines, device)} a rank"),
    ]
    return [f"{name:<10}{decision}" for name, decision in rows]


def _measured(config: Config, prompt_tokens: int) -> Mapping[str, int]:
    from lightrft.cli.preflight import set_threads
    from lightrft.planning.measure import measure_step

    set_threads(config.run.threads)
    return measure_step(config, prompt_tokens=prompt_tokens)


def _memory(lines: Sequence[Line], device: str, measured: Mapping[str, int] | None) -> list[str]:
    from lightrft.planning.line import readable_bytes, total_bytes

    places: dict[Place, str] = {"device": device, "host": "main memory", "not counted": "not counted"}
    rows = [(line.name, places[line.place], readable_bytes(line.num_bytes), line.formula) for line in lines]
    sums = [(places[place], total_bytes(lines, place)) for place in places if place != "not counted"]
    rows += [("all", where, readable_bytes(total), "the sum of what is counted") for where, total in sums if total]
    headers = ("memory of a rank", "where", "estimate", "formula")
    if measured is None:
        return table(headers, rows)
    found = {name: readable_bytes(num_bytes) for name, num_bytes in measured.items()}
    beside = [(name, where, size, found.get(name, "-"), why) for name, where, size, why in rows]
    return table((*headers[:3], "measured", headers[3]), beside)


COMMAND = Command(
    name="plan",
    words="CONFIG [section.key=value ...]",
    summary="print what would be decided about a run on other machines, and estimate the memory of a rank",
    add_arguments=_add_arguments,
    run=_run,
)
"""`lightrft plan`."""
