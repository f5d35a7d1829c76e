"""A run as one HTML page that needs nothing but itself: curves, completions before and after, configuration."""

from __future__ import annotations

import errno
import html
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import attrs

from lightrft.config.redaction import redact
from lightrft.errors import DataError
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.tracking.files import channel_path, read_rows
from lightrft.tracking.page import STYLE
from lightrft.tracking.plots import Series, format_number, line_chart
from lightrft.tracking.tracker import CHANNELS, Channel

__all__ = ["render_report", "write_report"]

_Row = Mapping[str, Json]


@attrs.frozen(kw_only=True)
class _Chart:
    """What one chart shows.

    Attributes:
        title: its heading.
        channel: whose rows it is drawn from.
        key: the figure.
        kinds: kinds of rows, one curve each.
        unit: name of the vertical axis.
        low: end of the vertical axis that is always shown.
        high: other end of the vertical axis that is always shown.
        is_share: whether values are shares, shown as per cent in the heading.
    """

    title: str
    channel: Channel
    key: str
    kinds: tuple[str, ...]
    unit: str
    low: float | None = None
    high: float | None = None
    is_share: bool = False


_CHARTS = (
    _Chart(title="Reward", channel="metrics", key="reward", kinds=("step",), unit="mean reward"),
    _Chart(
        title="Held-out accuracy",
        channel="metrics",
        key="accuracy",
        kinds=("evaluation",),
        unit="share solved",
        low=0.0,
        high=1.0,
        is_share=True,
    ),
    _Chart(title="KL divergence", channel="metrics", key="kl", kinds=("step",), unit="nats per token", low=0.0),
    _Chart(title="Entropy", channel="metrics", key="entropy", kinds=("step",), unit="nats per token", low=0.0),
    _Chart(
        title="Gradient norm", channel="metrics", key="grad_norm", kinds=("warmup", "step"), unit="L2 norm", low=0.0
    ),
    _Chart(title="Policy loss", channel="metrics", key="loss", kinds=("step",), unit="loss"),
    _Chart(title="Warm-up loss", channel="metrics", key="loss", kinds=("warmup",), unit="nats per token", low=0.0),
    _Chart(
        title="Completion length",
        channel="metrics",
        key="completion_length",
        kinds=("step",),
        unit="tokens",
        low=0.0,
    ),
    _Chart(
        title="Speed", channel="timings", key="tokens_per_second", kinds=("step",), unit="tokens per second", low=0.0
    ),
)
_CURVE_NAMES = {"warmup": "warm-up", "step": "reinforcement", "evaluation": "held out"}


def write_report(run_dir: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write the page of a run and return its path.

    Args:
        run_dir: directory of the run; rows that are not there yet are left out.
        output: the file, replaced in one step if it exists.

    Raises:
        DataError: a file of the run is damaged.
        OSError: the page cannot be written, or something that is no file, such as a device, stands in its place.
    """
    directory, target = Path(run_dir), Path(output)
    rows: dict[Channel, Sequence[_Row]] = {channel: _read(channel_path(directory, channel)) for channel in CHANNELS}
    name = directory.name or directory.resolve().name
    page = render_report(name, config=_read_config(directory / "config.toml"), rows=rows)
    final = target.resolve()  # a link stays one
    if final.exists() and not final.is_file():
        # root could put a file into the place of /dev/null
        raise FileExistsError(errno.EEXIST, "no file, and not replaced by one", str(target))
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
        temporary.replace(final)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # writing names no file by itself
        raise OSError(error.errno, error.strerror, str(target)) from error
    return target


def render_report(name: str, *, config: Mapping[str, object], rows: Mapping[Channel, Sequence[_Row]]) -> str:
    """Return the page as HTML text.

    Args:
        name: what the run is called.
        config: the configuration as TOML reads it; secrets are left out.
        rows: rows by channel, any number.
    """
    title = html.escape(name)
    body = [
        f"<header><p class=eyebrow>lightrft</p><h1>{title}</h1></header>",
        _tiles(rows),
        '<section class="charts">',
        *(_chart(chart, rows) for chart in _CHARTS if chart.kinds != ("warmup",) or _has_warmup(rows)),
        "</section><p class=note>Thin: every step. Bold: moving average over a twentieth of them.</p>",
        _samples(rows.get("samples", ())),
        _config(config),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title} - lightrft</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def _read(path: Path) -> Sequence[_Row]:
    return list(read_rows(path)) if path.exists() else []


def _read_config(path: Path) -> Mapping[str, object]:
    if not path.exists():
        return {}
    try:
        return cast("Mapping[str, object]", redact(tomllib.loads(path.read_text(encoding="utf-8"))))
    except ValueError as error:
        raise DataError(f"config={str(path)!r} cannot be read ({error}); restore the file.") from error


def _tiles(rows: Mapping[Channel, Sequence[_Row]]) -> str:
    metrics, timings = rows.get("metrics", ()), rows.get("timings", ())
    accuracies = [y for _, y in _points(metrics, "evaluation", "accuracy")]
    tiles: list[tuple[str, str]] = []
    if len(accuracies) > 1:
        gain = 100 * (accuracies[-1] - accuracies[0])
        tiles.append(("held-out accuracy", f"{accuracies[0]:.1%} <i>to</i> {accuracies[-1]:.1%}"))
        tiles.append(("through reinforcement", f"{gain:+.1f} points"))
    elif accuracies:
        tiles.append(("held-out accuracy before", f"{accuracies[0]:.1%}"))
    counts = {kind: sum(row.get("kind") == kind for row in metrics) for kind in ("warmup", "step")}
    if counts["warmup"]:
        tiles.append(("warm-up steps", f"{counts['warmup']:,}"))
    tiles.append(("reinforcement steps", f"{counts['step']:,}"))
    tokens = sum(y for _, y in _points(metrics, "step", "completion_tokens"))
    tiles.append(("tokens generated", f"{tokens:,.0f}"))
    tiles.append(("time in steps", _duration(sum(_number(row.get("seconds"), 0.0) for row in timings))))
    shown = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in tiles)
    return f'<dl class="tiles">{shown}</dl>'


def _chart(chart: _Chart, rows: Mapping[Channel, Sequence[_Row]]) -> str:
    source = rows.get(chart.channel, ())
    curves = [Series(name=_CURVE_NAMES[kind], points=tuple(_points(source, kind, chart.key))) for kind in chart.kinds]
    curves = [curve for curve in curves if curve.points]
    drawn = line_chart(curves, x_label="steps", y_label=chart.unit, low=chart.low, high=chart.high)
    last = curves[-1].points[-1][1] if curves else math.nan
    value = f"{last:.1%}" if chart.is_share else format_number(last)
    newest = f"<span>{value}</span>" if math.isfinite(last) else ""
    return f"<figure><figcaption><b>{chart.title}</b>{newest}</figcaption>{drawn}</figure>"


def _samples(rows: Sequence[_Row]) -> str:
    evaluated = [row for row in rows if row.get("kind") == "evaluation"]
    steps = sorted({_number(row.get("step"), 0.0) for row in evaluated})
    if not steps:
        return "<section><h2>Completions</h2><p>No evaluation yet.</p></section>"
    first = {str(row.get("prompt")): row for row in evaluated if _number(row.get("step"), 0.0) == steps[0]}
    last = {str(row.get("prompt")): row for row in evaluated if _number(row.get("step"), 0.0) == steps[-1]}
    has_after = len(steps) > 1
    after = f"<th>after (step {steps[-1]:.0f})</th>" if has_after else ""
    lines = [
        f"<tr><td>{_text(prompt)}</td><td>{_text(row.get('answer'))}</td>{_completion(row)}"
        f"{_completion(last.get(prompt)) if has_after else ''}</tr>"
        for prompt, row in first.items()
    ]
    return (
        "<section><h2>Completions of held-out problems</h2><div class=scroll><table>"
        f"<thead><tr><th>prompt</th><th>expected</th><th>before (step {steps[0]:.0f})</th>{after}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _completion(row: _Row | None) -> str:
    if row is None:
        return "<td></td>"
    reward = _number(row.get("reward"), math.nan)
    verdict = "good" if reward >= 1 else "bad"
    return f'<td class="{verdict}">{_text(row.get("completion"))}<small>reward {format_number(reward)}</small></td>'


def _text(value: Json) -> str:
    return f"<code>{html.escape('' if value is None else str(value))}</code>"


def _config(config: Mapping[str, object]) -> str:
    if not config:
        return "<section><h2>Configuration</h2><p>None is kept with this run.</p></section>"
    tables: list[str] = []
    for section, settings in config.items():
        items = cast("Mapping[str, object]", settings) if isinstance(settings, Mapping) else {"": settings}
        rows = "".join(
            f"<tr><td>{html.escape(str(key))}</td><td><code>{html.escape(_setting(value))}</code></td></tr>"
            for key, value in items.items()
        )
        tables.append(f"<div><h3>{html.escape(str(section))}</h3><table>{rows}</table></div>")
    return (
        "<section><details><summary><h2>Configuration</h2></summary>"
        f'<div class="settings">{"".join(tables)}</div></details></section>'
    )


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) and value else repr(value)


def _points(rows: Sequence[_Row], kind: str, key: str) -> list[tuple[float, float]]:
    chosen = [row for row in rows if row.get("kind") == kind]
    points = [(_number(row.get("step"), 0.0), _number(row.get(key), math.nan)) for row in chosen]
    return points if any(math.isfinite(y) for _, y in points) else []


def _number(value: Json, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) else default


def _has_warmup(rows: Mapping[Channel, Sequence[_Row]]) -> bool:
    return any(row.get("kind") == "warmup" for row in rows.get("metrics", ()))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
