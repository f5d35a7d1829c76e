"""The command as a whole: what it answers without computing, and how it says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import Cli

from lightrft import __version__
from lightrft.cli import main
from lightrft.cli.failures import exit_code, explain
from lightrft.cli.terminal import table, tolerant_output
from lightrft.errors import CheckpointError, ConfigError, DataError, InterruptedRunError, UnsupportedError


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["--version"], ["train", "--help"], ["evaluate", "--help"], ["train", "--print-config"], ["engines"]],
)
def test_answers_without_torch(argv: list[str]) -> None:
    """Help, the version, the whole configuration and the registries are printed without importing torch."""
    program = (
        "import sys; from lightrft.cli import main; code = main(sys.argv[1:]); "
        "sys.exit('torch was imported' if 'torch' in sys.modules else code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(  # noqa: S603 (our own interpreter)
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_help_names_every_command_and_the_version(cli: Cli) -> None:
    """`--help` lists the six commands; `--version` prints the version."""
    shown = cli("--help")
    assert shown.code == 0
    for name in ("train", "evaluate", "report", "strategies", "engines", "doctor"):
        assert name in shown.out
    assert cli("--version").out == f"lightrft {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no command is given; use one of train"),
        (["trian"], "command='trian' is not known; did you mean 'train'?"),
        (["train", "--stategy=single", "x.toml"], "option='--stategy=single' is not known"),
        (["train", "--strategy"], "lightrft train: argument --strategy: expected one argument"),
        (["engines", "hf"], "argument='hf' is one too many"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage_is_one_line(cli: Cli, argv: list[str], words: str) -> None:
    """A command line that makes no sense ends with exit code 2 and one line that says what to do."""
    outcome = cli(*argv)
    assert outcome.code == 2
    assert outcome.line.startswith("lightrft: error: ")
    assert words in outcome.line
    assert outcome.out == ""


def test_debug_adds_the_traceback(cli: Cli, tmp_path: Path) -> None:
    """With `--debug` the traceback comes before the line, which stays the same."""
    missing = str(tmp_path / "missing.toml")
    plain, debug = cli("train", missing), cli("train", missing, "--debug")
    assert debug.code == plain.code == 2
    assert "Traceback" in debug.err
    assert debug.err.splitlines()[-1] == plain.line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("a\n  b"), 2, "error: a b"),
        (UnsupportedError("no"), 2, "error: no"),
        (CheckpointError("bad"), 1, "error: bad"),
        (OSError(28, "No space left on device", "/x/y"), 1, "error: /x/y: No space left on device"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device"),
        (InterruptedRunError("SIGINT: stopped"), 75, "SIGINT: stopped"),
        (KeyboardInterrupt(), 130, "error: interrupted at once, in the middle of a step."),
        (ZeroDivisionError("by 0"), 1, "error: ZeroDivisionError: by 0; run again with --debug for the traceback."),
        (MemoryError(), 1, "error: MemoryError; run again with --debug for the traceback."),
    ],
)
def test_exit_codes(error: BaseException, code: int, line: str) -> None:
    """Every kind of exception has its exit code and becomes one line."""
    assert (exit_code(error), explain(error)) == (code, [line])


def test_every_wrong_setting_has_its_line_and_notes_follow_the_last() -> None:
    """A configuration with two mistakes gives two lines; a note joins the line of its error."""
    assert explain(ConfigError("a=1 is wrong.\nb=2 is wrong.")) == ["error: a=1 is wrong.", "error: b=2 is wrong."]
    error = CheckpointError("bad.")
    error.add_note("The last checkpoint is intact.")
    assert explain(error) == ["error: bad. The last checkpoint is intact."]
    caused = ConfigError("one\ntwo")
    caused.__cause__ = ValueError()
    assert explain(caused) == ["error: one two"]


def test_an_encoding_without_a_character_ends_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a stream that is not UTF-8 what it cannot write becomes a question mark."""
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        tolerant_output()
        sys.stdout.write("\u03b1")
    assert (tmp_path / "out").read_text() == "?"


def test_tables_line_up() -> None:
    """Columns start at the same place in every row and no row ends with spaces."""
    lines = table(("key", "what"), [("a", "x"), ("longer", "")])
    assert lines == ["key     what", "a       x", "longer"]


def test_strategies_and_engines_are_listed(cli: Cli) -> None:
    """Each key of the registries has a row with whether its package is installed and what it is."""
    strategies, engines = cli("strategies"), cli("engines")
    assert strategies.code == engines.code == 0
    rows = [line.split() for line in (strategies.out + engines.out).splitlines()]
    assert [row[0] for row in rows] == ["key", "single", "fake", "fsdp2", "deepspeed", "key", "hf", "scripted"]
    assert all(len(row) > 2 for row in rows)


def test_backends_of_other_packages_are_listed(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package's entry point has a row with its place, and its module is not imported."""
    info = tmp_path / "mine-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[lightrft.engines]\nmine = not_there:build\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    last = cli("engines").out.splitlines()[-1]
    assert last.split() == ["mine", "yes", "not_there:build,", "of", "the", "package", "mine"]


def test_a_missing_package_is_said_with_its_command(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose package is not installed is listed with the command that installs it."""
    monkeypatch.setattr("importlib.util.find_spec", {}.get)
    assert "no: pip install 'lightrft[hf]'" in cli("engines").out


def test_main_takes_the_arguments_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without arguments `main` reads `sys.argv`."""
    monkeypatch.setattr(sys, "argv", ["lightrft", "--version"])
    assert main() == 0
    assert __version__ in capsys.readouterr().out
