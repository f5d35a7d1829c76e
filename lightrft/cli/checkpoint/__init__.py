"""`lightrft checkpoint`: look at the checkpoints of a run, check them, take models out and in, and make room."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import attrs

from lightrft.cli.checkpoint.answer import Action, Answer
from lightrft.cli.checkpoint.exporting import export
from lightrft.cli.checkpoint.importing import import_checkpoint
from lightrft.cli.checkpoint.looking import list_checkpoints, show
from lightrft.cli.checkpoint.pruning import prune
from lightrft.cli.checkpoint.verifying import verify
from lightrft.cli.command import Command
from lightrft.cli.terminal import say
from lightrft.errors import ConfigError, nearest

__all__ = ["COMMAND"]


@attrs.frozen(kw_only=True, eq=False)
class _Verb:
    """One thing that can be done.

    Attributes:
        words: what stands behind it on the command line.
        summary: what it does.
        run: does it.
        options: its own.
    """

    words: tuple[str, ...]
    summary: str
    run: Action
    options: frozenset[str] = frozenset()


_VERBS = MappingProxyType(
    {
        "list": _Verb(words=("DIR",), summary="one line for each checkpoint", run=list_checkpoints),
        "verify": _Verb(
            words=("DIR",),
            summary="read every byte and name what is damaged; exit code 1 if anything is",
            run=verify,
            options=frozenset({"step"}),
        ),
        "show": _Verb(
            words=("DIR",), summary="what a checkpoint holds, the newest one", run=show, options=frozenset({"step"})
        ),
        "export": _Verb(
            words=("DIR", "OUT"),
            summary="write a model of a checkpoint in the Hugging Face layout, from the newest one",
            run=export,
            options=frozenset({"step", "model"}),
        ),
        "import": _Verb(
            words=("SOURCE", "DIR"),
            summary="write a checkpoint of Hugging Face, torch.distributed or DeepSpeed as one of ours",
            run=import_checkpoint,
            options=frozenset({"step", "model", "like", "dry_run"}),
        ),
        "prune": _Verb(
            words=("DIR",),
            summary="remove what the rules of saving do not keep",
            run=prune,
            options=frozenset({"max_num", "max_mem", "keep_every", "keep_best", "dry_run"}),
        ),
    }
)
_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "step": "--step",
        "model": "--model",
        "like": "--like",
        "max_num": "--max-num",
        "max_mem": "--max-mem",
        "keep_every": "--keep-every",
        "keep_best": "--keep-best",
        "dry_run": "--dry-run",
    }
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    usages = [" ".join((name, *verb.words)) for name, verb in _VERBS.items()]
    lines = [f"  {usage:<18}{verb.summary}" for usage, verb in zip(usages, _VERBS.values(), strict=True)]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(("actions:", *lines, "", "DIR is the directory of a run, or that of its checkpoints."))
    parser.add_argument(
        "--step", metavar="N", type=int, help="verify, show, export: this checkpoint; import: under this step"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="export, import: which model, where there are several (default: actor)"
    )
    parser.add_argument(
        "--like", metavar="HF", help="import: a Hugging Face directory of the same model, for what it ties"
    )
    parser.add_argument("--max-num", metavar="N", type=int, help="prune: how many of the newest stay")
    parser.add_argument("--max-mem", metavar="GB", type=float, help="prune: how many GB (1e9 bytes) stay in total")
    parser.add_argument("--keep-every", metavar="N", type=int, help="prune: multiples of this step stay all the same")
    parser.add_argument("--keep-best", metavar="N", type=int, help="prune: so many with the largest metric stay, too")
    parser.add_argument(
        "--dry-run", action="store_true", default=None, help="prune, import: say what would be done, do nothing"
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object and nothing else")


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    if not words:
        raise ConfigError(f"no action is given; use one of {', '.join(_VERBS)}: lightrft checkpoint list DIR.")
    name, *rest = words
    if name not in _VERBS:
        raise ConfigError(f"action={name!r} is not known; {nearest(name, _VERBS)}.")
    verb = _VERBS[name]
    usage = " ".join(("lightrft checkpoint", name, *verb.words))
    if len(rest) != len(verb.words):
        raise ConfigError(f"{len(rest)} directories are given, and {name} takes {len(verb.words)}: {usage}.")
    for option, flag in _OPTIONS.items():
        if getattr(args, option) is not None and option not in verb.options:
            owners = [other for other, known in _VERBS.items() if option in known.options]
            raise ConfigError(f"{flag} says nothing to {name}; leave it out, it is for {', '.join(owners)}.")
    return _tell(verb.run(args, rest), as_json=args.json)


def _tell(answer: Answer, *, as_json: bool) -> int:
    if as_json:
        say(json.dumps(answer.facts, allow_nan=False, indent=2))
    else:
        say(*answer.lines)
    return answer.code


COMMAND = Command(
    name="checkpoint",
    words="ACTION DIR [OUT]",
    summary="list, verify, show, export, import or prune the checkpoints of a run",
    add_arguments=_add_arguments,
    run=_run,
)
"""`lightrft checkpoint`."""
