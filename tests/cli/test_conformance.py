"""`lightrft conformance`: the table, what is told of a broken law, the page, and what is refused."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Generator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cli_runs import Cli
from typing_extensions import override

from lightrft.testing.laws.registry import STRATEGY_LAWS

BACKENDS = """\
import attrs
import torch
from lightrft.strategy import ENGINES, STRATEGIES, Strategy, StrategyConfig


def build_off_by_one(config: StrategyConfig) -> Strategy:
    single = STRATEGIES["single"](config)

    def all_reduce(data, op="mean"):
        if isinstance(data, int) and data > 6:
            return data + 1
        return single.all_reduce(data, op)

    return attrs.evolve(single, all_reduce=all_reduce)


def build_renamed(config) -> "Strategy":
    single = STRATEGIES["single"](config)

    def broadcast(values, src=0):
        return single.broadcast(values, src)

    return attrs.evolve(single, broadcast=broadcast)


def build_scripted(config: "sections.EngineConfig"):
    return ENGINES["scripted"](config)


def build_secretly(config):
    return STRATEGIES["single"](config)


TEXT = "no function"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """Stand in a directory with a module of the user's."""
    (tmp_path / "backends.py").write_text(BACKENDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("backends", None)


def test_laws_that_hold_are_a_table(cli: Cli, here: Path) -> None:
    """Each law has a row with its outcome and its sentence; nothing is left in the directory."""
    outcome = cli("conformance", "single", "--laws", "record.*", "--max-examples", "3")
    assert (outcome.code, outcome.err) == (0, "")
    header, *rows, blank, summary = outcome.out.splitlines()
    assert header.split() == ["law", "outcome", "seconds", "what", "it", "says"]
    names = [name for name in STRATEGY_LAWS if name.startswith("record.")]
    assert [row.split()[:2] for row in rows] == [[name, "holds"] for name in names]
    assert [row.endswith(STRATEGY_LAWS[name].statement) for row, name in zip(rows, names, strict=True)]
    assert blank == ""
    assert summary.startswith(f"strategy single: {len(names)} holds, 0 broken, 0 not claimed, in ")
    assert [path.name for path in here.iterdir()] == ["backends.py"]


@pytest.mark.usefixtures("here")
def test_a_broken_law_is_told_in_full_and_shown_again(cli: Cli) -> None:
    """A wrong parameter name is found; the message, the example and a command that gives the same again are printed."""
    outcome = cli("conformance", "backends:build_renamed", "--laws", "record.*", "collectives.world")
    assert (outcome.code, outcome.err) == (1, "")
    assert "holds" in outcome.out
    lines = outcome.out.splitlines()
    (command,) = [line.removeprefix("  again: ") for line in lines if line.startswith("  again: ")]
    (example,) = [line.removeprefix("  example: ") for line in lines if line.startswith("  example: ")]
    words = shlex.split(command)
    assert words[:5] == ["lightrft", "conformance", "backends:build_renamed", "--laws", "record.signatures"]
    assert words[-2:] == ["--example", example]
    again = cli(*words[1:])
    assert again.code == 1
    assert "broadcast: parameter 1 is 'values' and must be 'data'" in outcome.out
    assert told(again.out) == told(outcome.out)


def told(out: str) -> list[str]:
    """Return the lines about the broken law."""
    lines = out.splitlines()
    return lines[next(number for number, line in enumerate(lines) if " is broken on " in line) : -2]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("target", "first"),
    [("backends:build_off_by_one", "strategy"), ("backends:build_scripted", "engine"), ("hf", "engine")],
)
def test_the_kind_follows_from_annotation_or_registry(cli: Cli, target: str, first: str) -> None:
    """Annotations need not be importable; the summary says what was held to which laws."""
    law = "record.frozen" if first == "strategy" else "engine.record"
    outcome = cli("conformance", target, "--laws", law, "--max-examples", "1")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].startswith(f"{first} {target}: 1 holds")


@pytest.mark.usefixtures("here")
def test_settings_reach_the_builder(cli: Cli) -> None:
    """`key=value` is a setting of the strategy or of the engine, wherever it stands, and is in the command."""
    asked = ("conformance", "backends:build_renamed", "--laws", "record.signatures", "seed=7", "extra_args.noise=0.5")
    assert " backends:build_renamed seed=7 extra_args.noise=0.5 --laws" in cli(*asked).out
    outcome = cli("conformance", "scripted", "top_p=2.0")
    assert (outcome.code, outcome.out) == (2, "")
    assert "engine.top_p=2.0" in outcome.line
    assert "did you mean 'seed'" in cli("conformance", "single", "sed=7").line


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "0 targets are given"),
        (["single", "fake"], "2 targets are given"),
        (["sngle"], "target='sngle' is not registered; did you mean 'single'?"),
        (["backends:build_secretly"], "does not say what it builds; add --kind strategy or --kind engine."),
        (["backends:build_nothing"], "target='backends:build_nothing' cannot be imported"),
        (["backends:TEXT", "--kind", "engine"], "target='backends:TEXT' is a str"),
        (["nowhere:build"], "No module named 'nowhere'"),
        (["single", "--laws", "step.acumulation"], "did you mean 'step.accumulation'?"),
        (["single", "--example", "{}"], "example='{}' is of one law"),
        (["single", "--laws", "record.frozen", "--example", "{}"], "example='{}' is no "),
        (["single", "--max-examples", "0"], "max_examples=0 looks at nothing"),
        (["single", "--world-size", "0"], "world_sizes=[0] are no numbers of ranks"),
        (["hf", "--engine", "scripted"], "engine='scripted' is for a strategy"),
        (["single", "--engine", "nothing"], "engine_type='nothing' is not registered"),
        (["single", "--report", "nowhere/page.html"], "report='nowhere/page.html' cannot be written"),
    ],
)
def test_wrong_input_is_one_line(cli: Cli, argv: list[str], words: str) -> None:
    """What makes no sense ends with exit code 2 and one line."""
    outcome = cli("conformance", *argv)
    assert outcome.code == 2
    assert words in outcome.line


@pytest.mark.usefixtures("here")
def test_a_kind_can_be_given(cli: Cli) -> None:
    """A builder without annotations is held to the laws of the kind that is named."""
    outcome = cli("conformance", "backends:build_secretly", "--kind", "strategy", "--laws", "record.frozen")
    assert outcome.code == 0


def test_hypothesis_is_asked_for(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without hypothesis the line holds the command that installs it."""
    monkeypatch.setattr("importlib.util.find_spec", {}.get)
    outcome = cli("conformance", "single")
    assert (outcome.code, outcome.out) == (2, "")
    assert "pip install 'lightrft[testing]'" in outcome.line


def test_several_ranks_have_a_column(cli: Cli) -> None:
    """With several world sizes each row says its number of ranks; simulated ones run in this process."""
    target = "lightrft.testing.replicated:build_simulated"
    asked = ("conformance", target, "--world-size", "1", "2", "--ranks", "simulated", "--laws", "collectives.world")
    rows = [line.split() for line in cli(*asked, "--max-examples", "2").out.splitlines()[:3]]
    assert [row[:3] for row in rows] == [
        ["law", "ranks", "outcome"],
        ["collectives.world", "1", "holds"],
        ["collectives.world", "2", "holds"],
    ]


class _Page(HTMLParser):
    """html.parser's hooks are methods; ours keep the tags that are open, and look for addresses."""

    void = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in self.void:
            self.open.append(tag)

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.usefixtures("here")
def test_the_page_is_whole_and_needs_nothing_else(cli: Cli) -> None:
    """Every tag is closed, nothing is fetched, and the page says what the table says, escaped."""
    asked = (
        "conformance",
        "backends:build_renamed",
        "extra_args.name=<b>",
        "--laws",
        "record.*",
        "collectives.barrier",
    )
    outcome = cli(*asked, "--max-examples", "2", "--report", "page.html")
    assert outcome.out.splitlines()[-1] == "report: page.html"
    text = Path("page.html").read_text()
    assert "url(" not in text
    page = _Page()
    page.feed(text)
    page.close()
    assert page.open == []
    for words in ("strategy backends:build_renamed", "record.frozen", "'ranks' is not claimed", "extra_args.name=<b>"):
        assert words in page.text
    for line in told(outcome.out)[1:-2]:
        assert line.strip().removeprefix("again: ") in page.text
