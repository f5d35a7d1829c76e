"""`lightrft conformance`: the table, what is told of a broken law, the page, and what is refused."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Generator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cli_runs import Cli
from typing_extensions import override

from lightrft.testing.laws.registry import ENGINE_LAWS, STRATEGY_LAWS

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


def build_nothing(config: StrategyConfig):
    return None


def build_class(config: StrategyConfig):
    return Strategy


def build_without_argument() -> Strategy:
    return STRATEGIES["single"](StrategyConfig())


def build_red(config: StrategyConfig):
    raise RuntimeError("\\x1b[31mred.")


def build_leaving(config: StrategyConfig):
    raise SystemExit(0)


def build_incomplete(config: StrategyConfig):
    return Strategy(capabilities=frozenset())


def build_listing(config: StrategyConfig):
    return attrs.evolve(STRATEGIES["single"](config), capabilities=["ranks"])


def build_other(config: "sections.EngineConfig"):
    return STRATEGIES["single"](StrategyConfig())


def build_stopping(config: StrategyConfig):
    def get_rank():
        raise KeyboardInterrupt

    return attrs.evolve(STRATEGIES["single"](config), get_rank=get_rank)


def build_painting(config: StrategyConfig):
    def get_rank():
        raise RuntimeError("\\x1b[31mred")

    return attrs.evolve(STRATEGIES["single"](config), get_rank=get_rank)


TEXT = "no function"
"""

MODULES = {"importing": "import nowhere_at_all", "misspelt": "def (", "leaving": "raise SystemExit(0)"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """Stand in a directory with a module of the user's."""
    (tmp_path / "backends.py").write_text(BACKENDS)
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
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
    assert {path.name for path in here.iterdir()} == {"backends.py", *(f"{name}.py" for name in MODULES)}


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
        ([], "error: no target is given"),
        (["single", "fake"], "2 targets are given"),
        (["sngle"], "target='sngle' is not registered; did you mean 'single'?"),
        (["backends:build_secretly"], "does not say what it builds; add --kind strategy or --kind engine."),
        (["backends:build_never"], "target='backends:build_never' cannot be imported"),
        (
            ["backends:TEXT", "--kind", "engine"],
            "target='backends:TEXT' is of type str; name a function that builds an engine.",
        ),
        (["nowhere:build"], "No module named 'nowhere'); write package.module:function."),
        ([":build"], "target=':build' cannot be imported (ValueError: Empty module name); write"),
        (["importing:build"], "'importing' itself fails (ModuleNotFoundError: No module named 'nowhere_at_all'); mend"),
        (["misspelt:build"], "'misspelt' itself fails (SyntaxError: invalid syntax"),
        (["leaving:build"], "'leaving' itself fails (SystemExit: 0); mend that module."),
        (["backends:build_nothing"], "cannot be built (it returned None); make it a function of one argument, Strat"),
        (["backends:build_class"], "cannot be built (it returned the class Strategy); make it"),
        (["backends:build_without_argument"], "takes 0 positional arguments but 1 was given); make it"),
        (["backends:build_red"], "cannot be built (RuntimeError: \\x1b[31mred); make it"),
        (["backends:build_leaving"], "cannot be built (SystemExit: 0); make it"),
        (["backends:build_incomplete"], "cannot be built (TypeError: Strategy.__init__() missing"),
        (["backends:build_listing"], "cannot be built (its capabilities are no frozenset but ['ranks']); make it"),
        (["backends:build_other"], "(it returned an object of type Strategy); make it a function of one argument, Eng"),
        (["backends:build_scripted", "--kind", "strategy"], "argument, StrategyConfig, that returns a Strategy."),
        (
            ["single", "--world-size", "2"],
            "--world-size=2 holds no law: 'ranks' is not claimed by single; claim it, or",
        ),
        (
            ["single", "--laws", "collectives.barrier"],
            "--laws='collectives.barrier' is not held: 'ranks' is not claimed",
        ),
        (["single", "strategy=fake"], "strategy='fake' would choose the strategy, and 'single' is held to its laws"),
        (["hf", "type=scripted"], "type='scripted' would choose the engine, and 'hf' is held to its laws"),
        (["single", "--seed", "-1"], "--seed=-1 is below 0"),
        (["single", "--laws", "step.acumulation"], "did you mean 'step.accumulation'?"),
        (["single", "--example", "{}"], "--example is of one law and"),
        (
            ["single", "--laws", "record.frozen", "--example", "{}"],
            "example='{}' is no RecordCase (required field missing @ it.run; ",
        ),
        (["single", "--laws", "record.frozen", "--example", "{"], "is no RecordCase (line 1, column 2: Expecting"),
        (["single", "--max-examples", "0"], "--max-examples=0 looks at nothing"),
        (["single", "--world-size", "0"], "--world-size=0 is no number of ranks"),
        (["hf", "--engine", "scripted"], "--engine='scripted' is for a strategy"),
        (["single", "--engine", "nothing"], "--engine='nothing' is not registered"),
        (["single", "--report", "nowhere/page.html"], "--report='nowhere/page.html' cannot be written (No such file"),
        (["single", "--report", "."], "--report='.' cannot be written (it is no file)"),
        (["single", "--report", "x" * 300], "cannot be written (File name too long)"),
    ],
)
def test_wrong_input_is_one_line(cli: Cli, argv: list[str], words: str) -> None:
    """What makes no sense ends with exit code 2 and one line, before any table."""
    outcome = cli("conformance", *argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.line


@pytest.mark.usefixtures("here")
def test_an_interrupt_says_what_is_left(cli: Cli) -> None:
    """Ctrl-C ends with 130, and what was held before stands in the table."""
    outcome = cli("conformance", "backends:build_stopping", "--laws", "record.frozen", "collectives.world")
    assert outcome.code == 130
    assert [line.split()[0] for line in outcome.out.splitlines()] == ["law", "record.frozen"]
    assert outcome.line.endswith("error: interrupted; what was held so far stands above.")


@pytest.mark.usefixtures("here")
def test_no_control_character_reaches_the_terminal_or_the_page(cli: Cli) -> None:
    """What a user's exception says is escaped."""
    target = "backends:build_painting"
    outcome = cli("conformance", target, "--laws", "collectives.world", "--report", "page.html")
    assert outcome.code == 1
    for text in (outcome.out, Path("page.html").read_text()):
        assert "\x1b" not in text
        assert "\\x1b[31mred" in text


def test_rows_are_cut_to_the_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a row is one line of it; elsewhere the sentence is whole."""
    asked = ("conformance", "single", "--laws", "record.frozen", "--world-size", "1", "1", "--max-examples", "1")
    assert STRATEGY_LAWS["record.frozen"].statement in cli(*asked).out
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, *rows = cli(*asked).out.splitlines()[:-2]
    assert [(len(row), row[-3:]) for row in rows] == [(60, "...")]


def test_the_laws_are_listed(cli: Cli) -> None:
    """`--list` needs no target and gives each law with its sentence."""
    outcome = cli("conformance", "--list")
    assert outcome.code == 0
    for law in [*STRATEGY_LAWS.values(), *ENGINE_LAWS.values()]:
        assert re.search(rf"^{law.id} +{re.escape(law.statement)}$", outcome.out, re.MULTILINE)


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
    Path("page.html").symlink_to("real.html")
    outcome = cli(*asked, "--max-examples", "2", "--report", "page.html")
    assert outcome.out.splitlines()[-1] == "report: page.html"
    assert Path("page.html").is_symlink()
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
