"""The report: one well-formed page that needs nothing but itself and shows what the rows say."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightrft.errors import DataError
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.tracking.files import build_file_tracker
from lightrft.tracking.report import render_report, write_report

_VOID = {"meta", "br", "link", "img", "input", "hr"}


class _Page(HTMLParser):
    """Checks that tags are closed in order, and collects text and attributes."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.cells: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th"}:
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cells and {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data


def _parsed(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def _log_run(directory: Path, *, steps: int = 60) -> None:
    tracker = build_file_tracker(directory)
    tracker.resume(-1)
    for step in range(1, 11):
        tracker.log("metrics", {"step": step, "kind": "warmup", "loss": 1 / step, "grad_norm": 1.0})
        tracker.log("timings", {"step": step, "kind": "step", "seconds": 1.5})
    for when, accuracy, completion in ((10, 0.25, "<b>4"), (10 + steps, 0.875, "2")):
        tracker.log("metrics", {"step": when, "kind": "evaluation", "accuracy": accuracy, "reward": accuracy})
        sample: dict[str, Json] = {"step": when, "kind": "evaluation", "prompt": "1+1=", "answer": "2"}
        tracker.log("samples", {**sample, "completion": completion, "reward": float(completion == "2")})
    for step in range(11, 11 + steps):
        figures: dict[str, Json] = {"reward": step / 100, "entropy": 1.0, "kl": None, "grad_norm": None, "loss": 0.0}
        tracker.log("metrics", {"step": step, "kind": "step", "completion_tokens": 100, **figures})
        tracker.log("timings", {"step": step, "kind": "step", "seconds": 60.0, "tokens_per_second": 1000.0})


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    """It is well-formed HTML without scripts and without a reference to anything outside."""
    _log_run(tmp_path)
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    parsed = _parsed(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert not {"src", "href", "onload", "onclick", "xlink:href"} & {name for name, _ in parsed.attributes}
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page
    assert "prefers-color-scheme:dark" in page
    assert parsed.tags.count("svg") == 9
    assert len(page) < 100_000


def test_the_page_says_what_the_rows_say(tmp_path: Path) -> None:
    """Accuracy before and after, counts, time, units, and completions before and after stand on the page."""
    _log_run(tmp_path / "my run")
    parsed = _parsed(write_report(tmp_path / "my run", tmp_path / "page.html").read_text())
    for words in (
        "my run",
        "25.0% to 87.5%",
        "+62.5 points",
        "6,000",
        "1 h 0 min",
        "tokens per second",
        "not measured",
    ):
        assert words in parsed.text
    assert ["prompt", "expected", "before (step 10)", "after (step 70)"] in parsed.cells
    assert ["1+1=", "2", "<b>4reward 0", "2reward 1"] in parsed.cells


def test_a_run_without_rows_has_a_page(tmp_path: Path) -> None:
    """Before the first row there is a page all the same; it says that nothing was measured."""
    parsed = _parsed(write_report(tmp_path, tmp_path / "report.html").read_text())
    assert parsed.text.count("not measured") == 8
    assert "No evaluation yet" in parsed.text
    assert "None is kept with this run" in parsed.text


def test_one_evaluation_has_no_after() -> None:
    """After the first evaluation the completions stand in one column, and the accuracy in one tile."""
    sample: dict[str, Json] = {"step": 3, "kind": "evaluation", "prompt": "a", "completion": "b"}
    evaluation: dict[str, Json] = {"step": 3, "kind": "evaluation", "accuracy": 0.5}
    timing: dict[str, Json] = {"step": 3, "kind": "step", "seconds": 75.0}
    rows = {"samples": [sample], "metrics": [evaluation], "timings": [timing]}
    parsed = _parsed(render_report("x", config={}, rows=rows))
    assert ["prompt", "expected", "before (step 3)"] in parsed.cells
    assert ["a", "", "breward nan"] in parsed.cells
    assert "held-out accuracy before50.0%" in parsed.text
    assert "1 min 15 s" in parsed.text


def test_a_problem_that_was_not_asked_again_has_an_empty_cell() -> None:
    """Where the last evaluation lacks a prompt of the first one, its cell is empty and not another one's."""
    rows: list[dict[str, Json]] = [
        {"step": step, "kind": "evaluation", "prompt": prompt, "completion": "c", "reward": 1.0}
        for step, prompt in ((1, "p"), (1, "q"), (2, "q"))
    ]
    parsed = _parsed(render_report("x", config={}, rows={"samples": rows}))
    assert ["p", "", "creward 1", ""] in parsed.cells
    assert ["q", "", "creward 1", "creward 1"] in parsed.cells


def test_secrets_of_the_configuration_are_not_on_the_page(tmp_path: Path) -> None:
    """A secret that somebody wrote into the run's configuration is hidden; other settings are shown, escaped."""
    (tmp_path / "config.toml").write_text(
        'title = "top"\n[strategy]\nseed = 7\nbf16 = false\nempty = ""\n'
        '[strategy.extra_args]\nwandb_api_key = "s3cr3t"\nnote = "<i>"\n'
    )
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    parsed = _parsed(page)
    assert "s3cr3t" not in page
    for row in (["seed", "7"], ["bf16", "false"], ["empty", "''"], ["", "top"]):
        assert row in parsed.cells
    assert "<i>" not in page


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    """A configuration that is no TOML is named and not passed over."""
    (tmp_path / "config.toml").write_text("[")
    with pytest.raises(DataError, match=r"config\.toml"):
        write_report(tmp_path, tmp_path / "report.html")


def test_a_page_that_cannot_be_written_names_its_file(tmp_path: Path) -> None:
    """The error names the page, and no half of one is left."""
    target = tmp_path / "nowhere" / "report.html"
    with pytest.raises(OSError, match=r"nowhere/report\.html"):
        write_report(tmp_path, target)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_report(tmp_path, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_page_never_takes_the_place_of_what_is_no_file(tmp_path: Path) -> None:
    """A device or pipe stays what it is, and a link to a page stays a link."""
    pipe, link, page = tmp_path / "pipe", tmp_path / "link.html", tmp_path / "page.html"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="pipe"):
        write_report(tmp_path, pipe)
    assert pipe.is_fifo()
    link.symlink_to(page)
    assert write_report(tmp_path, link) == link
    assert link.is_symlink()
    assert page.read_text().startswith("<!DOCTYPE html>")
