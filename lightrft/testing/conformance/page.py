"""A conformance report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

from lightrft import __version__
from lightrft.testing.conformance.report import Finding, Outcome, Report
from lightrft.tracking.page import STYLE

__all__ = ["check_writable", "render_page", "write_page"]

_CLASSES: Mapping[Outcome, str] = MappingProxyType({"holds": "good", "broken": "bad", "not claimed": "soft"})
_STYLE = """
td.soft{color:var(--soft)}
td.number{text-align:right;font-variant-numeric:tabular-nums}
td.outcome{white-space:nowrap}
pre{margin:8px 0;font:13px/1.45 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
article{background:var(--card);border:1px solid var(--faint);border-radius:10px;padding:14px 16px;margin:0 0 14px}
article h3{color:var(--bad-ink)}
"""


def check_writable(output: Path) -> None:
    """Return if a page can be written, which leaves nothing behind.

    Args:
        output: the file.

    Raises:
        OSError: it cannot be written, or is no file.
    """
    if output.exists() and not output.is_file():
        raise OSError(None, "it is no file", str(output))
    temporary = _beside(output)
    try:
        temporary.write_text("", encoding="utf-8")
    finally:
        temporary.unlink(missing_ok=True)


def _beside(output: Path) -> Path:
    """Return a file in the directory of the output, or of what it links to."""
    real = Path(os.path.realpath(output))
    return real.with_name(f".{real.name[:200]}.tmp")


def write_page(report: Report, output: Path) -> Path:
    """Write the page of a report and return its path.

    Args:
        report: what came of the laws.
        output: the file, replaced in one step if it exists; a link stays, and what it links to is replaced.

    Raises:
        OSError: it cannot be written.
    """
    temporary = _beside(output)
    try:
        temporary.write_text(render_page(report), encoding="utf-8", errors="backslashreplace")
        temporary.replace(os.path.realpath(output))
    finally:
        temporary.unlink(missing_ok=True)
    return output


def render_page(report: Report) -> str:
    """Return the page as HTML text.

    Args:
        report: what came of the laws.
    """
    title = html.escape(f"{report.kind} {report.subject}")
    broken = [finding for finding in report.findings if finding.outcome == "broken"]
    body = [
        f"<header><p class=eyebrow>lightrft {__version__} conformance</p><h1>{title}</h1></header>",
        _tiles(report),
        *([f"<section><h2>Broken</h2>{''.join(map(_failure, broken))}</section>"] if broken else []),
        *(_section(name, list(rows)) for name, rows in groupby(report.findings, key=_section_of)),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title} - lightrft</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}{_STYLE}</style></head>\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def _section_of(finding: Finding) -> str:
    return finding.law.partition(".")[0]


def _tiles(report: Report) -> str:
    counts = {outcome: sum(each.outcome == outcome for each in report.findings) for outcome in _CLASSES}
    seconds = sum(finding.seconds for finding in report.findings)
    tiles = [
        *((outcome, str(count)) for outcome, count in counts.items()),
        ("examples of a law, at most", str(report.max_examples)),
        ("seed", str(report.seed)),
        ("time", f"{seconds:.1f} s"),
    ]
    shown = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in tiles)
    return f'<dl class="tiles">{shown}</dl>'


def _section(name: str, findings: list[Finding]) -> str:
    rows = "".join(map(_row, findings))
    return (
        f"<section><h2>{html.escape(name)}</h2><div class=scroll><table>"
        "<thead><tr><th>law</th><th>what it says</th><th>ranks</th><th>outcome</th><th>seconds</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _row(finding: Finding) -> str:
    reason = f"<small>{html.escape(finding.message)}</small>" if finding.outcome == "not claimed" else ""
    return (
        f"<tr><td><code>{html.escape(finding.law)}</code></td><td>{html.escape(finding.statement)}</td>"
        f'<td class="number">{finding.world_size}</td>'
        f'<td class="outcome {_CLASSES[finding.outcome]}">{finding.outcome}{reason}</td>'
        f'<td class="number">{finding.seconds:.2f}</td></tr>'
    )


def _failure(finding: Finding) -> str:
    example = f"<pre>example: {html.escape(finding.example)}</pre>" if finding.example is not None else ""
    return (
        f"<article><h3>{html.escape(finding.law)}</h3><p>{html.escape(finding.statement)}</p>"
        f"<pre>{html.escape(finding.message)}</pre>{example}<pre>{html.escape(finding.command)}</pre></article>"
    )
