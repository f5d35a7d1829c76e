"""The command as a whole: what it answers without computing, and how it says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from cli_runs import REPOSITORY, Cli, make_workplace

from lightrft import __version__
from lightrft.cli import main
from lightrft.cli.failures import exit_code, explain
from lightrft.cli.progress import build_dispensable
from lightrft.cli.terminal import command_line, say, table, tolerant_output
from lightrft.errors import CheckpointError, ConfigError, DataError, InterruptedRunError, UnsupportedError
from lightrft.tracking.files import channel_path
from lightrft.tracking.progress import build_progress_tracker


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["evaluate", "--help"],
        ["checkpoint", "--help"],
        ["conformance", "--help"],
        ["train", "--print-config"],
        ["engines"],
    ],
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
    """`--help` lists the nine commands; `--version` prints the version."""
    shown = cli("--help")
    assert shown.code == 0
    for name in ("train", "plan", "evaluate", "report", "checkpoint", "strategies", "engines", "doctor", "conformance"):
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
        (SystemExit(3), 1, "error: SystemExit: 3; run again with --debug for the traceback."),
        (
            RuntimeError("gloo: a bug of its own"),
            1,
            "error: RuntimeError: gloo: a bug of its own; run again with --debug for the traceback.",
        ),
        (
            RuntimeError("Timed out waiting 80ms for a reward"),
            1,
            "error: RuntimeError: Timed out waiting 80ms for a reward; run again with --debug for the traceback.",
        ),
        (MemoryError(), 1, "error: MemoryError; run again with --debug for the traceback."),
    ],
)
def test_exit_codes(error: BaseException, code: int, line: str) -> None:
    """Every kind of exception has its exit code and becomes one line."""
    assert (exit_code(error), explain(error)) == (code, [line])


def test_a_collective_that_was_not_entered_in_time_names_the_setting() -> None:
    """What gloo and NCCL say of it is said in words of ours, with the seconds."""
    for said in (
        "[/x/gloo/tcp/unbound_buffer.cc:129] Timed out waiting 8500ms for recv operation to complete",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3) ran for 8500 milliseconds before",
    ):
        (line,) = explain(RuntimeError(said))
        assert line.startswith(
            "error: strategy.timeout=8.5 went by inside of the model, in a collective of its forward"
        )
        assert line.endswith("; see what other ranks wait for, or set more if they are only slow.")


def test_every_wrong_setting_has_its_line_and_notes_follow_the_last() -> None:
    """A configuration with two mistakes gives two lines; a note joins the line of its error."""
    assert explain(ConfigError("a=1 is wrong.\nb=2 is wrong.")) == ["error: a=1 is wrong.", "error: b=2 is wrong."]
    error = CheckpointError("bad.")
    error.add_note("The last checkpoint is intact.")
    assert explain(error) == ["error: bad. The last checkpoint is intact."]
    unfinished = OSError(21, "Is a directory", "a")
    unfinished.add_note("The last checkpoint is intact.")
    assert explain(unfinished) == ["error: a: Is a directory. The last checkpoint is intact."]
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
    wanted = ["key", "single", "fake", "fsdp2", "deepspeed", "key", "hf", "vllm", "sglang", "scripted"]
    assert [row[0] for row in rows] == wanted
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


def _shell(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in which `lightrft` is `$L`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "L": f"{sys.executable} -m lightrft",
    }
    command = ["bash", "-c", script]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120)  # noqa: S603 (our own words)


_SMALL = "run.warmup_steps=0 run.num_steps=2"


def test_a_run_goes_on_when_nobody_reads_its_progress(tmp_path: Path) -> None:
    """`| head -1`, a full disk behind stdout and a closed stdout cost the run nothing."""
    make_workplace(tmp_path)
    piped = _shell(f"$L train run.toml {_SMALL} run.dir=a | head -1; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (piped.returncode, piped.stdout.count("\n")) == (0, 1), piped
    closed = _shell(f"$L train run.toml {_SMALL} run.dir=b >&- 2>&-", tmp_path)
    assert closed.returncode == 0, closed
    rows = [channel_path(tmp_path / name, "metrics").read_bytes() for name in ("a", "b")]
    assert rows[0] == rows[1]
    for name in ("a", "b"):
        assert (tmp_path / name / "report.html").is_file()


@pytest.mark.parametrize("command", ["strategies", "train --print-config"])
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path, command: str) -> None:
    """`lightrft ... | true` says nothing on stderr; a disk that is full does."""
    done = _shell(f"$L {command} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    full = _shell(f"$L {command} > /dev/full", tmp_path)
    assert (full.returncode, full.stderr) == (1, "lightrft: error: standard output: No space left on device\n")


def test_an_error_without_streams_keeps_its_exit_code(tmp_path: Path) -> None:
    """With all three streams closed wrong input is still exit code 2."""
    assert _shell("$L train none.toml <&- >&- 2>&-", tmp_path).returncode == 2


def test_progress_that_cannot_be_written_is_dispensable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A display whose output fails is named once on stderr, and every later row passes."""
    with (tmp_path / "out").open("w") as stream, Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", stream)
        shown = build_dispensable(build_progress_tracker(warmup_steps=0, num_steps=2, file=full, every_seconds=0.0))
        shown.resume(-1)
        shown.log("metrics", {"step": 1, "kind": "step", "reward": 0.5})
        shown.log("timings", {"step": 1, "kind": "step"})
        shown.close()
        with suppress(OSError):
            full.close()
    assert capsys.readouterr().err == (
        "lightrft: warning: standard output cannot be written (No space left on device); "
        "the run goes on without progress.\n"
    )


def test_commands_are_shown_as_they_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The program's name is the one that finds it here: by the search path, else by its own path, else as a module."""
    inside, outside = tmp_path / "bin" / "lightrft", tmp_path / "other" / "lightrft"
    for path in (inside, outside):
        path.parent.mkdir()
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(outside.parent))
    for own, shown in (
        (outside, "lightrft evaluate 'a b'"),
        (inside, "bin/lightrft evaluate 'a b'"),
        (tmp_path / "lightrft" / "__main__.py", f"{sys.executable} -m lightrft evaluate 'a b'"),
    ):
        monkeypatch.setattr(sys, "argv", [str(own)])
        assert command_line("evaluate", "a b") == shown
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(inside.parent)
    monkeypatch.setattr(sys, "argv", [str(outside)])
    assert command_line("train") == f"{outside} train"


def test_lines_for_nobody_are_lost_and_lines_for_a_full_disk_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the reader of a pipe has gone nothing fails; a stream that cannot hold a line is named, once."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        say("first")
        say("second")
        assert os.fstat(writer).st_rdev == Path(os.devnull).stat().st_rdev
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left on device: 'standard output'"):
            say("first")
        say("second")


def test_streams_that_are_missing_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without stdin and stdout gets some, so that no file of the run takes their descriptors."""
    kept = os.dup(0)
    os.close(0)
    monkeypatch.setattr(sys, "stdout", None)
    try:
        tolerant_output()
        assert os.fstat(0).st_rdev == Path(os.devnull).stat().st_rdev
        say("nowhere")
        sys.stdout.close()
    finally:
        os.dup2(kept, 0)
        os.close(kept)
